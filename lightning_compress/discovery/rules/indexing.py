"""Look-ups, gathers and scatters: indexed dimensions stay whole, the others pass through."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.discovery import axes
from lightning_compress.discovery.rules.registry import Call, Dims, NoRule, rule

REASON = "its positions are looked up by index"
MASKED = "its positions are chosen by a mask"


def _masked(call: Call) -> tuple[Tensor, int] | None:
    """The mask of x[..., mask] and the first dimension that it covers; None for integer indices."""
    given = [(place, i) for place, i in enumerate(call["indices"]) if i is not None]
    if not any(i.dtype in (torch.bool, torch.uint8) for _, i in given):
        return None
    if len(given) > 1:
        raise NoRule
    place, mask = given[0]
    return mask, place


@rule("embedding")
def embedding(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Rows of a table; the row axis stays, the width is made here."""
    table, index = call["weight"], call["indices"]
    rows, width = trace.dims(table)
    if len(trace.sources(table)) == 1:
        trace.look_up(table, rows, index, REASON)
    else:
        axes.pin(rows, REASON)
    trace.note(table, width, "producer")
    return [[*trace.dims(index), width]]


@rule("index")
def index(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """x[i, j, ...] with integer tensors, or with one mask."""
    dims = trace.dims(call.inputs[0])
    masked = _masked(call)
    if masked is not None:
        mask, first = masked
        for i, axis in enumerate(trace.dims(mask), start=first):
            axes.unify(dims[i], axis)
            axes.pin(dims[i], MASKED)
        chosen = trace.pinned(call.outputs[0], MASKED)[first]
        return [[*dims[:first], chosen, *dims[first + mask.dim() :]]]
    given = [*call["indices"], *[None] * (len(dims) - len(call["indices"]))]
    places = [position for position, i in enumerate(given) if i is not None]
    tensors = [given[position] for position in places]
    literal = len(places) == 1 and tensors[0].shape == (1,) and tensors[0].dtype == torch.long
    if literal and dims[places[0]] is not None and trace.is_constant(tensors[0]):
        (place,) = places  # x[..., [-2]] is x[..., -2:-1]
        chosen = axes.select(dims, place, int(tensors[0]) % call.inputs[0].shape[place])
        return [[*chosen[:place], None, *chosen[place:]]]
    for position in places:
        axes.pin(dims[position], REASON)
    looked_up = trace.broadcast(tensors, torch.broadcast_shapes(*[t.shape for t in tensors]))
    if places == list(range(places[0], places[-1] + 1)):
        return [[*dims[: places[0]], *looked_up, *dims[places[-1] + 1 :]]]
    return [[*looked_up, *[axis for position, axis in enumerate(dims) if position not in places]]]


@rule("index_select")
def index_select(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Rows of one dimension."""
    dims, dim = trace.dims(call.inputs[0]), call.dim()
    axes.pin(dims[dim], REASON)
    chosen = trace.dims(call["index"])
    dims[dim] = chosen[0] if chosen else None
    return [dims]


@rule("index_add")
def index_add(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Add rows at indexed places of one dimension."""
    dims, dim = trace.dims(call.inputs[0]), call.dim()
    source = trace.dims(call["source"])
    for i, (axis, other) in enumerate(zip(dims, source, strict=True)):
        if i == dim:
            axes.pin(axis, REASON)
            axes.pin(other, REASON)
        else:
            axes.unify(axis, other)
    return [[axis if axis is not None or i == dim else source[i] for i, axis in enumerate(dims)]]


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Write values at indexed places of the leading dimensions."""
    dims = trace.dims(call.inputs[0])
    given, values = call["indices"], trace.dims(call["values"])
    masked = _masked(call)
    if masked is not None:
        mask, first = masked
        covered, rest = dims[first : first + mask.dim()], dims[first + mask.dim() :]
        for axis, other in zip(covered, trace.dims(mask), strict=True):
            axes.unify(axis, other)
            if any(values):  # a single number is written to every element by itself
                axes.pin(axis, MASKED)
        for axis, other in zip(rest[::-1], values[::-1], strict=False):
            axes.unify(axis, other)
        for other in values[: max(0, len(values) - len(rest))]:
            axes.pin(other, MASKED)
        return [dims]
    places = [position for position, i in enumerate(given) if i is not None]
    if places != list(range(len(places))):
        raise NoRule
    for position in places:
        axes.pin(dims[position], REASON)
    rest = dims[len(places) :]
    for axis, other in zip(rest[::-1], values[::-1], strict=False):
        axes.unify(axis, other)
    for other in values[: max(0, len(values) - len(rest))]:
        axes.pin(other, REASON)
    return [dims]


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Write along one dimension, at a place of its own for every position of the others."""
    target, places, source = call["self"], call["index"], call.get("src")
    dims, dim = trace.dims(target), call.dim()
    others = [t for t in (places, source) if isinstance(t, Tensor)]
    result: Dims = []
    for i, axis in enumerate(dims):
        meeting = [trace.dims(t)[i] for t in others]
        if i == dim or any(t.shape[i] != target.shape[i] for t in others):
            for other in (axis, *meeting):
                axes.pin(other, REASON)
        else:
            for other in meeting:
                axes.unify(axis, other)
        result.append(axis)
    return [result]


@rule("gather")
def gather(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Look up along one dimension, at a place of its own for every position of the others."""
    source, places = call["self"], call["index"]
    dims, indexed, dim = trace.dims(source), trace.dims(places), call.dim()
    result: Dims = []
    for i, axis in enumerate(dims):
        if i == dim or source.shape[i] != places.shape[i]:
            axes.pin(axis, REASON)
            result.append(indexed[i])
        else:
            axes.unify(axis, indexed[i])
            result.append(axis if axis is not None else indexed[i])
    return [result]


@rule("nll_loss_forward", "nll_loss", "nll_loss2d_forward", "one_hot")
def class_loss(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Classes are looked up by their labels."""
    for tensor in call.inputs:
        for axis in trace.dims(tensor):
            axes.pin(axis, REASON)
    return [trace.pinned(output, REASON) for output in call.outputs]


@rule("masked_scatter")
def masked_scatter(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Rows of one tensor written where a mask says so: the masked dimensions stay whole, the rows keep theirs.

    That holds if the mask is the same at all positions of the last dimension, which is looked up in its values.
    """
    target, mask, source = call["self"], call["mask"], call["source"]
    if type(mask) is not Tensor or mask.is_meta or not mask.dim() == target.dim() > 0:
        raise NoRule
    rows = source.dim() > 0 and source.shape[-1] == target.shape[-1]
    if not rows or not torch.equal(mask, mask[..., :1].expand_as(mask)):
        raise NoRule
    dims, given, written = trace.dims(target), trace.dims(mask), trace.dims(source)
    axes.unify(dims[-1], written[-1])
    axes.unify(dims[-1], given[-1])
    for axis in (*dims[:-1], *given[:-1], *written[:-1]):
        axes.pin(axis, MASKED)
    return [dims]
