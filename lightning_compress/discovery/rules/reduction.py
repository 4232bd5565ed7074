"""Reductions and other operations that mix the positions of some dimensions."""

from __future__ import annotations

from lightning_compress.discovery import axes
from lightning_compress.discovery.axes import Axis
from lightning_compress.discovery.rules.registry import Call, Dims, rule


def _reduced(dims: Dims, over: set[int], keep: bool) -> Dims:
    return [None if i in over else axis for i, axis in enumerate(dims) if keep or i not in over]


@rule("sum", "linalg_vector_norm", "norm")
def sum_(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """A sum reads its positions as a product with ones would.

    Silent positions may go. So does a norm of positive order.
    """
    dims = trace.dims(call.inputs[0])
    if call.name != "sum" and not call.get("ord", call.get("p", 2)) > 0:
        return reduce(trace, call)
    over = set(call.dims())
    for i in over:
        if dims:
            axes.mark(dims[i], "summed")
    return [_reduced(dims, over, call.outputs[0].dim() == len(dims) and len(dims) > 0)]


REDUCTIONS = "mean amax amin max min argmax argmin var std var_mean std_mean prod any all logsumexp median".split()


@rule(*REDUCTIONS)
def reduce(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Other reductions depend on how many positions there are, or on values that silent positions would have."""
    if "other" in call.named:  # max and min of two tensors are elementwise
        return [trace.broadcast(call.inputs, output.shape) for output in call.outputs]
    dims = trace.dims(call.inputs[0])
    over = set(call.dims())
    for i in over:
        if dims:
            trace.normalise(call, dims[i], f"it is reduced over by {call.name}")
    keep = call.outputs[0].dim() == len(dims) and len(dims) > 0
    return [_reduced(dims, over, keep) for _ in call.outputs]


@rule(
    "_softmax",
    "_log_softmax",
    "softmax",
    "log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
    "_cummax_helper",
    "_cummin_helper",
    "flip",
    "roll",
    "sort",
    "topk",
    "tril",
    "triu",
)
def along_dimension(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Operations whose result at a position depends on other positions of the same dimension."""
    source = call.inputs[0]
    dims = trace.dims(source)
    rank = len(dims)
    if call.name.startswith(("tril", "triu")):
        over = [rank - 2, rank - 1]
    elif call.name in ("flip", "roll"):
        over = call.dims("dims")
    else:
        over = [call.dim()] if "dim" in call.named else [rank - 1]
    reason = f"its positions depend on each other in {call.name.strip('_')}"
    for i in over:
        trace.pin_if_used(call, dims[i], reason)
    results = []
    for output in call.outputs:
        made = trace.pinned(output, reason)
        results.append([made[i] if output.shape[i] != source.shape[i] else axis for i, axis in enumerate(dims)])
    return results


@rule(
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def pad(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Dimensions that are padded stay whole, but for free ones that are padded with a constant.

    Those get further positions, all alike: shortcuts of residual networks are widened so.
    """
    source, output = call.inputs[0], call.outputs[0]
    dims = trace.dims(source)
    made = trace.pinned(output, "it is padded")
    amounts = list(call.get("pad", call.get("padding", [])))
    result: Dims = []
    for i, axis in enumerate(dims):
        place = 2 * (len(dims) - 1 - i)
        before, after = amounts[place : place + 2] if place < len(amounts) else (0, 0)
        if source.shape[i] == output.shape[i] and before == 0:
            result.append(axis)
        elif axis is None or call.name != "constant_pad_nd" or any(atom.reasons for atom in axes.atoms(axis)):
            axes.pin(axis, "it is padded")
            result.append(made[i])
        else:
            kept = axes.take(axis, max(0, -before), axis.size - max(0, -after))
            more = [Axis(count) if count > 0 else None for count in (before, after)]
            result.append(axes.concat([part for part in (more[0], kept, more[1]) if part is not None]))
    return [result]


SPATIAL = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
).split()


@rule(*SPATIAL)
def spatial(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Pooling and resizing act on the last one to three dimensions and leave batch and channel alone."""
    source = call.inputs[0]
    dims = trace.dims(source)
    extent = next(int(c) for c in call.name.replace("_with_indices", "") if c.isdigit())
    lead = len(dims) - extent
    for axis in dims[lead:]:
        axes.pin(axis, "it is a spatial dimension")
    return [[*dims[:lead], *trace.pinned(output, "it is a spatial dimension")[lead:]] for output in call.outputs]
