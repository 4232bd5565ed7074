"""Around a removal: whether the model is fit for it, and what has come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.averages import averaged_copies
from lightning_compress.callbacks.compiled import eager
from lightning_compress.callbacks.session import CompressionSession
from lightning_compress.callbacks.strategies import unwrapped
from lightning_compress.plan import PruningPlan
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.report import (
    CompressionReport,
    Latency,
    Round,
    StructureCount,
    count_parameters,
    file_size,
    measure_latency,
)
from lightning_compress.shards import local
from lightning_compress.structures import Structures
from lightning_compress.surgery import SurgeryReport, apply_plan
from lightning_compress.surgery.transaction import Transaction

LATENCY_SECONDS = 1.5  # for each of the two calls that are timed


def check_finite(session: CompressionSession, outputs: Any, step: int) -> None:
    """Raise ValueError if training has diverged: removing units from such a model would hide it.

    Args:
        session: the session of the fit.
        outputs: what the training step returned.
        step: optimizer steps taken so far.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    for value in pytree.tree_leaves(loss):
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"Expected a finite loss when units are removed, but it is {float(value.float().mean())} after {step} "
                "optimizer steps: training has diverged. Nothing was removed. Lower the learning rate or the strength."
            )
    for name, parameter in session.parameters().items():
        if not bool(torch.isfinite(local(parameter.detach())).all()):
            raise ValueError(
                f"Expected finite weights when units are removed, but {name!r} holds NaN or infinity after {step} "
                "optimizer steps: training has diverged. Nothing was removed. Lower the learning rate or the strength."
            )


def remove_units(
    session: CompressionSession, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: PruningPlan
) -> SurgeryReport:
    """Apply ``plan`` to the traced module in every process, or in none.

    Process 0 finds the ways of removal; the others follow them, and verify the result with their own example. Averaged
    copies of the module lose the same units in the same transaction; the report has the largest error of all of them.
    """
    processes, traced, example = session.processes, session.traced, session.example
    assert traced is not None and example is not None
    own: list[SurgeryReport] = []
    copies = averaged_copies(trainer, pl_module, session.traced_name)

    def removed(plan: PruningPlan) -> SurgeryReport:
        verify = (example.args, example.kwargs)
        report = apply_plan(traced, plan, optimizers=trainer.optimizers, verify=verify, progress=session.bars(trainer))
        every = [report, *(copied.remove(report.plan, example) for copied in copies)]
        error, perturbed = (max(getattr(r, f) or 0.0 for r in every) for f in ("error", "perturbed_error"))
        own.append(replace(report, error=error, perturbed_error=perturbed))
        return own[0]

    # surgery computes in float64 and on copies of the inputs: no autocast, no inference mode around it
    with torch.autocast(pl_module.device.type, enabled=False), unwrapped(trainer, pl_module), eager(traced):
        # what one process cannot do is undone in those that could
        modules = chain(traced.modules(), *(copied.module.modules() for copied in copies))
        with Transaction(modules, trainer.optimizers):
            found = processes.first(
                "remove units", lambda: removed(plan).plan, pack=PruningPlan.to_json, unpack=PruningPlan.from_json
            )
            return processes.together("remove the same units", lambda: own[0] if own else removed(found))


def make_report(
    session: CompressionSession,
    small: nn.Module,
    structures: Structures,
    dense: nn.Module | None,
    before: tuple[int, int],
    error: float,
    context: AbstractContextManager[Any] | None,
    step: int,
    rounds: Sequence[Round] = (),
) -> CompressionReport:
    """The report of what has been removed in a fit so far.

    Args:
        session: the session of the fit.
        small: the model after the removals.
        structures: its structures.
        dense: the model before the first removal, for its latency; None to leave latency out.
        before: parameters and bytes of that model.
        error: largest error of the removals.
        context: context in which the Trainer runs a forward pass (autocast); None where latency is left out.
        step: optimizer steps taken so far.
        rounds: the removals, with the times of training steps.
    """
    original = session.dense
    assert original is not None
    assert session.example is not None and session.batch is not None
    examples = session.example.size or 1
    macs = original.macs
    part = macs.restrict({s.name for s in original})
    left = {**dict.fromkeys(original.counts, 0), **structures.counts}  # what lay in a removed layer is gone with it
    latency: dict[str, tuple[Latency, Latency]] = {}
    if dense is not None and context is not None:
        calls = {f"batch of {c.size}" if c.size else "one call": c for c in (session.example, session.batch)}
        with context, eager(small), quantization_off():
            for what, call in calls.items():
                models = {"before": dense, "after": small}
                times = measure_latency(models, call.args, call.kwargs, max_seconds=LATENCY_SECONDS)
                latency[what] = (times["before"], times["after"])
    return CompressionReport(
        params=(before[0], count_parameters(small)),
        macs=(macs.evaluate(original.counts) / examples, macs.evaluate(left) / examples),
        prunable_macs=(part.evaluate(original.counts) / examples, part.evaluate(left) / examples),
        bytes=(before[1], file_size(small)),
        structures=tuple(StructureCount(s.name, s.kind, s.units, left[s.name], s.tier) for s in original),
        error=error,
        latency=latency,
        pinned=len(original.pinned),
        module=session.traced_name,
        step=step,
        rounds=tuple(rounds),
    )
