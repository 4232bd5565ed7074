"""Cutting positions out of tensors, and the size attributes of torch's own layers.

Parameters keep their identity: only ``parameter.data`` is exchanged, so that an optimizer's groups, tied names and
references held elsewhere stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan
from lightning_compress.surgery.errors import SurgeryError

AxisPositions = dict[int, Tensor]


def kept_by_parameter(plan: PruningPlan) -> dict[str, AxisPositions]:
    """parameter -> axis -> positions that stay, for every axis that loses at least one."""
    kept: dict[str, AxisPositions] = {}
    for (parameter, axis), positions in plan.kept_positions().items():
        kept.setdefault(parameter, {})[axis] = positions
    return kept


def select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """``tensor`` with only the positions ``kept[axis]`` on each of these axes, in a storage of its own.

    The memory format of convolution weights (channels last) is preserved.
    """
    result = tensor.detach()
    for axis, positions in kept.items():
        result = result.index_select(axis, positions.to(tensor.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        result = result.contiguous(memory_format=torch.channels_last)
    return result


def cut(tensor: Tensor, kept: Mapping[int, Tensor], *, gradient: bool = True) -> None:
    """Exchange the data (and the gradient) of a parameter or buffer for the kept positions; the object stays."""
    old = tensor.grad if gradient and tensor.is_leaf else None
    if old is not None:
        tensor.grad = None  # a gradient must have the shape of its tensor at every moment
    tensor.data = select(tensor.data, kept)
    if old is not None:
        tensor.grad = select(old, kept)


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer of ``module`` at a dotted path."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    assert isinstance(found, Tensor)
    return found


def owners_of(modules: Mapping[str, nn.Module], tensors: Iterable[Tensor]) -> list[tuple[str, nn.Module]]:
    """Every one of ``modules`` that holds one of ``tensors`` itself, with its path; a shared tensor has several."""
    wanted = {id(tensor) for tensor in tensors}
    found = []
    for path, module in modules.items():
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(id(tensor) in wanted for tensor in own if tensor is not None):
            found.append((path, module))
    return found


# Size attributes of torch's layers, read back from the weights


def refresh(module: nn.Module) -> None:
    """Recompute weights that a hook of torch.nn.utils (weight_norm, spectral_norm, a mask) sets before every call."""
    hook: Any
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils"):
            if hasattr(hook, "apply_mask"):
                weight = hook.apply_mask(module)
            elif "do_power_iteration" in signature(hook.compute_weight).parameters:
                weight = hook.compute_weight(module, do_power_iteration=False)
            else:
                weight = hook.compute_weight(module)
            setattr(module, getattr(hook, "_tensor_name", None) or hook.name, weight)


def _linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(module: nn.Bilinear) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _convolution(module: nn.modules.conv._ConvNd, kept: Mapping[int, Tensor] | None) -> None:
    # a weight is (out, in / groups, ...), transposed (in, out / groups, ...)
    major, minor = module.weight.shape[:2]
    old = module.in_channels if module.transposed else module.out_channels
    if kept is None and minor == 1 and module.groups > 1 and major % max(1, old // module.groups) == 0:
        module.groups = major // (old // module.groups)  # depthwise: a channel is a group
    elif kept and 0 in kept and module.groups > 1:
        per_group = torch.bincount(kept[0] // (old // module.groups), minlength=module.groups)
        left = per_group[per_group > 0]
        if left.numel() and bool((left != left[0]).any()):
            raise SurgeryError(
                f"Expected the groups of a convolution to keep equally many channels each, but got {left.tolist()}. "
                "Keep the same channels in every group, or remove whole groups."
            )
        module.groups = left.numel()
    if module.transposed:
        module.in_channels, module.out_channels = major, minor * module.groups
    else:
        module.out_channels, module.in_channels = major, minor * module.groups


def _batch_norm(module: nn.modules.batchnorm._NormBase) -> None:
    reference = module.weight if module.weight is not None else module.running_mean
    if reference is not None:
        module.num_features = reference.shape[0]


def _group_norm(module: nn.GroupNorm) -> None:
    if module.weight is not None:
        size = module.num_channels // module.num_groups
        module.num_channels = module.weight.shape[0]
        if module.num_channels % size == 0:
            module.num_groups = module.num_channels // size  # whole groups go


def _normalized_shape(module: nn.LayerNorm | nn.RMSNorm) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _embedding(module: nn.Embedding | nn.EmbeddingBag) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _recurrent(module: nn.RNNBase) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    rows, module.input_size = tensor_at(module, "weight_ih_l0").shape
    module.hidden_size = rows // gates
    if module.proj_size:
        module.proj_size = tensor_at(module, "weight_hr_l0").shape[0]
    module.flatten_parameters()


def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = module.weight.shape[0]


REPAIRS: tuple[tuple[type[nn.Module], Callable[..., None]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _normalized_shape),
    (nn.RMSNorm, _normalized_shape),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.RNNBase, _recurrent),
    (nn.PReLU, _prelu),
)


def repair(module: nn.Module, kept: Mapping[int, Tensor] | None = None) -> None:
    """Set the size attributes of a layer of torch (or of a subclass of one) from its weights; others are left alone.

    Args:
        module: the layer, after its tensors were cut.
        kept: axis -> positions that its weight has kept, where known: they tell whole groups of a convolution from
            channels inside groups.
    """
    refresh(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        _convolution(module, kept)
        return
    for kind, function in REPAIRS:
        if isinstance(module, kind):
            function(module)
            return


def resize_norm(module: nn.Module, count: int) -> None:
    """Set the size of a norm of torch that has no weight to read it from; others are left alone."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is None:
        module.normalized_shape = (count,)
    elif isinstance(module, nn.GroupNorm) and module.weight is None:
        module.num_channels = count


def is_torch_layer(module: nn.Module) -> bool:
    """Whether ``module`` is exactly a layer of torch, whose attributes ``repair`` knows completely."""
    return type(module).__module__.startswith("torch.nn.")
