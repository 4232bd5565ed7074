"""Averaged copies of the module that training runs on: they lose the same units, or averaging could not go on.

Averages are linear in the weights, so the average of the small models is the average of the large ones, cut:

    average(w_1, ..., w_t)[kept] = average(w_1[kept], ..., w_t[kept])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.compiled import eager
from lightning_compress.callbacks.example import ExampleCall
from lightning_compress.callbacks.session import traced_module
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import named_tensors
from lightning_compress.surgery import SurgeryError, SurgeryReport, apply_plan


@dataclass(frozen=True)
class AveragedCopy:
    """An averaged copy of the module that is compressed.

    Args:
        owner: who averages, for messages.
        module: the copy.
    """

    owner: str
    module: nn.Module

    def remove(self, plan: PruningPlan, example: ExampleCall) -> SurgeryReport:
        """Remove from the copy what was removed from its original, by the same ways, and verify it with the example."""
        device = next((tensor.device for tensor in named_tensors(self.module).values()), torch.device("cpu"))
        verify = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (example.args, example.kwargs))
        try:
            with eager(self.module):
                return apply_plan(self.module, plan, verify=verify)
        except SurgeryError as error:
            raise SurgeryError(f"In the averaged weights of {self.owner}: {error}") from error


def averaged_copies(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> list[AveragedCopy]:
    """Every averaged copy of the sub-module ``name``, in the callbacks of a trainer and in the LightningModule itself.

    Found by what they are: ``torch.optim.swa_utils.AveragedModel``, and what Lightning's StochasticWeightAveraging
    keeps. Other copies, a teacher for instance, are none of this module's business.

    Raises:
        ValueError: if only a part of the sub-module is averaged.
    """
    copies: dict[int, AveragedCopy] = {}
    for owner, root in _roots(trainer, pl_module):
        path = "" if type(root) is type(pl_module) else _path_of_original(pl_module, root, name)
        if path is None:
            continue  # of something else
        if not path or path == name or name.startswith(f"{path}."):
            module = traced_module(root, name.removeprefix(path).removeprefix("."))
            copies.setdefault(id(module), AveragedCopy(owner, module))
        elif not name or path.startswith(f"{name}."):
            raise ValueError(
                f"Expected averaged weights of all of {name or type(pl_module).__name__!r}, the module that is "
                f"compressed, but {owner} averages its part {path!r} alone, and a removal cannot be verified there. "
                f"Average all of it, or compress that part alone: module={path!r}."
            )
    return list(copies.values())


def take_integers_over(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let averages of buffers take integers over from the model as they are.

    A function for averages gives 6.9999995 for the average of 7 and 7, which an integer buffer holds as 6; positions,
    also those of a shim, and counts would be wrong.
    """
    for _, averaged in _averaged_models(trainer, pl_module):
        if averaged.avg_fn is not None and not isinstance(averaged.avg_fn, _OfFloats):
            averaged.avg_fn = _OfFloats(averaged.avg_fn)
        if averaged.multi_avg_fn is not None and not isinstance(averaged.multi_avg_fn, _OfListsOfFloats):
            averaged.multi_avg_fn = _OfListsOfFloats(averaged.multi_avg_fn)


@dataclass(frozen=True)
class _OfFloats:
    average: Callable[..., Any]

    def __call__(self, averaged: Tensor, current: Tensor, count: Any) -> Any:
        return self.average(averaged, current, count) if _is_averaged(averaged) else current


@dataclass(frozen=True)
class _OfListsOfFloats:
    average: Callable[..., Any]

    def __call__(self, averaged: Any, current: Any, count: Any) -> None:
        if _is_averaged(averaged[0]):  # the tensors of a list have one type
            self.average(averaged, current, count)
            return
        for one, other in zip(averaged, current, strict=True):
            one.copy_(other)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _averaged_models(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[tuple[str, AveragedModel]]:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        yield from ((type(callback).__name__, v) for v in vars(callback).values() if isinstance(v, AveragedModel))
    yield from ((f"{n!r}", module) for n, module in pl_module.named_modules() if isinstance(module, AveragedModel))


def _roots(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[tuple[str, nn.Module]]:
    yield from ((owner, averaged.module) for owner, averaged in _averaged_models(trainer, pl_module))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, StochasticWeightAveraging) and average is not None:
            yield type(callback).__name__, average


def _path_of_original(pl_module: pl.LightningModule, copy: nn.Module, name: str) -> str | None:
    """Path of the module that ``copy`` is a copy of; of several that it may be, the one that is compressed."""
    inside = tuple(f"{path}." for path, module in pl_module.named_modules() if isinstance(module, AveragedModel))
    shapes = _shapes(copy)
    found = [
        path
        for path, module in pl_module.named_modules()
        if type(module) is type(copy) and not path.startswith(inside) and _shapes(module) == shapes
    ]
    return name if name in found else next(iter(found), None)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}


__all__ = ["AveragedCopy", "averaged_copies", "take_integers_over"]
