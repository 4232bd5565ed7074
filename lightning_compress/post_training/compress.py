"""Compression after training in one call: scores, plan, rearrangement, repair, removal, report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.analysis import discover
from lightning_compress.budget import PerStructure, make_plan
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.example_call import example_call
from lightning_compress.latency import LatencyTable
from lightning_compress.plan import PruningPlan
from lightning_compress.post_training.calibration import Calibration, Call, Loss, at_rest, size_of
from lightning_compress.post_training.criteria import Criterion, calibrated_scores, check_criterion
from lightning_compress.post_training.products import readers
from lightning_compress.post_training.repair import DAMPINGS, Repair, What, bias_of, repair_readers
from lightning_compress.post_training.search import joint_scores, rearranged_plan
from lightning_compress.progress import Progress, quiet
from lightning_compress.report import CompressionReport, StructureCount, count_parameters, file_size, measure_latency
from lightning_compress.structures import Structures, named_tensors
from lightning_compress.surgery import SurgeryReport, apply_plan, silence_units
from lightning_compress.surgery.guards import check_plain

DEFAULT_KINDS = ("head", "ffn")
LATENCY_SECONDS = 1.5


@dataclass(frozen=True)
class Settings:
    """What is asked for; see ``compress_after_training`` for each."""

    macs: float | None = None
    params: float | None = None
    units: float | None = None
    latency: float | None = None
    importance: Criterion = "outputs"
    rearrange: bool = True
    repair: What | None = "weights"
    batches: int | None = 64
    repair_batches: int | None = 32
    per_sample: bool = True
    round_to: PerStructure | None = None
    min_units: PerStructure = 1
    dampings: Sequence[float] = DAMPINGS

    def __post_init__(self) -> None:
        given = {n: v for n, v in self.targets.items() if v is not None}
        if len(given) != 1:
            shown = ", ".join(f"{n}={v}" for n, v in given.items()) or "none"
            raise ValueError(
                f"Expected exactly one target among macs, params, units and latency, but got {shown}. For example: "
                "macs=0.7."
            )
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"Expected {name}, the fraction that is kept, to be in (0, 1], but got {value!r}.")
        if value == 1:
            raise ValueError(
                f"Expected a budget that removes something, but {name}=1 is met already. Ask for less, {name}=0.7 say."
            )
        check_criterion(self.importance)
        if self.repair is not None and self.repair not in get_args(What):
            raise ValueError(f"Expected repair to be one of {get_args(What)} or None, but got {self.repair!r}.")
        for which in ("batches", "repair_batches"):
            number = getattr(self, which)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(
                    f"Expected {which} to be an integer of at least 1, or None for all, but got {number!r}."
                )

    @property
    def targets(self) -> dict[str, float | None]:
        """The four targets, of which one is given."""
        return {"macs": self.macs, "params": self.params, "units": self.units, "latency": self.latency}


@dataclass(frozen=True)
class Prepared:
    """A model whose weights are ready for the removal, and how to take that back.

    Args:
        plan: which units go.
        repairs: what happened to each weight that reads units.
        notes: what was left out, and why.
        judged: how bad held-out batches are with the units silent, without and with the repair: the loss where there is
            one, else the relative squared error of the outputs. None without a repair.
        seconds: time of each part.
        restore: gives the weights back.
    """

    plan: PruningPlan
    repairs: tuple[Repair, ...]
    notes: tuple[str, ...]
    judged: tuple[float, float] | None
    seconds: dict[str, float]
    restore: Callable[[], None]


@dataclass(frozen=True)
class PostTrainingResult:
    """What a compression after training did.

    Args:
        report: the numbers before and after, as after a fit.
        plan: what was removed; verified, it replays without data.
        surgery: the removal.
        repairs: what happened to each weight that reads units; empty without a repair.
        notes: sentences about what was skipped, and why.
        judged: loss (or relative squared error of the outputs, without labels) of held-out calibration batches with the
            units gone, without and with the repair; None without one.
        seconds: time of each part: "data", "discovery", "importance", "plan", "repair", "removal".
    """

    report: CompressionReport
    plan: PruningPlan
    surgery: SurgeryReport
    repairs: tuple[Repair, ...] = ()
    notes: tuple[str, ...] = ()
    judged: tuple[float, float] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(self.report), *(f"  {note}" for note in self.notes)]
        if self.judged is not None:
            lines.append(f"  held-out batches: {self.judged[0]:.4g} without the repair, {self.judged[1]:.4g} with it")
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return "\n".join([*lines, f"  {sum(self.seconds.values()):.1f} s: {parts}"])


class Clock:
    """Seconds of parts that come one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The part ``name`` has ended."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def compress_after_training(
    model: nn.Module,
    loader: Iterable[Any],
    macs: float | None = None,
    params: float | None = None,
    units: float | None = None,
    latency: float | None = None,
    importance: Criterion = "outputs",
    *,
    rearrange: bool = True,
    repair: What | None = "weights",
    kinds: Sequence[str] = DEFAULT_KINDS,
    batches: int | None = 64,
    repair_batches: int | None = 32,
    loss: Loss | None = None,
    call: Call | None = None,
    per_sample: bool = True,
    round_to: PerStructure | None = None,
    min_units: PerStructure = 1,
    example: tuple[Any, Any] | None = None,
    table: LatencyTable | None = None,
    progress: Progress = quiet,
) -> PostTrainingResult:
    """Make a trained model smaller in place, from a few batches, without training.

    Units are ranked by how far masks on them move the outputs (or the loss), chosen over all structures at once until
    the budget is met, rearranged inside each structure by what they do together, and removed; weights that read the
    ones that stay are fitted to give what they gave before. Everything is verified as after a fit. If anything is
    refused, the model is as it was.

    Args:
        model: the trained model, plain, on its device.
        loader: calibration batches: a tensor, (inputs, ..., labels), or a mapping of keyword inputs and "labels".
        macs: kept fraction of the multiply-accumulates of the prunable part, in (0, 1); or
        params: of its parameters; or
        units: of the number of units; or
        latency: of the measured latency of the example on this device. Exactly one of the four.
        importance: "outputs", "fisher", "taylor", "norm", "low_rank", "low_rank_fisher", "obs" or "obs_loss"; see
            `CalibratedImportance`.
        rearrange: with "outputs" and "fisher": rank units by what they cost together, by the full matrix of each
            structure, and choose again inside each. False ranks by the diagonal.
        repair: "weights" for least squares over the matrices that read units, "scales" for a factor per unit, None for
            nothing.
        kinds: kinds of structures to remove units of.
        batches: calibration batches to take; None for all of a loader that ends.
        repair_batches: so many of them for the repair; None for all.
        loss: (model, batch) -> loss, for criteria that use gradients. Default: cross entropy for integer labels, mean
            squared error for others.
        call: (model, batch) -> outputs. Default: the batch without its labels.
        per_sample: for "fisher": gradients of examples, or of batches.
        round_to: kept counts are multiples of this; a number, or numbers by kind or structure name.
        min_units: every structure keeps at least so many units; likewise.
        example: ``(args, kwargs)`` of the call that is traced, verified and, for a latency, measured. Default: two
            examples of the first batch.
        table: for a latency, what ``measure_latency_table`` returned.
        progress: wraps iterables, for a progress bar: ``progress_bars``. Default: quiet.

    Raises:
        ValueError: for contradicting arguments, a loader that is empty, endless or gives NaN, batches without labels
            where gradients are asked for, nothing that could be removed, a budget below the floors or met already.
        SurgeryError: (a ValueError) where a removal cannot be verified.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
    >>> compress_after_training(model, batches, macs=0.5).plan.counts, model[0].out_features
    ({'ffn': 16}, 16)
    """
    settings = Settings(
        macs,
        params,
        units,
        latency,
        importance,
        rearrange,
        repair,
        batches,
        repair_batches,
        per_sample,
        round_to,
        min_units,
    )
    check_plain(model)
    clock = Clock()
    calibration = Calibration.of(model, loader, batches, call, loss)
    clock.lap("data")
    args, kwargs = example_call("example", example) if example is not None else example_of(model, calibration)
    with torch.inference_mode(False):
        structures = discover(model, args, kwargs, kinds=kinds, prove=True, progress=progress)
        if not structures:
            raise ValueError(
                f"Expected structures of kinds {tuple(kinds)} in {type(model).__name__}, but found none that can be "
                "removed: explain(model, args) says why. Choose other kinds."
            )
        clock.lap("discovery")
        prepared = prepare(
            model, structures, calibration, settings, latency_of=((args, kwargs), table), progress=progress
        )
        clock.lap("")  # its parts are in its own seconds
        dense = copy.deepcopy(model)
        try:
            surgery = apply_plan(model, prepared.plan, verify=(args, kwargs), progress=progress)
        except BaseException:
            prepared.restore()
            raise
        clock.lap("removal")
    report = report_of(dense, model, structures, surgery, (args, kwargs))
    order = ("data", "discovery", "importance", "plan", "repair", "removal")
    seconds = {**clock.seconds, **prepared.seconds}
    return PostTrainingResult(
        report,
        surgery.plan,
        surgery,
        prepared.repairs,
        prepared.notes,
        prepared.judged,
        {name: seconds[name] for name in order if name in seconds},
    )


def prepare(
    model: nn.Module,
    structures: Structures,
    calibration: Calibration,
    settings: Settings,
    latency_of: tuple[tuple[Any, Any], LatencyTable | None] | None = None,
    progress: Progress = quiet,
) -> Prepared:
    """Choose units and repair what reads the others; the units are silent then, and still there.

    Args:
        model: the dense model.
        structures: its structures, proven.
        calibration: all batches.
        settings: what is asked for.
        latency_of: for a latency, the call that is measured and, if there is one, its table.
        progress: wraps iterables.

    Raises:
        ValueError: as ``compress_after_training``; the model is then as it was.
    """
    clock, notes = Clock(), list[str]()
    scores, matrices = calibrated_scores(
        model, structures, calibration, settings.importance, per_sample=settings.per_sample, progress=progress
    )
    if settings.rearrange:
        scores = {**scores, **{name: joint_scores(fisher) for name, fisher in matrices.items()}}
    clock.lap("importance")
    options: dict[str, Any] = dict(settings.targets)
    if settings.latency is not None:
        assert latency_of is not None
        options |= {"example": latency_of[0], "table": latency_of[1]}
    plan = make_plan(
        model,
        structures,
        scores=scores,
        round_to=settings.round_to,
        min_units=settings.min_units,
        progress=progress,
        **options,
    )
    if settings.rearrange and matrices:
        plan = rearranged_plan(model, plan, matrices)
    clock.lap("plan")
    if settings.repair is None:
        return Prepared(plan, (), (), None, clock.seconds, lambda: None)
    part = calibration.with_batches(calibration.batches[: settings.repair_batches])
    _, held = part.parts()
    measure = _Measure.of(model, held)
    with silence_units(model, plan):
        without = measure(model)
    restore = _remember(model, structures)
    try:
        repairs = repair_readers(model, structures, plan, part, settings.repair, settings.dampings, progress=progress)
        with silence_units(model, plan):
            repaired = measure(model)
    except BaseException:
        restore()
        raise
    done = {r.parameter for r in repairs}
    missed = sorted({p.parameter for s in structures for p in s.slices if p.zero and p.role == "consumer"} - done)
    notes += [str(r) for r in repairs if r.damping is None]
    if missed:
        notes.append(
            f"not repaired: {missed[0]!r}{f' and {len(missed) - 1} more' if len(missed) > 1 else ''}, not used in a "
            "product with its inputs alone in every batch"
        )
    if not repaired <= without:
        restore()
        notes.append(
            f"the repair was taken back: held-out batches were worse with it ({repaired:.4g}) than without "
            f"({without:.4g})"
        )
        repairs = []
    clock.lap("repair")
    return Prepared(plan, tuple(repairs), tuple(notes), (without, min(repaired, without)), clock.seconds, restore)


def _remember(model: nn.Module, structures: Structures) -> Callable[[], None]:
    """How to give back what a repair may change."""
    tensors = named_tensors(model)
    names = {p.parameter for s in structures for p in s.slices if p.zero}
    names |= {bias for s in structures for p in readers(s) if (bias := bias_of(p.parameter, tensors)) is not None}
    values = {name: tensors[name].detach().clone() for name in names}

    @torch.no_grad()
    def restore() -> None:
        for name, value in values.items():
            tensors[name].copy_(value)

    return restore


@dataclass(frozen=True)
class _Measure:
    """How bad a model is on some batches: its loss, or how far its outputs are from those of the dense model."""

    calibration: Calibration
    outputs: tuple[list[Tensor], ...] | None

    @classmethod
    def of(cls, model: nn.Module, calibration: Calibration) -> _Measure:
        try:
            with at_rest(model), torch.no_grad():
                calibration.loss(model, calibration.batches[0])
        except Exception:  # no labels, or a loss of somebody's own that fails
            with at_rest(model), torch.no_grad():
                return cls(calibration, tuple(cls._outputs(model, calibration, b) for b in calibration.batches))
        return cls(calibration, None)

    @staticmethod
    def _outputs(model: nn.Module, calibration: Calibration, batch: Any) -> list[Tensor]:
        return [t.clone() for t in output_tensors(calibration.call(model, batch)) if t.is_floating_point()]

    def __call__(self, model: nn.Module) -> float:
        """The loss per example, or the relative squared error."""
        total = scale = 0.0
        with at_rest(model), torch.no_grad():
            for number, batch in enumerate(self.calibration.batches):
                if self.outputs is None:
                    size = size_of(batch) or 1
                    total, scale = total + size * float(self.calibration.loss(model, batch)), scale + size
                    continue
                for value, wanted in zip(
                    self._outputs(model, self.calibration, batch), self.outputs[number], strict=True
                ):
                    total += float((value - wanted).double().square().sum())
                    scale += float(wanted.double().square().sum())
        return total / scale if scale else total


def example_of(model: nn.Module, calibration: Calibration) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which the first batch calls the model, narrowed to two examples where the model accepts that."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append((args, dict(kwargs)))

    handle = model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    try:
        with at_rest(model), torch.no_grad():
            calibration.call(model, calibration.batches[0])
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            "Expected call(model, batch) to call the model, but it did not. Call model(...), not model.forward(...)."
        )
    sizes = {t.shape[0] for t in pytree.tree_leaves(seen[0]) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) == 1 and max(sizes) > 2:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t[:2].clone() if t.dim() else t, seen[0])
        try:
            with at_rest(model), torch.no_grad():
                model(*args, **kwargs)
        except Exception:  # whatever the forward raises: this batch size is not for it
            return seen[0]
        return args, kwargs
    return seen[0]


def report_of(
    dense: nn.Module, small: nn.Module, structures: Structures, surgery: SurgeryReport, example: tuple[Any, Any]
) -> CompressionReport:
    """The report of a removal that was not part of a fit.

    Args:
        dense: the model before.
        small: the model after.
        structures: of the dense model.
        surgery: the removal.
        example: the call that is measured.
    """
    left = {**structures.counts, **surgery.plan.counts}
    macs, part = structures.macs, structures.macs.restrict(set(structures.counts))
    size = size_of(example) or 1
    times = measure_latency({"before": dense, "after": small}, *example, max_seconds=LATENCY_SECONDS)
    tiers = {s.name: s.tier for s in surgery.structures}
    return CompressionReport(
        params=(surgery.parameters_before, count_parameters(small)),
        macs=(macs.evaluate(structures.counts) / size, macs.evaluate(left) / size),
        prunable_macs=(part.evaluate(structures.counts) / size, part.evaluate(left) / size),
        bytes=(file_size(dense), file_size(small)),
        structures=tuple(
            StructureCount(s.name, s.kind, s.units, left[s.name], tiers.get(s.name, s.tier)) for s in structures
        ),
        error=max(surgery.error or 0.0, surgery.perturbed_error or 0.0),
        latency={f"batch of {size}": (times["before"], times["after"])},
        pinned=len(structures.pinned),
    )


__all__ = ["PostTrainingResult", "Settings", "compress_after_training", "prepare"]
