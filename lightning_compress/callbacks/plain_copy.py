"""A sharded module as an ordinary one: gathered parameter by parameter into the memory of process 0."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.shards import is_spread, whole

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_sharded(module: nn.Module) -> bool:
    """Whether the module or a part of it has been given to ``fully_shard``."""
    return any(is_spread(p) for p in module.parameters()) or any(_is_wrapper(type(m)) for m in module.modules())


def reshard(module: nn.Module) -> None:
    """Let the modules have their sharded parameters, those of the optimizer: after a forward pass some are whole."""
    for part in module.modules():
        if _is_wrapper(type(part)):
            free: Any = part
            free.reshard()


def plain_copy(module: nn.Module, keep: bool) -> nn.Module | None:
    """A copy of ``module`` on the CPU with whole parameters, of the classes that its parts had before ``fully_shard``.

    Parameters are gathered one after the other, so that a device holds one of them whole at a time. All processes call
    this together.

    Args:
        module: the module.
        keep: whether this process wants the copy.

    Returns:
        The copy; None without ``keep``.
    """
    reshard(module)
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        values = whole(parameter)
        if keep:
            if any(base.__name__ == "DTensor" for base in type(values).__mro__):
                raise ValueError(f"Expected {name!r} to be whole once it is gathered, but it is still sharded.")
            memo[id(parameter)] = nn.Parameter(_on_cpu(values), requires_grad=parameter.requires_grad)
        del values
    return _copied(module, memo) if keep else None


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    parts = list(module.modules())
    twins: list[tuple[nn.Module, nn.Module]] = []
    for part in parts:
        kind: Any = _plain_class(type(part))
        if not hasattr(kind, "__deepcopy__"):
            twin = kind.__new__(kind)
            memo[id(part)] = twin
            twins.append((part, twin))
        for value in pytree.tree_leaves(list(vars(part).values())):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _on_cpu(value)
            elif _of_torch_distributed(value):
                memo[id(value)] = value  # a mesh, a process group
    for part, twin in twins:
        state = part.__reduce_ex__(4)[2]  # what its class wants to be copied
        assert isinstance(state, dict)
        twin.__setstate__(copy.deepcopy(_without_wrapper(state), memo))
    result: nn.Module = copy.deepcopy(module, memo)
    return result


def _on_cpu(tensor: Tensor) -> Tensor:
    moved = tensor.detach().cpu()
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def _without_wrapper(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without those that sharding has added."""
    kept = {}
    for name, value in state.items():
        if name in _MARKS:
            continue
        if name in _HOOKS:
            value = type(value)((k, hook) for k, hook in value.items() if not _of_torch_distributed(hook))
        elif isinstance(value, dict) and value and all(_of_torch_distributed(item) for item in value.values()):
            continue  # what fully_shard knows of the module
        kept[name] = value
    return kept


def _of_torch_distributed(value: Any) -> bool:
    """Whether an object, or a function, was made by torch.distributed."""
    for kind in (type(value), value):
        home = getattr(kind, "__module__", None)
        if isinstance(home, str) and (home.startswith("torch.distributed") or home == "torch._C._distributed_c10d"):
            return not isinstance(value, Tensor | nn.Module)
    return False


def _is_wrapper(kind: type) -> bool:
    return any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.") for base in kind.__mro__)


def _plain_class(kind: type) -> type[Any]:
    """The class that a module had before ``fully_shard`` put one of its own in front."""
    while _is_wrapper(kind):
        kind = next(base for base in kind.__bases__ if not _is_pure_wrapper(base))
    return kind


def _is_pure_wrapper(kind: type) -> bool:
    return _is_wrapper(kind) and not issubclass(kind, nn.Module)


__all__ = ["is_sharded", "plain_copy", "reshard"]
