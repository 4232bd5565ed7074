"""Optimizer state follows its parameter: the same positions go, step counts and scalars stay.

State tensors are recognised by their shape, so that every optimizer whose state is elementwise or factored works
without being known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.slicing import AxisPositions, select


def state_axes(key: str, state: Tensor, shape: tuple[int, ...], kept: Mapping[int, Tensor]) -> AxisPositions | None:
    """The positions that stay on the axes of one state tensor, or None where its shape tells nothing.

    A state tensor may have the shape of the parameter (moments); that shape with ones in it, or without its last or its
    last but one axis (factored second moments, one value per row or column); or one element (step counts).

    Args:
        key: name of the state; "row" or "col" in it decides between the two factored forms of a square parameter.
        state: the state tensor.
        shape: shape of the parameter before anything was cut.
        kept: axis of the parameter -> positions that stay.
    """
    if state.numel() <= 1 and (state.dim() == 0 or tuple(state.shape) != shape):
        return {}
    if state.dim() == len(shape):
        if all(mine in (size, 1) for mine, size in zip(state.shape, shape, strict=True)):
            return {axis: positions for axis, positions in kept.items() if state.shape[axis] == shape[axis]}
        return None
    if state.dim() == len(shape) - 1:
        rank = len(shape)
        forms = {"row": tuple(range(rank - 1)), "col": (*range(rank - 2), rank - 1)}
        fitting = [name for name, axes in forms.items() if tuple(state.shape) == tuple(shape[a] for a in axes)]
        if len(fitting) > 1:
            fitting = [name for name in fitting if name in key.lower()]
        if len(fitting) == 1:
            return {new: kept[old] for new, old in enumerate(forms[fitting[0]]) if old in kept}
    return None


def check_optimizers(
    optimizers: Iterable[Any], tensors: Mapping[str, Tensor], kept: Mapping[str, AxisPositions]
) -> None:
    """Raise before anything is changed if the state of an optimizer could not follow.

    Args:
        optimizers: see ``cut_state``.
        tensors: see ``cut_state``.
        kept: see ``cut_state``.

    Raises:
        TypeError: for something that is not an optimizer.
        SurgeryError: for an optimizer that keeps one flat history of all parameters, or state of an unknown shape.
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"Expected optimizers to be torch.optim.Optimizer instances, but got {type(optimizer).__name__}."
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        touched = [name for name in kept if id(tensors[name]) in held]
        if touched and isinstance(optimizer, torch.optim.LBFGS):
            raise SurgeryError(
                f"Expected an optimizer with state per parameter, but got LBFGS for {touched[0]!r}: its history is one "
                "flat vector of all parameters and cannot be cut. Use another optimizer, or make a new LBFGS after "
                "the removal."
            )
        for name in touched:
            _cut_one(optimizer, name, tensors[name], tuple(tensors[name].shape), kept[name], dry=True)


def cut_state(
    optimizers: Iterable[Any],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, AxisPositions],
) -> None:
    """Cut the state of ``tensors`` in every optimizer.

    Args:
        optimizers: any number of them; a parameter may be in none.
        tensors: parameters by name, each once.
        shapes: their shapes before they were cut.
        kept: name -> axis -> positions that stay.
    """
    for optimizer in optimizers:
        for name, axes in kept.items():
            _cut_one(optimizer, name, tensors[name], shapes[name], axes, dry=False)


def check_leaving(optimizers: Iterable[Any], gone: Mapping[str, Tensor]) -> None:
    """Raise SurgeryError where parameters that go as a whole cannot leave an optimizer."""
    for optimizer in optimizers:
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        names = [name for name, tensor in gone.items() if id(tensor) in held]
        if names and isinstance(optimizer, torch.optim.LBFGS):
            raise SurgeryError(
                f"Expected an optimizer with state per parameter, but got LBFGS for {names[0]!r}: its history is one "
                "flat vector of all parameters and cannot be cut. Use another optimizer, or make a new LBFGS after "
                "the removal."
            )


def leave(optimizers: Iterable[Any], gone: Iterable[Tensor]) -> None:
    """Take parameters that go as a whole out of every group and state; a group may be left empty, but it stays.

    Schedulers and loggers know groups by their position.
    """
    identities = {id(tensor) for tensor in gone}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in identities]
        for parameter in [p for p in optimizer.state if id(p) in identities]:
            del optimizer.state[parameter]


def zero_state(optimizers: Iterable[Any], tensor: Tensor, removed: Mapping[int, Tensor]) -> None:
    """Set the state of the positions ``removed`` to zero wherever the state has the shape of the parameter."""
    for optimizer in optimizers:
        for value in optimizer.state.get(tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == tensor.shape and value.dim():
                for axis, positions in removed.items():
                    value.index_fill_(axis, positions.to(value.device), 0)


def _cut_one(
    optimizer: Any, name: str, tensor: Tensor, shape: tuple[int, ...], kept: Mapping[int, Tensor], *, dry: bool
) -> None:
    # ``state`` is a defaultdict: look before reading, or an empty entry appears
    if tensor not in optimizer.state:
        return
    state = optimizer.state[tensor]
    where = f"{type(optimizer).__name__} for {name!r}"

    def follow(key: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            axes = state_axes(key, value, shape, kept)
            if axes is None:
                raise SurgeryError(
                    f"Expected the state {key!r} of {where} to have the parameter's shape {shape}, that shape without "
                    f"an axis, or one element, but got {tuple(value.shape)}. Use another optimizer, or make a new one "
                    "after the removal."
                )
            return value if dry or not axes else select(value, axes)
        if type(value) in (list, tuple):
            return type(value)(follow(key, item) for item in value)
        return value

    for key, value in list(state.items()):
        new = follow(key, value)
        if not dry:
            state[key] = new
