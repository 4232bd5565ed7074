"""The scatter/gather shim: smaller weights behind an interface of the original width.

Where a forward cannot express a smaller shape (a literal in a view, one head size for queries, keys and values), the
weights can still shrink. A producer writes its kept units into zeros of the original width; a consumer reads its kept
units out of the original width:

    x -> small producer -> scatter -> [original width, zeros where units are gone] -> gather -> small consumer -> y

Both are forward hooks, instances of small classes, so that a model with shims can be copied and pickled. The positions
are non-persistent buffers, so that they follow the model to its device and stay out of its state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.structures import ShimEdit
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.slicing import tensor_at

Side = Literal["output", "input"]
BUFFERS: dict[Side, str] = {"output": "_scatter_positions", "input": "_gather_positions"}


@dataclass(eq=False)
class Shim:
    """What both hooks share.

    Args:
        width: width of the interface, in positions.
        dim: dimension of the module's output or input that carries the units.
        parameter: name in the module of the tensor whose axis faces the interface.
        axis: that axis.
        owners: structure name -> int64 of shape (width,), the unit that owns each position of the interface or -1, for
            structures that can go natively later and take interface positions with them.
    """

    width: int
    dim: int
    parameter: str
    axis: int
    owners: dict[str, Tensor] = field(default_factory=dict)


class ScatterOutput(Shim):
    """Forward hook: writes the module's output into zeros of the interface's width.

    Of a tuple the first tensor is meant (a quantized layer returns its scale, too).
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output at the interface's width."""
        if type(output) is tuple:
            place = next((i for i, value in enumerate(output) if isinstance(value, Tensor)), 0)
            return (*output[:place], self(module, args, output[place]), *output[place + 1 :])
        shape = list(output.shape)
        shape[self.dim] = self.width
        return output.new_zeros(shape).index_copy(self.dim, getattr(module, BUFFERS["output"]), output)


class GatherInput(Shim):
    """Forward pre-hook: keeps of the module's first tensor the positions that its weight still reads."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs, the first tensor among them narrowed."""
        positions = getattr(module, BUFFERS["input"])
        for number, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:number], value.index_select(self.dim, positions), *args[number + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, name: value.index_select(self.dim, positions)}
        raise TypeError(f"Expected a tensor among the inputs of {type(module).__name__}, but got none.")


def find_shim(module: nn.Module, side: Side) -> Shim | None:
    """The shim on this side ("output" or "input") of ``module``, if it has one."""
    hooks = module._forward_hooks if side == "output" else module._forward_pre_hooks
    kind = ScatterOutput if side == "output" else GatherInput
    return next((hook for hook in hooks.values() if isinstance(hook, kind)), None)


def shims_of(module: nn.Module) -> list[tuple[Side, Shim]]:
    """All shims of ``module`` with their side."""
    found = [(side, find_shim(module, side)) for side in BUFFERS]
    return [(side, shim) for side, shim in found if shim is not None]


def place_shim(
    module: nn.Module,
    edit: ShimEdit,
    *,
    parameter: str,
    axis: int,
    size: int,
    kept: Tensor,
    native: Mapping[str, tuple[Tensor, tuple[int, ...]]],
) -> None:
    """Put a shim on one side of ``module``, or bring the one it has up to date, after its weight was cut.

    Args:
        module: the module that owns the weight.
        edit: side and dimension; its path is used in messages.
        parameter: name of the weight in the module.
        axis: axis of the weight that faces the interface.
        size: length of that axis before this removal.
        kept: positions of that axis that stay, sorted, shape (count,).
        native: structures that give up interface positions: name -> (owner of each of the ``size`` positions or -1,
            kept units).

    Raises:
        SurgeryError: if a structure goes natively on an interface that was made without knowing of it.
    """
    old = find_shim(module, edit.side)
    if old is None:
        width, positions = size, torch.arange(size)
        owners = {name: owner for name, (owner, _) in native.items()}
    else:
        width, positions, owners = old.width, getattr(module, BUFFERS[edit.side]).cpu(), dict(old.owners)

    stays = torch.ones(width, dtype=torch.bool)
    for name, (owner, units) in native.items():
        if name not in owners:
            if torch.isin(owner[owner >= 0], torch.tensor(units)).all():
                continue
            raise SurgeryError(
                f"Expected {name!r} to be known to the {edit.side} shim of {edit.module!r} from the removal that made "
                "it, but it is not, so the width between the sliced weights cannot follow."
            )
        stays &= (owners[name] < 0) | torch.isin(owners[name], torch.tensor(units))
    moved = torch.cumsum(stays, 0) - 1
    new_owners = {}
    for name, owner in owners.items():
        owner = owner[stays]
        if name in native:  # units are numbered anew, in their old order
            owner = torch.where(owner < 0, owner, torch.searchsorted(torch.tensor(native[name][1]), owner))
        new_owners[name] = owner

    kind = ScatterOutput if edit.side == "output" else GatherInput
    hook = kind(int(stays.sum()), edit.dim, parameter, axis, new_owners)
    if old is None:
        if isinstance(hook, ScatterOutput):
            # first, so that hooks of the user's see the original width
            module.register_forward_hook(hook, prepend=True)
        else:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        hooks: dict[int, Any] = module._forward_hooks if edit.side == "output" else module._forward_pre_hooks
        key = next(key for key, value in hooks.items() if value is old)
        hooks[key] = hook
    weight = tensor_at(module, parameter)
    device = "cpu" if weight.is_meta else weight.device  # no state dict would bring lost positions back
    module.register_buffer(BUFFERS[edit.side], moved[positions[kept]].to(device), persistent=False)
