"""Matrix products and convolutions.

Where units are made, where they are read, and where the multiply-accumulates are.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_compress.discovery import axes
from lightning_compress.discovery.axes import Axis
from lightning_compress.discovery.rules.registry import Call, Dims, NoRule, rule


def contract(trace, left: Tensor, right: Tensor, left_dims: Dims, right_dims: Dims) -> Dims:  # type: ignore[no-untyped-def]
    """(..., m, k) x (..., k, n) -> (..., m, n): unify k and the batch dimensions, note roles, count the cost."""
    k = left_dims[-1] if left_dims[-1] is not None else right_dims[-2]
    m, n = left_dims[-2], right_dims[-1]
    axes.unify(left_dims[-1], right_dims[-2])
    batch: Dims = []
    for a, b in zip(left_dims[:-2], right_dims[:-2], strict=True):
        axes.unify(a, b)
        batch.append(a if a is not None else b)
    weights = [t for t in (left, right) if trace.sources(t)]
    if not weights:  # two activations: attention scores or mixing
        axes.mark(k, "contracted")
        axes.mark(m, "free")
        axes.mark(n, "free")
        for axis in batch:
            axes.mark(axis, "batched")
    else:
        trace.note(left, k, "consumer")
        trace.note(left, m, "producer")
        # Of two weights multiplied with each other (low-rank factors) the left one reads what the right one makes.
        trace.note(right, k, "producer" if len(weights) == 2 else "consumer")
        trace.note(right, n, "producer")
        for axis in batch:
            for weight in weights:
                trace.note(weight, axis, "producer")
    if len(weights) < 2:
        trace.count([*batch, m, k, n], weight=bool(weights))
    return [*batch, m, n]


@rule("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot", "vdot")
def matmul(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Products of vectors, matrices and batches of matrices, with an optional addend."""
    name = call.name.removesuffix("_")
    if name == "linear":
        left, right, bias = call["input"], call["weight"], call.named.get("bias")
        left_dims, right_dims = trace.dims(left), trace.dims(right)[::-1]
        right_dims = [*[None] * (len(left_dims) - 2), *right_dims]
        if len(left_dims) < 2:
            raise NoRule
    else:
        bias = call["self"] if name.startswith(("addm", "baddbmm")) else None
        left, right = call.inputs[-2:]
        left_dims, right_dims = trace.dims(left), trace.dims(right)
    vector_left, vector_right = name in ("dot", "vdot"), name in ("dot", "vdot", "mv", "addmv")
    if vector_left:
        left_dims = [None, *left_dims]
    if vector_right:
        right_dims = [*right_dims, None]
    if vector_left and trace.sources(left) and trace.sources(right):  # a number (a largest singular value, say)
        axes.mark(left_dims[-1], "summed")
    result = contract(trace, left, right, left_dims, right_dims)
    if vector_right:
        result.pop()
    if vector_left:
        result.pop()
    if isinstance(bias, Tensor):
        for b, axis in zip(trace.dims(bias)[::-1], result[::-1], strict=False):
            axes.unify(b, axis)
            trace.note(bias, b, "producer")
    return [result]


@rule("_grouped_mm")
def grouped_matmul(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Rows in consecutive groups, each with a matrix of its own: (rows, k) x (groups, k, n) -> (rows, n).

    The kernel reads lines of 16 bytes, so that what is contracted, and what will be when gradients flow back, can only
    go in blocks of that size.
    """
    left, right = call.inputs[:2]
    if left.dim() != 2 or right.dim() != 3:
        raise NoRule
    (rows, k), (groups, k_right, n) = trace.dims(left), trace.dims(right)
    axes.pin(groups, "it counts matrices of a grouped product")
    axes.unify(k, k_right)
    for axis in (k if k is not None else k_right, n):
        _in_blocks(axis, 16 // right.element_size())
    result = contract(trace, left, right, [rows, k], [k_right, n])
    bias = call.named.get("bias")
    if isinstance(bias, Tensor):
        axes.unify(trace.dims(bias)[-1], n)
        trace.note(bias, n, "producer")
    return [result]


def _in_blocks(axis: Axis | None, block: int) -> None:
    """Positions of a free axis go in neighbouring blocks, of 16 bytes in half precision where the axis is long."""
    if axis is None or all(atom.reasons for atom in axes.atoms(axis)):
        return
    if axis.size % 8 == 0 and axis.size >= 64:
        block = max(block, 8)
    if axis.size % block:
        axes.pin(axis, f"its size is no multiple of {block}, which a grouped product needs")
    elif axis.size > block:
        axes.pin(axes.split(axis, [axis.size // block, block])[1], "a grouped product needs whole lines of memory")
    else:
        axes.pin(axis, "a grouped product needs whole lines of memory")


@rule("_trilinear")
def trilinear(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Sum over some dimensions of the product of three tensors, each given dimensions of size 1: bilinear layers."""
    summed = set(call["sumdim"])
    rank = call.inputs[0].dim() + len(call["expand1"])
    positions: Dims = [None] * rank
    weights = [t for t in call.inputs if trace.sources(t)]
    for number, tensor in enumerate(call.inputs, start=1):
        inserted = {int(i) % rank for i in call[f"expand{number}"]}
        own = iter(trace.dims(tensor))
        for i in range(rank):
            axis = None if i in inserted else next(own)
            axes.unify(positions[i], axis)
            positions[i] = axis if positions[i] is None else positions[i]
            trace.note(tensor, axis, "consumer" if i in summed else "producer")
            if i in summed and not weights:
                axes.mark(axis, "contracted")
    trace.count(positions, weight=bool(weights))
    return [[axis for i, axis in enumerate(positions) if i not in summed]]


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable", "cudnn_convolution")
def convolution(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Convolutions of one to three dimensions: plain, grouped, depthwise and transposed."""
    source, weight, bias = call["input"], call["weight"], call.named.get("bias")
    transposed, groups = bool(call.get("transposed", False)), int(call.get("groups", 1))
    x, w = trace.dims(source), trace.dims(weight)
    output = call.outputs[0]
    if source.dim() != output.dim() or source.dim() != weight.dim():
        raise NoRule
    for axis in w[2:]:
        axes.pin(axis, "it is the extent of a convolution kernel")
    for axis in x[2:]:
        axes.pin(axis, "it is a spatial dimension")
    channels_in, channels_out = source.shape[1], output.shape[1]
    made: Axis | None
    if groups == 1:
        reads, made = (w[0], w[1]) if transposed else (w[1], w[0])
        axes.unify(x[1], reads)
        trace.note(weight, reads, "consumer")
        trace.note(weight, made, "producer")
        axes.mark(reads, "convolved")
        axes.mark(made, "convolved")
        count: list[Axis | None] = [reads, made]
    elif groups == channels_in == channels_out:
        made = w[0]
        axes.unify(x[1], made)  # depthwise: each channel has a filter of its own, which travels along
        axes.mark(made, "convolved")
        count = [made]
    else:
        made, count = _grouped(trace, weight, x, w, groups, transposed, channels_in, channels_out)
    if isinstance(bias, Tensor):
        axes.unify(trace.dims(bias)[0], made)
        trace.note(bias, made, "producer")
    spatial = source.shape[2:] if transposed else output.shape[2:]
    trace.count([x[0], *count], weight=True, factor=math.prod(weight.shape[2:]) * math.prod(spatial))
    return [[x[0], made, *trace.pinned(output, "it is a spatial dimension")[2:]]]


def _grouped(  # type: ignore[no-untyped-def]
    trace, weight: Tensor, x: Dims, w: Dims, groups: int, transposed: bool, channels_in: int, channels_out: int
) -> tuple[Axis | None, list[Axis | None]]:
    """Channels are (groups, channels of a group): whole groups may go, or channels inside them in all groups alike."""

    def by_group(axis: Axis | None, channels: int) -> tuple[Axis | None, Axis | None]:
        if axis is None or channels == groups:
            return axis, None
        outer, inner = axes.split(axis, [groups, channels // groups])
        return outer, inner

    try:
        group_in, inner_in = by_group(x[1], channels_in)
    except axes.AxisMismatch:
        # Shuffled so that its groups cut through ours: what reads it stays whole, and reads zeros where units go.
        axes.mark(x[1], "summed")
        group_in = inner_in = None
    if transposed:  # weight: (in, out / groups, ...)
        group_w, inner_w = by_group(w[0], channels_in)
        axes.unify(inner_in, inner_w)
        inner_out = w[1]
        made = axes.product([group_w, inner_out])
    else:  # weight: (out, in / groups, ...)
        group_w, inner_out = by_group(w[0], channels_out)
        inner_w = w[1]
        axes.unify(inner_in, inner_w)
        made = w[0]
    axes.unify(group_in, group_w)
    if group_in is None and x[1] is not None:
        for axis in (group_w, inner_w):
            axes.pin(axis, f"{groups} groups of a convolution meet it across its borders")
    trace.note(weight, inner_w, "consumer")
    trace.note(weight, inner_out, "producer")
    for axis in (group_w, inner_w, inner_out):
        axes.mark(axis, "convolved")
    return made, [group_w, inner_w, inner_out]
