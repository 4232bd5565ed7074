"""Proving early that structures can go, by a dry run that removes one unit of each and is rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.progress import Progress, quiet
from lightning_compress.quantization.weights import suspended
from lightning_compress.structures import ModuleEdit, Pinned, Structure, Structures, named_tensors
from lightning_compress.surgery.apply import TOLERANCE
from lightning_compress.surgery.calibration import calibrate
from lightning_compress.surgery.depth import KIND as LAYER
from lightning_compress.surgery.edits import Removal, kept_axes, once, zeroed_axes
from lightning_compress.surgery.errors import NotFinite, SurgeryError
from lightning_compress.surgery.guards import check_plain, check_sharing, check_values, check_weights
from lightning_compress.surgery.modules import container_of
from lightning_compress.surgery.precision import DoubleWeights, zero_positions
from lightning_compress.surgery.transaction import Transaction
from lightning_compress.surgery.verify import Rehearsal
from lightning_compress.surgery.workbench import Workbench

UNDEFINED = "the outputs hold NaN once a unit is zero (something divides by it), so that nothing can be compared"


def prove(
    model: nn.Module,
    structures: Structures,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = TOLERANCE,
    progress: Progress = quiet,
) -> Structures:
    """Find for every structure how it can be removed; ``model`` is left exactly as it was.

    The first unit of each structure is removed from a float64 copy of the perturbed weights, and the outputs of the
    example call are compared with those of the zeroed model. Look-alike structures share one search; at the end all go
    together, first one unit of each and then every second one.

    Args:
        model: the plain model.
        structures: its structures, from ``trace_structures``.
        args: positional arguments of one short example call.
        kwargs: its keyword arguments.
        tolerance: largest error that counts as equal.
        progress: wraps what is gone through, for a progress bar.

    Returns:
        The structures that can go, with ``tier`` and ``edits`` filled in for any kept count; the others are pinned,
        with the reasons.

    Raises:
        SurgeryError: if the model is wrapped or has no weights (meta), or its outputs say nothing (no tensor, or NaN).
        ValueError: if the structures are those of another model.
    """
    check_plain(model)
    check_values(model, "the proof of a removal")
    with suspended(model):
        return _proven(model, structures, (tuple(args), dict(kwargs or {})), tolerance, progress)


def _proven(
    model: nn.Module,
    structures: Structures,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    tolerance: float,
    progress: Progress,
) -> Structures:
    pinned: list[Pinned] = list(structures.pinned)
    removals = []
    tensors = named_tensors(model)
    for structure in structures:
        if structure.kind == LAYER:
            continue
        reason = _cannot_even_try(model, tensors, structure)
        if reason is None:
            bare = replace(structure, tier=None, edits=())
            gone = 0 if structure.kind != "vocab" else _unused_id(structure, *call)
            removals.append(Removal(bare, tuple(u for u in range(structure.units) if u != gone)))
        else:
            pinned.append(_pin(structure, reason))
    ways: dict[str, Removal] = {}
    # what lies inside a module that goes could not be looked at at the same time
    for group in ([r for r in removals if not r.structure.members], [r for r in removals if r.structure.members]):
        if group:
            found, failures = _prove_together(model, group, *call, tolerance, progress)
            ways.update(found)
            pinned += [_pin(structures[name], reason) for name, reason in failures.items()]
    layers = [s for s in structures if s.kind == LAYER]
    if layers:
        found, failures = _prove_layers(model, layers, *call, tolerance, progress)
        ways.update(found)
        pinned += [_pin(structures[name], reason) for name, reason in failures.items()]
    return structures.rebuilt((ways[s.name].structure for s in structures if s.name in ways), pinned)


def _prove_together(
    model: nn.Module,
    removals: Sequence[Removal],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tolerance: float,
    progress: Progress,
) -> tuple[dict[str, Removal], dict[str, str]]:
    """Ways in which ``removals`` go together, and the reasons of those without."""
    try:
        return _resolved(model, removals, args, kwargs, tolerance, progress)
    except NotFinite:
        finite = _finite_together(model, removals, args, kwargs, progress)
        ways, failures = _resolved(model, finite, args, kwargs, tolerance, progress) if finite else ({}, {})
        failures.update({r.structure.name: UNDEFINED for r in removals if r not in finite})
        return ways, failures


def _resolved(
    model: nn.Module,
    removals: Sequence[Removal],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tolerance: float,
    progress: Progress,
) -> tuple[dict[str, Removal], dict[str, str]]:
    with _dry_run(model, removals, progress) as rehearsal:
        known = [r.structure for r in removals]
        calibrate(rehearsal, model, args, kwargs)
        ways, failures = Workbench(rehearsal, model, known, removals, args, kwargs, tolerance, progress).resolve()
        # what holds for one unit by chance need not hold for many
        many = [replace(way, kept=_half(way)) for way in ways.values()]
        with suppress(NotFinite):
            if many:
                ways, others = Workbench(rehearsal, model, known, many, args, kwargs, tolerance, progress).resolve()
                failures |= others
        return ways, failures


def _half(way: Removal) -> tuple[int, ...]:
    """Every second unit, where that many may go: the example needs its ids, and a router enough experts."""
    kept = tuple(range(1, way.structure.units, 2))
    return way.kept if way.structure.kind == "vocab" or len(kept) < way.structure.floor else kept


def _finite_together(
    model: nn.Module,
    removals: Sequence[Removal],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    progress: Progress,
) -> list[Removal]:
    """Removals that, zeroed together, leave the outputs defined; raises NotFinite if they are not to begin with."""
    finite: list[Removal] = []
    with _dry_run(model, removals, progress) as rehearsal:
        tensors = named_tensors(model)
        rehearsal.reference(args, kwargs)
        for removal in progress(removals, "removals without NaN"):
            saved = {p: tensors[p].data for p in removal.structure.parameters}
            for name, data in saved.items():
                tensors[name].data = data.clone()
            zero_positions(tensors, zeroed_axes([removal]))
            try:
                rehearsal.reference(args, kwargs)
                finite.append(removal)
            except NotFinite:
                for name, data in saved.items():
                    tensors[name].data = data
    return finite


@contextmanager
def _dry_run(model: nn.Module, removals: Sequence[Removal], progress: Progress) -> Iterator[Rehearsal]:
    """The model with perturbed weights in float64, to be left as it was."""
    buffers = {p for r in removals for p in r.structure.parameters}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        Transaction(model.modules()),
        DoubleWeights(model, perturbed=True, buffers=buffers, progress=progress),
        Rehearsal(model) as rehearsal,
    ):
        yield rehearsal


def _prove_layers(
    model: nn.Module,
    layers: Sequence[Structure],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tolerance: float,
    progress: Progress,
) -> tuple[dict[str, Removal], dict[str, str]]:
    """The way of each layer, found alone, and the reasons of those without; then all go that can go together."""
    removals = [Removal(replace(s, tier=None), ()) for s in layers]
    ways: dict[str, Removal] = {}
    failures: dict[str, str] = {}
    with _dry_run(model, (), progress) as rehearsal:
        rehearsal.reference(args, kwargs)  # what is wrong with the call itself is no layer's fault
        calibrate(rehearsal, model, args, kwargs)

        def workbench(chosen: Sequence[Removal]) -> Workbench:
            return Workbench(rehearsal, model, layers, chosen, args, kwargs, tolerance)

        hints: dict[str, Structure] = {}
        for removal in progress(removals, "layers"):
            try:
                bench = workbench([removal])
            except SurgeryError as error:
                failures[removal.structure.name] = f"the model needs what it does: passed by, {error}"
                continue
            bench.hints = hints
            found, reasons = bench.resolve()
            ways.update(found)
            failures.update(reasons)
            hints.update({container_of(w.structure.members[0]): w.structure for w in found.values()})
        together = _all_but_one(list(ways.values()))
        if len(together) > 1 and (reason := workbench(together).attempt(together)) is not None:
            for way in ways.values():
                edits = tuple(
                    replace(edit, way="skip", numbers=())
                    for edit in way.structure.edits
                    if isinstance(edit, ModuleEdit)
                )
                ways[way.structure.name] = replace(way, structure=replace(way.structure, edits=edits))
            together = _all_but_one(list(ways.values()))
            if (reason := workbench(together).attempt(together)) is not None:
                failures.update(dict.fromkeys(ways, f"it cannot go together with other layers: {reason}"))
                ways.clear()
    return ways, failures


def _all_but_one(layers: Sequence[Removal]) -> list[Removal]:
    """The layers without the last of each stack, so that one stays."""
    last = {container_of(layer.structure.members[0]): layer for layer in layers}
    return [layer for layer in layers if layer is not last[container_of(layer.structure.members[0])]]


def _cannot_even_try(model: nn.Module, tensors: Mapping[str, Tensor], structure: Structure) -> str | None:
    if structure.units < 2:
        return "it has a single unit, and one must stay"
    if structure.units <= structure.floor:
        return f"{structure.floor} of its {structure.units} units must stay"
    for piece in structure.slices:
        if piece.parameter not in tensors or piece.axis >= tensors[piece.parameter].dim():
            raise ValueError(
                f"Expected the model to have {piece.parameter!r} of structure {structure.name!r}, but it has none."
            )
        if tensors[piece.parameter].shape[piece.axis] != piece.size:
            raise ValueError(
                f"Expected axis {piece.axis} of {piece.parameter!r} to have size {piece.size}, as in structure "
                f"{structure.name!r}, but got {tensors[piece.parameter].shape[piece.axis]}: these are the structures "
                "of another model."
            )
    try:
        kept = once(kept_axes([Removal(structure, tuple(range(1, structure.units)))]), tensors)
        check_weights(model, tensors, kept)
        check_sharing(tensors, kept)
    except SurgeryError as error:
        return str(error)
    return None


def _unused_id(structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """An id that no input of the example holds: the largest that lies below one that an input holds, if there is any.

    Small ids are often those of padding and other special tokens, which code knows by number.
    """
    used = set()
    for tensor in output_tensors((args, kwargs)):
        if not tensor.is_floating_point() and tensor.dtype != torch.bool:
            used.update(tensor.unique().tolist())
    free = [unit for unit in range(structure.units) if unit not in used]
    below = [unit for unit in free if unit < max((u for u in used if u < structure.units), default=0)]
    return int((below or free or [structure.units - 1])[-1])


def _pin(structure: Structure, reason: str) -> Pinned:
    positions = {(s.parameter, s.axis): s.indices.reshape(-1) for s in structure.slices}
    return Pinned(structure.name, structure.kind, structure.units, structure.parameters, (reason,), positions)
