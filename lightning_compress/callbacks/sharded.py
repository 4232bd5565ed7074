"""Sharded modules (``fully_shard``): what can be done with them in a fit, and the removal at its end.

The parameters of a sharded module cannot change their shape while it is trained. So a fit only drives units to zero in
the shards; what is removed is removed from a copy, gathered into the memory of process 0, verified and saved there:

    shards --gather--> dense copy, CPU of process 0 --apply_plan--> small model --save_compressed--> folder
       +---- the same units set to zero: computes what the small model does
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_compress.callbacks.example import smallest_example
from lightning_compress.callbacks.plain_copy import is_sharded, plain_copy, reshard
from lightning_compress.callbacks.removal import make_report
from lightning_compress.callbacks.session import CompressionSession
from lightning_compress.plan import PruningPlan
from lightning_compress.report import CompressionReport, count_parameters, file_size
from lightning_compress.saving import save_compressed
from lightning_compress.shards import zero_positions
from lightning_compress.structures import EXACT_KINDS, named_tensors
from lightning_compress.surgery import SurgeryReport, apply_plan
from lightning_compress.surgery.edits import Removal, outside, zeroed_axes

if TYPE_CHECKING:
    from lightning_compress.callbacks.finalize_compression import FinalizeCompression
    from lightning_compress.callbacks.structured_sparsity import StructuredSparsity

FOLDER = "compressed"


def check_sparsity(sparsity: StructuredSparsity, session: CompressionSession) -> None:
    """Raise ValueError if units cannot be driven to zero in shards as ``sparsity`` asks for."""
    settings = sparsity.settings
    if settings.groups != "coupled":
        raise ValueError(
            f"Expected groups='coupled' for the sharded parameters of StructuredSparsity, but got groups="
            f"{settings.groups!r}: only the norms of whole units are summed over the processes. Use groups='coupled', "
            "or strategy='ddp'."
        )
    _check_kinds(session.kinds)


def check_finalizer(finalizer: FinalizeCompression, session: CompressionSession) -> None:
    """Raise ValueError if units cannot be removed from a sharded module as ``finalizer`` asks for."""
    if finalizer.moment.at != 1.0 or finalizer.rounds != 1:
        raise ValueError(
            "Expected FinalizeCompression(at=1.0), one removal at the end of the fit, for a sharded module, but got "
            f"{finalizer.moment} and rounds={finalizer.rounds}: sharded parameters, and the optimizer state that "
            "belongs to them, cannot change their shape within a fit. Use at=1.0, and fine-tune the small model that "
            "is saved then in a fit of its own; or compress under strategy='ddp'."
        )
    if finalizer.metric == "latency":
        raise ValueError(
            "Expected a budget in macs, params or units for a sharded module, but got latency: no process has the "
            "whole module on its device to measure it. Use macs=..., or strategy='ddp'."
        )
    _check_kinds(session.kinds)


def _check_kinds(kinds: Iterable[str]) -> None:
    others = [kind for kind in kinds if kind not in EXACT_KINDS]
    if others:
        raise ValueError(
            f"Expected kinds among {EXACT_KINDS} for a sharded module, but got {others}: zero weights alone do not "
            "silence such units, and the masks that do are not made for shards. Leave them out, or use strategy='ddp'."
        )


@dataclass(frozen=True)
class Gathered:
    """What a removal from the gathered weights has come to.

    Args:
        surgery: what was removed.
        folder: where the small model was saved.
        report: the numbers; None if they were not wanted.
    """

    surgery: SurgeryReport
    folder: str
    report: CompressionReport | None


def remove_gathered(
    session: CompressionSession, trainer: pl.Trainer, plan: PruningPlan, folder: Path, explicit: bool, reported: bool
) -> Gathered:
    """Apply ``plan`` to the gathered weights in process 0, save the small model, and zero the same units in all shards.

    Args:
        session: the session of the fit.
        trainer: its trainer.
        plan: what stays.
        folder: where to save the small model.
        explicit: whether the user has named the folder; otherwise another name is taken where it is not free.
        reported: whether the numbers are wanted.

    Raises:
        Exception: what the removal or the saving has raised, in all processes.
    """
    processes, traced = session.processes, session.traced
    assert traced is not None
    copy = processes.together("gather the weights", lambda: plain_copy(traced, keep=processes.rank == 0))

    def small() -> Gathered:
        assert copy is not None and session.batch is not None and session.structures is not None
        before = (count_parameters(copy), file_size(copy) if reported else 0)
        # the structures were traced with as few examples
        session.example = smallest_example(copy, session.batch.on_cpu())
        verify = (session.example.args, session.example.kwargs)
        done = apply_plan(copy, plan, verify=verify, progress=session.bars(trainer))
        place = folder if explicit else _free(folder)
        save_compressed(copy, place)
        left = done.plan.shrunk(session.structures)
        error = max(done.error or 0.0, done.perturbed_error or 0.0)
        report = make_report(session, copy, left, None, before, error, None, trainer.global_step) if reported else None
        return Gathered(done, os.fspath(place), report)

    with torch.autocast(trainer.strategy.root_device.type, enabled=False):
        done = processes.first("remove units from the gathered weights", small)
    _zero(session, trainer.optimizers, done.surgery.plan)
    return done


def _zero(session: CompressionSession, optimizers: Iterable[Any], plan: PruningPlan) -> None:
    """Let the sharded module compute what the small model does: what reads removed units is zero."""
    assert session.traced is not None
    reshard(session.traced)
    tensors = named_tensors(session.traced)
    removals = outside([Removal(s, plan.kept[s.name]) for s in plan.structures])
    for (name, axis), positions in zeroed_axes(removals).items():
        tensor = tensors[name]
        states = [state for optimizer in optimizers for state in optimizer.state.get(tensor, {}).values()]
        alike = [s for s in states if isinstance(s, Tensor) and s.shape == tensor.shape]
        zero_positions([tensor.detach(), *alike], axis, positions)


def _free(folder: Path) -> Path:
    """``folder``, or the first of folder-v1, folder-v2, ... that does not exist."""
    number, place = 0, folder
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}-v{number}")
    return place


__all__ = ["FOLDER", "Gathered", "check_finalizer", "check_sparsity", "is_sharded", "remove_gathered"]
