"""From a plan to a smaller model: all or nothing, verified."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_compress.example_call import example_call
from lightning_compress.plan import PruningPlan
from lightning_compress.progress import Progress, quiet
from lightning_compress.quantization.weights import Suspended, suspended
from lightning_compress.structures import Edit, Structure, Tier, is_inside, named_tensors
from lightning_compress.surgery.calibration import calibrate
from lightning_compress.surgery.edits import Removal, install, kept_axes, module_edits, once, outside, zeroed_axes
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.guards import check_plain, check_sharing, check_values, check_weights
from lightning_compress.surgery.optimizer_state import check_leaving, check_optimizers, cut_state, leave
from lightning_compress.surgery.precision import DoubleWeights, zero_positions
from lightning_compress.surgery.record import dense_config, remember
from lightning_compress.surgery.renumber import Renumbering
from lightning_compress.surgery.silence import silence
from lightning_compress.surgery.transaction import Transaction
from lightning_compress.surgery.verify import Mismatch, Outputs, Rehearsal, difference
from lightning_compress.surgery.workbench import Workbench

TOLERANCE = 1e-6
Example = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class StructureReport:
    """What happened to one structure.

    Args:
        name: its name.
        kind: its kind.
        units_before: units before the removal.
        units_after: units that stay.
        tier: "native" or "shim"; None where nothing was removed and nothing had been proven.
        edits: what was changed besides tensors.
    """

    name: str
    kind: str
    units_before: int
    units_after: int
    tier: Tier | None
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class SurgeryReport:
    """What a removal did, and how well it was verified.

    Args:
        structures: one entry for each structure of the plan.
        parameters_before: number of parameters of the model, each shared one once.
        parameters_after: the same afterwards.
        error: max |difference| / max(1, max |output|) in float64 between the zeroed and the smaller model on the true
            weights; None if the removal was not verified.
        perturbed_error: the same on perturbed weights.
        seconds: time that the removal took, verification included.
        plan: the plan, with the tier and the edits of every structure filled in: a replay of it needs no search.
    """

    structures: tuple[StructureReport, ...]
    parameters_before: int
    parameters_after: int
    error: float | None
    perturbed_error: float | None
    seconds: float
    plan: PruningPlan

    def __str__(self) -> str:
        kept = self.parameters_after / max(1, self.parameters_before)
        checked = (
            "not verified"
            if self.error is None
            else f"verified, largest error {max(self.error, self.perturbed_error or 0):.1e}"
        )
        lines = [
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters ({kept:.1%}), {checked}, "
            f"{self.seconds:.2f} s",
            *(f"  {s.name}: {s.units_before} -> {s.units_after} ({s.tier or 'whole'})" for s in self.structures),
        ]
        return "\n".join(lines)


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Any] = (),
    verify: Example | None = None,
    *,
    tolerance: float = TOLERANCE,
    unverified: bool = False,
    progress: Progress = quiet,
) -> SurgeryReport:
    """Remove the units that ``plan`` does not keep, in place, or raise and leave everything as it was.

    Every parameter stays the same object with smaller data, so optimizers, tied names and references stay valid;
    gradients and the state in ``optimizers`` follow. Structures whose way of removal is not known (``tier`` None) are
    searched for one: native slicing with attribute repair first, then the scatter/gather shim.

    The result is verified on the example call in float64, on perturbed and on the true weights:

        max |f_small(x) - f_zeroed(x)| / max(1, max |f_zeroed(x)|) <= tolerance

    Args:
        model: the plain model, on any device, in any mode and precision.
        plan: what stays; see ``PruningPlan``.
        optimizers: every optimizer that holds parameters of the model.
        verify: ``(args, kwargs)`` of an example call of ``model``. None is allowed for a plan that was verified, one
            out of a report: its edits are then replayed without a check, also on a model on the meta device.
        tolerance: largest error that counts as equal.
        unverified: replay also a plan that was never verified, if every structure of it carries its tier, as after
            ``prove``. A proof removes some units, and what is right for their number may be wrong for another.
        progress: wraps what is gone through to verify it, for a progress bar, see ``progress_bars``.

    Returns:
        What was done; its plan replays without a search.

    Raises:
        SurgeryError: (a ValueError) if the model is wrapped, a weight is not finite, an optimizer cannot follow, or no
            verified way exists for a structure, which is named with the reasons.
        ValueError: if the plan is for another model.
        TypeError: if ``verify`` is not a pair.
    """
    check_plain(model)
    plan.check(model)
    call = None if verify is None else example_call("verify", verify)
    with suspended(model) as quantizers:
        return _applied(model, plan, tuple(optimizers), call, tolerance, unverified, quantizers, progress)


def _applied(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: tuple[Any, ...],
    verify: Example | None,
    tolerance: float,
    unverified: bool,
    quantizers: Suspended,
    progress: Progress,
) -> SurgeryReport:
    started = time.perf_counter()
    args, kwargs = ((), {}) if verify is None else verify
    removals = [r for r in (Removal(s, plan.kept[s.name]) for s in plan.structures) if r.removed]
    unproven = [r.structure.name for r in removals if r.structure.tier is None]
    if verify is None and unproven:
        raise SurgeryError(
            f"Expected verify=(args, kwargs), an example call of the model, because no way to remove {unproven[0]!r} "
            f"is known yet ({len(unproven)} structures like it), but got None."
        )
    if verify is None and removals and not (plan.verified or unverified):
        raise SurgeryError(
            "Expected verify=(args, kwargs), an example call of the model, because this removal was never compared "
            "with the zeroed model: a way that is right for some kept counts may be wrong for others. A plan out of a "
            "SurgeryReport needs none; unverified=True does without, at your own risk."
        )
    if verify is not None:
        check_values(model, "verification")
    tensors = named_tensors(model)
    before, config = _count(model), dense_config(model)
    kept = once(kept_axes(outside(removals)), tensors)
    check_weights(model, tensors, kept)
    check_sharing(tensors, kept)
    check_optimizers(optimizers, tensors, kept)
    modules_gone = {edit.module for edit in module_edits(removals)}
    gone = {n: t for n, t in tensors.items() if any(is_inside(n, module) for module in modules_gone)}
    check_leaving(optimizers, gone)

    perturbed_error = error = None if verify is None else 0.0
    # the new data must be ordinary tensors even when the caller is in inference mode, or training could not go on
    with torch.inference_mode(False), torch.no_grad(), Transaction(model.modules(), optimizers):
        reference: Outputs = {}
        renumbering: Renumbering | None = None
        ran = False
        if verify is not None and removals:
            removals, perturbed_error = _find_ways(model, plan.structures, removals, args, kwargs, tolerance, progress)
            renumbering = Renumbering(model, removals, args, kwargs)
            reference = _zeroed_outputs(model, outside(removals), args, kwargs, progress)
            ran = _failure(model, args, kwargs) is None
            kept = once(kept_axes(outside(removals)), tensors)  # a way may leave some tensors whole
        names = {r.structure.name for r in removals}
        shapes = {name: tuple(tensors[name].shape) for name in kept}
        install(dict(model.named_modules()), removals, tensors, [s for s in plan.structures if s.name not in names])
        cut_state(optimizers, tensors, shapes, kept)
        quantizers.follow(kept)
        if gone:
            left = {id(tensor) for tensor in named_tensors(model).values()}
            leave(optimizers, [tensor for tensor in gone.values() if id(tensor) not in left])
        if renumbering is not None:
            gone_names = [r.structure.name for r in removals]
            error = _final_error(model, reference, renumbering, gone_names, args, kwargs, progress)
            _check_error(error, tolerance)
            failure = _failure(model, *renumbering.inputs(args, kwargs, gone_names))
            if ran and failure is not None:
                raise SurgeryError(
                    "Expected the smaller model to run in its own precision as the original does, but it raised "
                    f"{type(failure).__name__}: {failure}. Nothing was changed; a kernel may ask for other widths (a "
                    "multiple of 8, say)."
                )

    ways = {r.structure.name: r.structure for r in removals}
    checked = plan.verified or (verify is not None and bool(removals))
    done = replace(plan, structures=tuple(ways.get(s.name, s) for s in plan.structures), verified=checked)
    if removals:
        remember(model, done, config)
    return SurgeryReport(
        structures=tuple(
            StructureReport(s.name, s.kind, s.units, len(done.kept[s.name]), s.tier, s.edits) for s in done.structures
        ),
        parameters_before=before,
        parameters_after=_count(model),
        error=error,
        perturbed_error=perturbed_error,
        seconds=time.perf_counter() - started,
        plan=done,
    )


def _find_ways(
    model: nn.Module,
    structures: Sequence[Structure],
    removals: Sequence[Removal],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tolerance: float,
    progress: Progress,
) -> tuple[list[Removal], float]:
    """Every removal with its way, and the error of all of them together on perturbed weights."""
    buffers = {p for r in removals for p in r.structure.parameters}
    with (
        DoubleWeights(model, perturbed=True, buffers=buffers, progress=progress),
        Rehearsal(model) as rehearsal,
    ):
        calibrate(rehearsal, model, args, kwargs)
        bench = Workbench(rehearsal, model, structures, removals, args, kwargs, tolerance, progress)
        ways, failures = bench.resolve()
        if failures:
            name, reason = next(iter(failures.items()))
            others = f" {len(failures) - 1} more structures were refused." if len(failures) > 1 else ""
            raise SurgeryError(
                f"Expected {_title(bench.removals[name])} to be removable, but {reason}. Nothing was changed; leave it "
                f"out of the plan, or call discover(..., prove=True), which does.{others}"
            )
        error = bench.error_of(list(ways.values()))
        return [_whole(r, ways.get(r.structure.name), removals) for r in removals], error


def _whole(removal: Removal, way: Removal | None, removals: Sequence[Removal]) -> Removal:
    """``removal`` with the way that was found for it, and with what lies inside modules that go, as it was."""
    if way is None:  # all of it goes with a layer: nothing is left to be done
        return removal
    found, structure = way.structure, removal.structure
    gone = {edit.module for edit in module_edits(removals)}
    if not gone or not structure.slices:
        return way
    stays = structure.without(gone)
    rest = tuple(piece for piece in structure.slices if piece not in stays.slices)
    edits = tuple(edit for edit in structure.edits if edit not in stays.edits)
    return replace(way, structure=replace(found, slices=(*found.slices, *rest), edits=(*found.edits, *edits)))


def _zeroed_outputs(
    model: nn.Module,
    removals: Sequence[Removal],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    progress: Progress,
) -> Outputs:
    with DoubleWeights(model, progress=progress), Rehearsal(model) as rehearsal:
        zero_positions(named_tensors(model), zeroed_axes(removals))
        with silence(dict(model.named_modules()), removals):
            return rehearsal.reference(args, kwargs)


def _final_error(
    model: nn.Module,
    reference: Outputs,
    renumbering: Renumbering,
    gone: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    progress: Progress,
) -> float:
    with DoubleWeights(model, progress=progress), Rehearsal(model) as rehearsal:
        try:
            new_args, new_kwargs = renumbering.inputs(args, kwargs, gone)
            outputs = rehearsal.run(model, new_args, new_kwargs)
            return difference(renumbering.outputs(reference, outputs, gone), outputs)
        except Mismatch as mismatch:
            raise SurgeryError(
                f"Expected the smaller model to return what the zeroed one does, but {mismatch}."
            ) from None


def _failure(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    """What the example call raises in the precision of the model, where kernels are pickier than in float64."""
    with Rehearsal(model) as rehearsal:
        try:
            rehearsal.run(model, args, kwargs, exact=False)
        except Exception as failure:  # foreign code may raise anything
            return failure
    return None


def _check_error(error: float, tolerance: float) -> None:
    if error > tolerance:
        raise SurgeryError(
            f"Expected the smaller model to agree with the zeroed one within {tolerance:g}, but the outputs differ by "
            f"{error:.1e} on the true weights. Nothing was changed."
        )


def _title(removal: Removal) -> str:
    s = removal.structure
    return f"{s.name!r} ({s.kind}, {s.units} -> {len(removal.kept)} units)"


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


__all__ = ["Example", "StructureReport", "SurgeryReport", "apply_plan"]
