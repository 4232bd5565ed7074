"""Normalisations: statistics over an axis tie all its positions together."""

from __future__ import annotations

from torch import Tensor

from lightning_compress.discovery import axes
from lightning_compress.discovery.rules.registry import Call, Dims, rule


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Statistics over the last dimensions: they cannot lose positions without changing mean and variance."""
    dims = trace.dims(call.inputs[0])
    count = len(call["normalized_shape"])
    for key in ("weight", "bias"):
        parameter = call.named.get(key)
        if isinstance(parameter, Tensor):
            for own, axis in zip(trace.dims(parameter), dims[-count:], strict=True):
                axes.unify(own, axis)
    for axis in dims[-count:]:
        trace.normalise(call, axis, "it is normalised over")
    statistics = [*dims[:-count], *[None] * count]
    return [dims, *[list(statistics) for _ in call.outputs[1:]]]


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
)
def batch_norm(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Statistics per channel: channels stay independent, weight, bias and running statistics travel along."""
    dims = trace.dims(call.inputs[0])
    channel = dims[1]
    for tensor in call.inputs[1:]:
        if tensor.dim() == 1:
            axes.unify(trace.dims(tensor)[0], channel)
    others = []
    for output in call.outputs[1:]:
        per_channel = channel is not None and tuple(output.shape) == (channel.size,)
        others.append([channel] if per_channel else trace.pinned(output, "it belongs to batch statistics"))
    return [dims, *others]


@rule("native_group_norm", "group_norm")
def group_norm(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Statistics per group of channels: whole groups are independent, channels inside one are not."""
    source = call.inputs[0]
    dims = trace.dims(source)
    channel = dims[1]
    for key in ("weight", "bias"):
        parameter = call.named.get(key)
        if isinstance(parameter, Tensor):
            axes.unify(trace.dims(parameter)[0], channel)
    groups = int(call.get("group", call.get("num_groups", 1)))
    if channel is not None and groups != channel.size:
        if groups == 1:
            trace.normalise(call, channel, "it is normalised over")
        else:
            _, inner = axes.split(channel, [groups, channel.size // groups])  # the first factor stays free
            axes.pin(inner, "it is normalised over")
    return [dims, *[trace.pinned(output, "it belongs to group statistics") for output in call.outputs[1:]]]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """weight = g * v / ||v||, one norm per position of ``dim``.

    A position of ``dim`` is silent where g is zero; v must not be, or the norm would vanish. Positions of the other
    axes are silent where v is zero: then they have no part in the norm.
    """
    direction, magnitude = call.inputs[0], call.inputs[1]
    dims, scale = trace.dims(direction), trace.dims(magnitude)
    dim = call.dim()
    for i, axis in enumerate(dims):
        if i == dim:
            trace.note(direction, axis, "direction")
            axes.unify(axis, scale[i] if len(scale) == len(dims) else next((s for s in scale if s is not None), None))
        else:
            trace.note(direction, axis, "normed")
    norms: Dims = [axis if i == dim else None for i, axis in enumerate(dims)]
    return [dims, *[norms if output.dim() == len(dims) else [dims[dim]] for output in call.outputs[1:]]]
