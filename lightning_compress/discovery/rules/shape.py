"""Operations that move, view, join and cut dimensions without computing anything."""

from __future__ import annotations

import contextlib

from torch import Tensor

from lightning_compress.discovery import axes, reshape
from lightning_compress.discovery.axes import Axis, AxisMismatch
from lightning_compress.discovery.rules.registry import Call, Dims, NoRule, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_view_copy", "view_copy", "_reshape_copy")
def view(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Split and flatten dimensions."""
    source, output = call.inputs[0], call.outputs[0]
    if source.numel() == 0 or source.dtype != output.dtype:
        raise NoRule
    return [reshape.view(trace.dims(source), source.shape, output.shape)]


@rule("t")
def t(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Transpose of a matrix."""
    return [trace.dims(call.inputs[0])[::-1]]


@rule("transpose")
def transpose(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Swap two dimensions."""
    dims = trace.dims(call.inputs[0])
    first, second = call.dim("dim0"), call.dim("dim1")
    dims[first], dims[second] = dims[second], dims[first]
    return [dims]


@rule("permute")
def permute(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Reorder dimensions."""
    dims = trace.dims(call.inputs[0])
    return [[dims[i] for i in call.dims("dims")]]


@rule("unsqueeze")
def unsqueeze(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Insert a dimension of size 1."""
    dims = trace.dims(call.inputs[0])
    position = call.dim(rank=len(dims) + 1)
    return [[*dims[:position], None, *dims[position:]]]


@rule("squeeze")
def squeeze(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Drop dimensions of size 1."""
    dims = trace.dims(call.inputs[0])
    drop = {i for i in call.dims(rank=len(dims)) if dims[i] is None}
    return [[axis for i, axis in enumerate(dims) if i not in drop]]


@rule("expand")
def expand(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Repeat dimensions of size 1.

    All positions of the new axis are alike, so it is free (grouped-query heads come out of this).
    """
    source, output = call.inputs[0], call.outputs[0]
    dims = trace.dims(source)
    offset = output.dim() - source.dim()
    result: Dims = []
    for i, size in enumerate(output.shape):
        axis = dims[i - offset] if i >= offset else None
        result.append(axis if axis is not None or size == 1 else Axis(size))
    return [result]


@rule("repeat")
def repeat(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Tile: copies lie one after the other, so the copy is the outer factor."""
    source, output = call.inputs[0], call.outputs[0]
    dims = trace.dims(source)
    times = list(call["repeats"])
    offset = len(times) - source.dim()
    result: Dims = []
    for i, count in enumerate(times):
        axis = dims[i - offset] if i >= offset else None
        result.append(axis if count == 1 else axes.product([Axis(count), axis]))
    assert len(result) == output.dim()
    return [result]


def _cut(dims: Dims, dim: int, start: int, stop: int) -> Dims:
    """Dimensions of a contiguous slice that is not the whole dimension."""
    axis = dims[dim]
    if axis is None:
        return list(dims)
    if stop - start == 1:  # the same as select, with the dimension kept
        chosen = axes.select(dims, dim, start)
        return [*chosen[:dim], None, *chosen[dim:]]
    result = list(dims)
    try:
        result[dim] = axes.take(axis, start, stop)
    except AxisMismatch as mismatch:
        reason = f"it is cut in another way than it is made of: {mismatch}"
        axes.pin(axis, reason)
        result[dim] = Axis(stop - start, (reason,))
    return result


@rule("slice")
def slice_(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """x[..., start:stop:step]."""
    source, output = call.inputs[0], call.outputs[0]
    dims, dim = trace.dims(source), call.dim()
    size, length = source.shape[dim], output.shape[dim]
    start = int(call.get("start", 0))
    start = min(max(start + size if start < 0 else start, 0), size)
    step = int(call.get("step", 1))
    axis = dims[dim]
    if length == size:
        return [dims]
    if length == 0:  # nothing of it is read: rotary code takes such slices where all of a head rotates
        dims[dim] = Axis(0, ["it is an empty slice"])
        return [dims]
    assert axis is not None
    if step == 1:
        return [_cut(dims, dim, start, start + length)]
    if size % step == 0 and length == size // step:
        with contextlib.suppress(AxisMismatch):
            outer, inner = axes.split(axis, [length, step]) if length > 1 else (None, axis)
            axes.pin(inner, f"every {step}th position of it is taken")
            dims[dim] = outer
            return [dims]
    axes.pin(axis, f"every {step}th position of it is taken")
    dims[dim] = None if length == 1 else Axis(length, ["it is a strided slice"])
    return [dims]


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
    "tensor_split",
    "split_copy",
)
def split(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Cut a dimension into contiguous pieces."""
    dims, dim = trace.dims(call.inputs[0]), call.dim()
    offset, result = 0, []
    for output in call.outputs:
        size = output.shape[dim]
        if size == call.inputs[0].shape[dim]:
            result.append(list(dims))
        else:
            result.append(_cut(dims, dim, offset, offset + size))
        offset += size
    return result


@rule("select")
def select(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """x[..., index]."""
    source = call.inputs[0]
    dim = call.dim()
    index = int(call["index"])
    return [axes.select(trace.dims(source), dim, index % source.shape[dim])]


@rule("unbind")
def unbind(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """All x[..., index] at once."""
    dims, dim = trace.dims(call.inputs[0]), call.dim()
    return [axes.select(dims, dim, index) for index in range(len(call.outputs))]


@rule("cat", "_cat")
def cat(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Join tensors along a dimension."""
    tensors: list[Tensor] = [t for t in call["tensors"] if t.shape != (0,)]
    rank = call.outputs[0].dim()
    dim = call.dim(rank=rank)
    dims = [trace.dims(t) for t in tensors]
    result: Dims = []
    for i in range(rank):
        if i == dim:
            pieces = [
                d[i] if d[i] is not None else Axis(1, ["it is a single position joined to others"])
                for d, t in zip(dims, tensors, strict=True)
                if t.shape[i] > 0
            ]
            result.append(axes.concat([p for p in pieces if p is not None]))
        else:
            for d in dims[1:]:
                axes.unify(dims[0][i], d[i])
            result.append(next((d[i] for d in dims if d[i] is not None), None))
    return [result]


@rule("stack")
def stack(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Join tensors along a new dimension."""
    tensors: list[Tensor] = list(call["tensors"])
    dim = call.dim(rank=call.outputs[0].dim())
    dims = trace.broadcast(tensors, tensors[0].shape)
    new = None if len(tensors) == 1 else Axis(len(tensors), ["it is made by stacking tensors"])
    return [[*dims[:dim], new, *dims[dim:]]]


@rule("glu")
def glu(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """a * sigmoid(b) for the halves a, b of a dimension: both make the unit."""
    source = call.inputs[0]
    dims, dim = trace.dims(source), call.dim()
    half = source.shape[dim] // 2
    first, second = _cut(dims, dim, 0, half), _cut(dims, dim, half, 2 * half)
    axes.unify(first[dim], second[dim])
    return [first]


@rule("unfold")
def unfold(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Sliding windows over a dimension."""
    source, output = call.inputs[0], call.outputs[0]
    dims = trace.dims(source)
    dim = call.dim("dimension")
    axes.pin(dims[dim], "windows slide over it")
    made = trace.pinned(output, "windows slide over it")
    dims[dim] = made[dim]
    return [[*dims, made[-1]]]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Channels (groups, channels of a group) become (channels of a group, groups)."""
    dims, groups = trace.dims(call.inputs[0]), int(call["groups"])
    channel = dims[1]
    if channel is not None and 1 < groups < channel.size:
        outer, inner = axes.split(channel, [groups, channel.size // groups])
        dims[1] = axes.product([inner, outer])
    return [dims]


@rule("as_strided")
def as_strided(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """A view by strides, overlapping windows often: dimensions that it leaves as they are pass through.

    A dimension passes if it keeps size and stride and no other one steps into it: it lies inside every other step, or
    beyond all of them together.
    """
    source, output = call.inputs[0], call.outputs[0]
    if output.storage_offset() != source.storage_offset():
        raise NoRule
    dims, reason = trace.dims(source), "it is viewed by strides"
    extents = [(s, t) for s, t in zip(source.shape, source.stride(), strict=True)]
    places = {extent: i for i, extent in enumerate(extents) if extent[0] > 1}
    matched = {i: places.get(e) for i, e in enumerate(zip(output.shape, output.stride(), strict=True)) if e[0] > 1}
    while True:
        others = [(output.shape[i], output.stride(i)) for i, j in matched.items() if j is None]
        reach = sum((size - 1) * stride for size, stride in others)
        touched = [
            i
            for i, j in matched.items()
            if j is not None
            and not extents[j][1] > reach
            and any(stride % (extents[j][0] * extents[j][1]) for _, stride in others)
        ]
        if not touched:
            break
        matched.update(dict.fromkeys(touched))
    passed = {j for j in matched.values() if j is not None}
    for j, axis in enumerate(dims):
        if j not in passed:
            axes.pin(axis, reason)
    made = trace.pinned(output, reason)
    for i, place in matched.items():
        if place is not None:
            made[i] = dims[place]
    return [made]


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Blocks of r * r channels become pixels, or the reverse."""
    source, output = call.inputs[0], call.outputs[0]
    dims = trace.dims(source)
    made = trace.pinned(output, "it is a spatial dimension")
    wide, narrow = max(source.shape[-3], output.shape[-3]), min(source.shape[-3], output.shape[-3])
    block = wide // narrow
    if block > 1 and narrow > 1:
        if source.shape[-3] == wide:
            axis = dims[-3]
            assert axis is not None
            outer, inner = axes.split(axis, [narrow, block])
            axes.pin(inner, "its positions become pixels")
            made[-3] = outer
        else:
            made[-3] = axes.product([dims[-3], Axis(block, ["pixels become its positions"])])
    else:
        axes.pin(dims[-3], "its positions become pixels")
    made[:-3] = dims[:-3]
    for axis in dims[-2:]:
        axes.pin(axis, "it is a spatial dimension")
    return [made]
