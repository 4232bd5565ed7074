"""Windows over an image: unfolding and folding, sampling at given places, and the reverse of pooling."""

from __future__ import annotations

from lightning_compress.discovery import axes
from lightning_compress.discovery.axes import Axis
from lightning_compress.discovery.rules.registry import Call, Dims, rule

SPATIAL = "it is a spatial dimension"
WINDOW = "it is a position in a window"


@rule("im2col")
def unfold(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """(..., C, H, W) -> (..., C * window, places): the channel is the outer factor."""
    *lead, channel, height, width = trace.dims(call.inputs[0])
    axes.pin(height, SPATIAL)
    axes.pin(width, SPATIAL)
    window = call.outputs[0].shape[-2] // call.inputs[0].shape[-3]
    inner = Axis(window, [WINDOW]) if window > 1 else None
    return [[*lead, axes.product([channel, inner]), trace.pinned(call.outputs[0], SPATIAL)[-1]]]


@rule("col2im")
def fold(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """(..., C * window, places) -> (..., C, H, W)."""
    *lead, packed, places = trace.dims(call.inputs[0])
    axes.pin(places, SPATIAL)
    channels = call.outputs[0].shape[-3]
    window = call.inputs[0].shape[-2] // channels
    channel = packed
    if packed is not None and window > 1:
        channel, inner = axes.split(packed, [channels, window]) if channels > 1 else (None, packed)
        axes.pin(inner, WINDOW)
    return [[*lead, channel, *trace.pinned(call.outputs[0], SPATIAL)[-2:]]]


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "max_unpool2d", "max_unpool3d")
def sample(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """(N, C, ...) at the places of a second tensor: batch and channel pass through."""
    source, places = call.inputs[0], call.inputs[1]
    dims, others = trace.dims(source), trace.dims(places)
    lead = len(dims) - (3 if call.name.endswith("3d") or source.dim() == 5 else 2)
    shared = lead if call.name.startswith("max_unpool") else 1  # a grid has no channels
    for axis in (*dims[lead:], *others[shared:]):
        axes.pin(axis, SPATIAL)
    for a, b in zip(dims[:shared], others[:shared], strict=True):
        axes.unify(a, b)
    return [[*dims[:lead], *trace.pinned(call.outputs[0], SPATIAL)[lead:]]]
