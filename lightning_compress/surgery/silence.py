"""Silencing units beyond zero weights: what the unpruned model has to compute for a removal to be exact.

Zeroing the weights that read a unit is not enough where something else depends on it being there: a normalisation takes
its statistics over it. Then the unpruned model is compared with that module leaving the unit out:

    masked(norm)(x) = scatter(norm with sliced weights(gather(x)))        zeros where units are gone
    passed(layer)(x) = x                                                  in the form of the layer's output
    masked(router)(x) = scores(x), -inf at removed experts                before any is chosen

The masks are hooks, instances of small classes, so that a masked model can be copied and trained: gradients reach the
full parameters. Callers put them on with ``silence`` and take them off with ``Silence.remove``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.structures import Normalisation, Passage
from lightning_compress.surgery.edits import Removal, kept_axes, module_edits
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.modules import PassBy
from lightning_compress.surgery.routing import RouterMask
from lightning_compress.surgery.slicing import AxisPositions, repair, resize_norm

BUFFER = "_unmasked_positions"


class NormMask:
    """Hooks of one module: it sees only the kept positions of its input, and its output is zero at the others.

    Args:
        dim: dimension of input and output that carries the units.
        own: name of a parameter or buffer of the module -> axis -> kept positions.
    """

    def __init__(self, dim: int, own: Mapping[str, AxisPositions]) -> None:
        self.dim = dim
        self.own = {name: dict(axes) for name, axes in own.items()}
        self._width = 0
        self._saved: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: narrow the first tensor among the inputs, and the module's own weights."""
        kept = getattr(module, BUFFER)
        self._saved = (dict(module._parameters), dict(module._buffers), dict(module.__dict__))
        for name, axes in self.own.items():
            tensors: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            tensor = tensors[name]
            for axis, positions in axes.items():
                tensor = tensor.index_select(axis, positions.to(tensor.device))
            tensors[name] = tensor
        repair(module)
        resize_norm(module, kept.numel())
        for number, value in enumerate(args):
            if isinstance(value, Tensor):
                self._width = value.shape[self.dim]
                return (*args[:number], value.index_select(self.dim, kept), *args[number + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                self._width = value.shape[self.dim]
                return args, {**kwargs, name: value.index_select(self.dim, kept)}
        raise TypeError(f"Expected a tensor among the inputs of {type(module).__name__}, but got none.")

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook, called after an exception too: give the module its weights back, widen its output."""
        if self._saved is not None:
            parameters, buffers, attributes = self._saved
            self._saved = None
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        if not isinstance(output, Tensor):
            return None
        shape = list(output.shape)
        shape[self.dim] = self._width
        return output.new_zeros(shape).index_copy(self.dim, getattr(module, BUFFER), output)


class Silence:
    """The masks that ``silence`` has put on a model; ``remove`` (or the end of a ``with`` block) takes them off."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._buffers: list[nn.Module] = []
        self._passed: list[nn.Module] = []
        self._values: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def mask_norm(self, module: nn.Module, dim: int, kept: Tensor, own: Mapping[str, AxisPositions]) -> None:
        """Let a normalisation leave positions out.

        Args:
            module: the module that takes the statistics.
            dim: dimension of its input and output that carries the units.
            kept: int64 of shape (count,), the positions that stay, sorted.
            own: name of a parameter or buffer of the module -> axis -> kept positions.
        """
        if BUFFER in module._buffers:
            raise SurgeryError(
                f"Expected {type(module).__name__} to be masked once, but it has a mask. Take it off first: remove()."
            )
        mask = NormMask(dim, own)
        device = next((t.device for t in module.parameters()), kept.device)
        module.register_buffer(BUFFER, kept.to(device), persistent=False)
        self._buffers.append(module)
        self._handles.append(module.register_forward_pre_hook(mask.before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(mask.after, prepend=True, always_call=True))

    def pass_by(self, module: nn.Module, passage: Passage) -> None:
        """Let a module return its inputs; nothing in it is called."""
        if "forward" in vars(module):
            raise SurgeryError(
                f"Expected {type(module).__name__} to have the forward of its class, but it has one of its own (it is "
                "passed by already, or wrapped), so it cannot be passed by. Take that off first: remove()."
            )
        module.forward = PassBy(passage)
        self._passed.append(module)

    def mask_router(self, module: nn.Module, parameter: str, removed: Tensor) -> None:
        """Let a router give -inf to removed experts; ``parameter`` is the name of its weight in ``module``."""
        mask = RouterMask(parameter, removed)
        self._handles.append(module.register_forward_pre_hook(mask.before))
        self._handles.append(module.register_forward_hook(mask.after, prepend=True, always_call=True))

    def zero(self, tensor: Tensor, axis: int, positions: Tensor) -> None:
        """Set positions of a tensor to zero until the masks are taken off."""
        positions = positions.to(tensor.device)
        with torch.no_grad():
            self._values.append((tensor, axis, positions, tensor.index_select(axis, positions)))
            tensor.index_fill_(axis, positions, 0)

    def remove(self) -> None:
        """Take all masks off."""
        with torch.no_grad():
            for tensor, axis, positions, values in reversed(self._values):
                tensor.index_copy_(axis, positions, values)
        for module in self._passed:
            vars(module).pop("forward", None)
        self._values.clear()
        self._passed.clear()
        for handle in self._handles:
            handle.remove()
        for module in self._buffers:
            module._buffers.pop(BUFFER, None)
            module._non_persistent_buffers_set.discard(BUFFER)
        self._handles.clear()
        self._buffers.clear()

    def __enter__(self) -> Silence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def silence(modules: Mapping[str, nn.Module], removals: Iterable[Removal]) -> Silence:
    """Put the masks on that the removed units of ``removals`` need beside zero weights; usable as a context.

    Args:
        modules: modules of the unpruned model by path.
        removals: what goes.

    Raises:
        SurgeryError: if a module of a structure is missing or already masked.
    """
    removals = [removal for removal in removals if removal.removed]
    kept = kept_axes(removals)
    masks = Silence()
    try:
        for place, positions in _norms(removals).items():
            if place.module not in modules:
                raise SurgeryError(f"Expected the model to have a module {place.module!r}, but it has none.")
            prefix = f"{place.module}." if place.module else ""
            own = {
                name.removeprefix(prefix): axes
                for name, axes in kept.items()
                if name.startswith(prefix) and "." not in name.removeprefix(prefix)
            }
            masks.mask_norm(modules[place.module], place.dim, positions, own)
        for edit in module_edits(removals):
            if edit.passage is not None:
                if edit.module not in modules:
                    raise SurgeryError(f"Expected the model to have a module {edit.module!r}, but it has none.")
                masks.pass_by(modules[edit.module], edit.passage)
        for removal in removals:
            if removal.structure.kind == "expert":
                _mask_router(masks, modules, removal)
    except BaseException:
        masks.remove()
        raise
    return masks


def _mask_router(masks: Silence, modules: Mapping[str, nn.Module], removal: Removal) -> None:
    for piece in removal.structure.slices:
        path, _, name = piece.parameter.rpartition(".")
        owner = modules.get(path)
        weight = None if owner is None else owner._parameters.get(name)
        if piece.zero and owner is not None and weight is not None and weight.dim() == 2:
            masks.mask_router(owner, name, torch.tensor(removal.removed, dtype=torch.long))


def _norms(removals: Iterable[Removal]) -> dict[Normalisation, Tensor]:
    """The normalisations of all removals, with the positions that stay."""
    result: dict[Normalisation, Tensor] = {}
    for removal in removals:
        for place in removal.structure.norms:
            result[place] = torch.tensor(removal.kept, dtype=torch.long)
    return result


__all__ = ["NormMask", "Silence", "silence"]
