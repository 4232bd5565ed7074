"""Measuring a latency table: narrowed copies of the model, run in turn with the dense one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.latency.cache import call_in_words, device_name, read_table, table_key, write_table
from lightning_compress.latency.table import LatencyRow, LatencyTable
from lightning_compress.plan import PruningPlan
from lightning_compress.progress import Progress, quiet
from lightning_compress.quantization.weights import detach_quantizers
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.structures import Structure, Structures
from lightning_compress.surgery import apply_plan
from lightning_compress.timing import Latency, measure_latency
from lightning_compress.token_switch import tokens_off

Measure = Callable[..., dict[str, Latency]]

WIDTHS = (0.75, 0.5, 0.25, 0.0)  # fractions of its units at which a structure is measured; 0 is its smallest width
TOGETHER = (0.75, 0.5, 0.25, 0.125)  # and those at which all are, together
MISALIGNED = (1, 4, 8, 16)  # powers of two: what hardware likes divides the width by one of them, or by GRAIN
GRAIN = 32
MOST_VARIANTS = 48  # copies that are measured: the structures with the most multiply-accumulates first
# A width is misaligned if it runs slower than its neighbours by more than this part of what removal saves there.
MISALIGNMENT = 0.08


def measure_latency_table(
    model: nn.Module,
    structures: Structures,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seconds: float = 30.0,
    cache: bool = True,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    measure: Measure = measure_latency,
    progress: Progress = quiet,
) -> LatencyTable:
    """Measure the latency of a call on this device at several widths of each structure.

    Structures that look alike (same kind, shapes, layers and work) are narrowed together and share a measurement, which
    makes it as many times as large against the noise. Every width is a copy of the model, without copies of the weights
    that stay whole; all copies and the dense model run in turn, and the medians are compared. Widths just below a
    multiple of 32 show which multiples the device likes.

    The table is kept on disk (see ``latency.cache``) and found again for the same model, call, device and versions.

    Args:
        model: the model that the structures were discovered in, on the device in question; it is left as it is.
        structures: its structures, proven: ``discover(..., prove=True)``.
        args: positional arguments of the call, of the batch size and length that matter.
        kwargs: keyword arguments of the call.
        seconds: measure for about this long; every copy is run at least twice, however long that takes.
        cache: whether to look for the table on disk, and to keep it there.
        context: makes a context to measure in, such as ``lambda: torch.autocast("cuda")``.
        measure: what measures, ``timing.measure_latency`` or what is called like it.
        progress: wraps what is gone through, for a progress bar, see ``progress_bars``.

    Raises:
        ValueError: if there are no structures, or one has not been proven removable.
    """
    check_proven(structures)
    kwargs = dict(kwargs or {})
    with context():
        key = table_key(model, structures, args, kwargs)
    if cache and (known := read_table(key, structures)) is not None:
        return known
    families = _families(model, structures)
    variants = _variants(structures, families)
    models: dict[str, nn.Module] = {"dense": model}
    for i, variant in enumerate(progress(variants, "smaller copies")):
        if i == len(variants) // 2:
            models["dense again"] = model  # what every ratio is taken of is measured twice; the two show the noise
        models[str(i)] = narrowed_copy(model, structures, variant.counts)
    with tokens_off(), quantization_off():
        times = measure(
            models,
            args,
            kwargs,
            repeats=101,
            warmup=1,
            max_seconds=seconds,
            context=context(),
            progress=progress,
        )
    table = _tabulate(structures, families, variants, times, key, device_name(model), call_in_words(args, kwargs))
    if cache:
        write_table(table)
    return table


def check_proven(structures: Structures) -> None:
    """Raise ValueError unless every structure is known to go, and how: copies are narrowed without a search."""
    if not len(structures):
        raise ValueError("Expected structures to measure the latency of, but there are none.")
    unproven = [s.name for s in structures if s.tier is None]
    if unproven:
        raise ValueError(
            f"Expected structures that are proven removable, because smaller models are made to be measured, but "
            f"{unproven[0]!r} is not ({len(unproven)} of {len(structures)}). Use discover(..., prove=True)."
        )


def narrowed_copy(model: nn.Module, structures: Structures, counts: Mapping[str, int]) -> nn.Module:
    """A copy of ``model`` whose structures keep the first so many of their units; for measuring only.

    What stays whole is shared: the copy has Parameters of its own, but over the storage of the model's.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    small = copy.deepcopy(model, memo)
    detach_quantizers(small)
    kept = {name: range(count) for name, count in counts.items()}
    plan = PruningPlan.of(small, structures, kept)
    if not plan.is_empty:
        apply_plan(small, plan, unverified=True)  # to be timed, not used
    return small.eval()


@dataclass(frozen=True)
class _Variant:
    """Kept counts to measure: of a family at one width, or (family -1) of all structures."""

    family: int
    count: int
    counts: Mapping[str, int]
    aligned: bool = True


def _families(model: nn.Module, structures: Structures) -> list[list[Structure]]:
    """Structures that look alike, the families with the most multiply-accumulates first."""
    modules = dict(model.named_modules())
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    families: dict[tuple[Any, ...], list[Structure]] = {}
    cost: dict[tuple[Any, ...], float] = {}
    for s in structures:
        own = structures.macs.restrict({s.name})
        pieces = []
        for p in s.slices:
            owner = modules.get(p.parameter.rpartition(".")[0])
            pattern = (p.indices - p.indices.min()).tolist() if p.indices.numel() <= 4096 else list(p.indices.shape)
            pieces.append((type(owner), shapes.get(p.parameter), p.axis, p.size, p.role, str(pattern)))
        members = tuple(type(modules.get(path)) for path in s.members)
        key = (s.kind, s.units, s.tier, s.floor, members, round(own.evaluate(structures.counts)), tuple(pieces))
        families.setdefault(key, []).append(s)
        cost[key] = cost.get(key, 0.0) + own.evaluate(structures.counts)
    return [families[key] for key in sorted(families, key=lambda key: -cost[key])]


def grain_of(units: int) -> int:
    """Largest power of two that divides a structure into eight parts or more, at most GRAIN."""
    return min(GRAIN, 2 ** int(math.log2(units / 8))) if units >= 8 else 1


def _at(fraction: float, structure: Structure) -> int:
    """The multiple of the grain nearest to a fraction of the units, at least one of them and the structure's floor."""
    grain = grain_of(structure.units)
    least = max(1, -(-structure.floor // grain))
    return min(max(round(fraction * structure.units / grain), least) * grain, structure.units)


def _variants(structures: Structures, families: Sequence[Sequence[Structure]]) -> list[_Variant]:
    """What to measure: all together first, then family by family as long as there is room."""
    variants = [
        _Variant(-1, 0, dict(counts))
        for counts in dict.fromkeys(tuple((s.name, _at(f, s)) for s in structures) for f in TOGETHER)
    ]
    for number, family in enumerate(families):
        units, grain = family[0].units, grain_of(family[0].units)
        widths = [(n, True) for n in dict.fromkeys(_at(f, family[0]) for f in WIDTHS) if n < units]
        base = _at(0.5, family[0])
        wide = all(p.indices.shape[1] % GRAIN == 0 for p in family[0].slices)  # whole heads are aligned anyway
        if not wide and grain < base < units:
            widths += [(base - a, False) for a in MISALIGNED if a < grain]
        if len(variants) + len(widths) > MOST_VARIANTS:
            break
        variants += [_Variant(number, n, {s.name: n for s in family}, aligned) for n, aligned in widths]
    return variants


def _tabulate(
    structures: Structures,
    families: Sequence[Sequence[Structure]],
    variants: Sequence[_Variant],
    times: Mapping[str, Latency],
    key: str,
    device: str,
    call: str,
) -> LatencyTable:
    again = times.get("dense again", times["dense"])
    dense = (times["dense"].seconds + again.seconds) / 2
    noise = max(abs(times["dense"].seconds - again.seconds) / 2 / dense, times["dense"].spread, again.spread)
    macs, full = structures.macs, structures.counts
    whole = macs.evaluate(full)
    together = []
    measured: dict[int, list[tuple[_Variant, float, float]]] = {}
    for i, variant in enumerate(variants):
        time = times[str(i)]
        latency = time.seconds / dense
        if variant.family < 0:
            together.append((variant.counts, latency))
            continue
        # a median of n runs is off by about 1.25 standard deviations / sqrt(n), and so is that of the dense model
        spread = max(time.spread, 0.05) if time.runs < 3 else time.spread
        error = 1.85 * math.hypot(spread * latency, noise) / math.sqrt(max(1, time.runs))
        measured.setdefault(variant.family, []).append((variant, latency, error))
    rows = []
    for number, family in enumerate(families):
        names, units = tuple(s.name for s in family), family[0].units
        found = measured.get(number, [])
        if not found:
            rows.append(LatencyRow(names, units))
            continue
        points = []
        for variant, latency, _ in found:
            if variant.aligned:
                # look-alikes may share work: together they then save less than one by one
                alone = sum(whole - macs.evaluate({**full, s.name: variant.count}) for s in family)
                jointly = whole - macs.evaluate({**full, **variant.counts})
                share = alone / jointly if jointly > 0 else 1.0
                points.append((variant.count, (1.0 - latency) * share / len(family)))
        error = max(e for _, _, e in found) / len(family)
        rows.append(LatencyRow(names, units, _multiple(family[0], found), tuple(sorted(points, reverse=True)), error))
    return LatencyTable(key, device, call, dense, noise, tuple(rows), tuple(together))


def _multiple(structure: Structure, found: Sequence[tuple[_Variant, float, float]]) -> int:
    """The smallest multiple at which, and at all larger powers of two, no width is slower than its neighbours."""
    aligned = sorted([(v.count, latency) for v, latency, _ in found if v.aligned] + [(structure.units, 1.0)])
    base = _at(0.5, structure)
    best = grain_of(structure.units)
    others = sorted((base - v.count, v.count, latency) for v, latency, _ in found if not v.aligned)
    if not others:
        return 1
    at_base = dict(aligned)[base]
    count, latency = max((point for point in aligned if point[0] < base), default=(base, at_base))
    slope = (at_base - latency) / (base - count) if count < base else 0.0
    for step, _, seconds in reversed(others):
        expected = at_base - max(slope, 0.0) * step
        if seconds - expected > MISALIGNMENT * max(1.0 - at_base, 1e-9):
            break
        best = step
    return best
