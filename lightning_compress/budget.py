"""Budget: structures, scores and one target become a pruning plan.

The target is a kept fraction of the *prunable part* of a cost: the monomials of its polynomial in which a structure
occurs. What no plan can change (embeddings, a patch projection, the classifier) is in neither side of the fraction.
Latency is the exception: it is measured, of a call of the whole model.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.example_call import example_call
from lightning_compress.importance import Importance, unit_scores
from lightning_compress.latency import LatencyGoal, LatencyMet, LatencyModel, LatencyTable, measure_latency_table
from lightning_compress.latency.loop import TOLERANCE as LATENCY_TOLERANCE
from lightning_compress.latency.loop import meet
from lightning_compress.latency.measuring import check_proven
from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.progress import Progress, quiet
from lightning_compress.selection import Ladder, choose_global, choose_uniform
from lightning_compress.structures import KINDS, Structure, Structures, stacks_of
from lightning_compress.timing import measure_latency

Metric = Literal["params", "macs", "units"]
Target = Literal["params", "macs", "units", "latency"]
PerStructure = int | Mapping[str, int]

# A plan hits its target when its cost is within this fraction of the target, from below.
TOLERANCE = 0.01


class BudgetWarning(UserWarning):
    """A plan is not as near to its budget as it should be: more than 1 % below it, or 5 % off a measured latency."""


def make_plan(
    model: nn.Module,
    structures: Structures,
    params: float | None = None,
    macs: float | None = None,
    units: float | None = None,
    importance: Importance = "norm",
    round_to: PerStructure | None = None,
    min_units: PerStructure = 1,
    *,
    per_layer: bool = False,
    scores: Mapping[str, Tensor] | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    example: tuple[Any, Any] | None = None,
    table: LatencyTable | None = None,
    seconds: float = 30.0,
    progress: Progress = quiet,
) -> PruningPlan:
    """Choose which units stay so that a fraction of one cost is left.

    Units go in the order of their score per cost, smallest first, over all structures at once, until the budget is met;
    see ``selection.choose_global`` for which cost. The plan never exceeds the budget; what the last step overshot is
    filled up again with the best units that still fit.

    Args:
        model: the model that the structures were discovered in.
        structures: what discovery returned: the structures with their costs.
        params: kept fraction of the parameters of the prunable part, in (0, 1]; or
        macs: kept fraction of its multiply-accumulates; or
        units: kept fraction of the number of units; or ``latency`` or ``latency_ms``. Exactly one of the five.
        importance: "norm", "taylor" or a function, see ``importance.unit_scores``.
        round_to: kept counts are multiples of this (or all units), for every structure or by kind or by structure name.
            Default: 1; for a latency the multiples that the table has found to run at full speed.
        min_units: every structure keeps at least this many units, or all that it has; likewise.
        per_layer: keep the same fraction of units in every structure of a kind, and compare scores only inside a
            structure. The fraction of the kinds with fewer units is as near to that of the others as whole units allow.
        scores: scores of shape (units,) by structure name, in place of ``importance``.
        latency: measured latency of ``example`` on the device of the model, as a fraction of that of ``model``; or
        latency_ms: the same in milliseconds. Planned by ``table``, then measured and corrected until it is met within
            5 %; the structures must be proven.
        example: ``(args, kwargs)`` of the call whose latency counts. Without it, but with a table, the plan is the
            table's estimate, and nothing is measured.
        table: what ``measure_latency_table`` returned. Default: measured here, or found on disk.
        seconds: measure for about this long for the table, and once more to correct.
        progress: wraps what is gone through, for a progress bar, see ``progress_bars``.

    Raises:
        ValueError: if not exactly one target is given or it lies outside (0, 1], nothing is prunable (with what was
            pinned and why), the budget lies below the floors (with the smallest fraction within reach), or
            ``round_to``, ``min_units`` or scores are malformed; for a latency without example or table, or structures
            that are not proven.

    Warns:
        BudgetWarning: if the plan stays more than 1 % below the target because no smaller step is left; if a latency
            is measured to be more than 5 % off.
    """
    if latency is None and latency_ms is None:
        _check_without_latency(example, table)
        problem = _Problem.of(structures, params, macs, units, round_to, min_units)
        if scores is None:
            scores = unit_scores(model, structures, importance, progress=progress)
        masks, cost = problem.solve(scores, per_layer)
        if cost < (1 - TOLERANCE) * problem.budget:
            warnings.warn(problem.explain_gap(masks, cost, per_layer), BudgetWarning, stacklevel=2)
        return _plan(model, structures, masks)
    _one_target(params=params, macs=macs, units=units, latency=latency, latency_ms=latency_ms)
    args, kwargs = example_call("example", example) if example is not None else ((), {})
    if table is None or example is not None:
        check_proven(structures)
    if scores is None:
        scores = unit_scores(model, structures, importance, progress=progress)
    if table is None:
        if example is None:
            raise ValueError(
                "Expected example=(args, kwargs), the call whose latency counts, or table=..., but got neither."
            )
        table = measure_latency_table(model, structures, args, kwargs, seconds=seconds, progress=progress)
    if example is None:
        fraction = latency if latency is not None else _fraction_of(latency_ms, table, structures)
        problem = _Problem.of(structures, None, None, None, round_to, min_units, fraction, table)
        return _plan(model, structures, problem.solve(scores, per_layer)[0])
    goal = LatencyGoal(
        latency,
        None if latency_ms is None else latency_ms / 1e3,
        args=args,
        kwargs=kwargs,
        max_seconds=seconds,
        measure=measure_latency,
        progress=progress,
    )
    return plan_for_latency(model, structures, goal, table, scores, round_to, min_units, per_layer=per_layer)[0]


def plan_for_latency(
    model: nn.Module,
    structures: Structures,
    goal: LatencyGoal,
    table: LatencyTable,
    scores: Mapping[str, Tensor],
    round_to: PerStructure | None = None,
    min_units: PerStructure = 1,
    *,
    per_layer: bool = False,
) -> tuple[PruningPlan, LatencyMet]:
    """What ``make_plan`` does for a latency, with every setting of the measurement, and how well it was met.

    Args:
        model: the model to be pruned, now; it may have been pruned before.
        structures: its structures, proven.
        goal: the latency, the call, and the model that it is relative to.
        table: of the model before any removal, or of ``model``.
        scores: as in ``make_plan``; likewise ``round_to``, ``min_units`` and ``per_layer``.
    """
    now = table.estimate(structures)
    if goal.seconds is not None:
        wanted = goal.seconds / table.dense_seconds
    else:
        # the table speaks of the model that it was measured with, the goal of its reference
        wanted = (goal.fraction or 1.0) * (now if goal.reference is None else 1.0)
    fraction = min(1.0, wanted / now)
    problem = _Problem.of(structures, None, None, None, round_to, min_units, fraction, table)

    def solve(estimate: float) -> Mapping[str, Tensor]:
        return problem.at(estimate).solve(scores, per_layer)[0]

    met = meet(goal, model, structures, solve, problem.estimated_budget, problem.smallest)
    if not met.met:
        warnings.warn(problem.explain_latency(met, goal, table), BudgetWarning, stacklevel=3)
    return _plan(model, structures, met.kept), met


def _plan(model: nn.Module, structures: Structures, masks: Mapping[str, Tensor]) -> PruningPlan:
    kept = {name: torch.nonzero(mask).reshape(-1) for name, mask in masks.items()}
    return PruningPlan.of(model, structures, kept)


def select(
    structures: Structures,
    scores: Mapping[str, Tensor],
    params: float | None = None,
    macs: float | None = None,
    units: float | None = None,
    round_to: PerStructure | None = None,
    min_units: PerStructure = 1,
    *,
    per_layer: bool = False,
    latency: float | None = None,
    table: LatencyTable | None = None,
) -> dict[str, Tensor]:
    """The choice of ``make_plan`` without the plan: structure name -> bool of shape (units,), True for a kept unit.

    Fast enough to be called every few steps of training. Takes and raises what ``make_plan`` does; never warns, and
    never measures: a latency, as a fraction of that of the model as it is now, is that of the table.
    """
    problem = _Problem.of(structures, params, macs, units, round_to, min_units, latency, table)
    return problem.solve(scores, per_layer)[0]


def cost_polynomial(structures: Structures, metric: Metric) -> Polynomial:
    """The prunable part of a cost: the monomials in which a structure occurs; for "units" the sum of the kept counts.

    Raises:
        ValueError: for an unknown metric, or structures that come without costs.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"Expected metric to be one of {get_args(Metric)}, but got {metric!r}.")
    if not isinstance(structures, Structures):
        raise ValueError(
            f"Expected structures as discovery returns them (Structures, with costs and pinned families), but got "
            f"{type(structures).__name__}. Pass what discover(...) returned; of_kind(...) and rebuilt(...) narrow it."
        )
    if metric == "units":
        return Polynomial({(s.name,): 1.0 for s in structures})
    whole = structures.macs if metric == "macs" else structures.params
    return whole.restrict({s.name for s in structures})


def kept_fraction(structures: Structures, counts: Mapping[str, int], metric: Metric) -> float:
    """Fraction of the prunable part of a cost that is left with these kept counts.

    A structure that is not named keeps all its units.

    Raises:
        ValueError: for an unknown metric or structure, or if nothing is prunable.
    """
    polynomial = cost_polynomial(structures, metric)
    _check_prunable(structures, polynomial, metric)
    for name in counts:
        if name not in structures.counts:
            raise ValueError(
                f"Expected counts of structures among {list(structures.counts)}, but got {name!r}."
                f"{_hint(name, structures.counts)}"
            )
    return polynomial.evaluate({**structures.counts, **counts}) / polynomial.evaluate(structures.counts)


@dataclass(frozen=True)
class _Problem:
    """A checked request: everything but the scores."""

    structures: Structures
    metric: Target
    fraction: float
    polynomial: Polynomial
    dense: float  # cost of the prunable part with all units; for a latency the estimate, corrected
    multiples: dict[str, int]
    floors: dict[str, int]
    latency: LatencyModel | None = None
    stand_ins: frozenset[str] = frozenset()  # layers that are kept as one of their stack: any other would do

    @property
    def budget(self) -> float:
        """Cost that may be kept, as ``polynomial`` counts it."""
        cost = self.fraction * self.dense
        return cost if self.latency is None else self.latency.correction.inverse(cost)

    @property
    def estimated_budget(self) -> float:
        """For a latency: what may be kept, as a fraction of the latency of the table's model."""
        return self.fraction * self.dense

    @property
    def smallest(self) -> float:
        """For a latency: the estimate at the floors."""
        assert self.latency is not None
        return self.latency.estimate(self.floors)

    def width(self, name: str, count: float) -> float:
        """What so many units of a structure count for in ``polynomial``."""
        return float(count) if self.latency is None else self.latency.effective(name, count)

    def cost(self, counts: Mapping[str, float]) -> float:
        """Cost with these kept counts, as ``polynomial`` counts it."""
        return self.polynomial.evaluate({name: self.width(name, count) for name, count in counts.items()})

    def at(self, estimate: float) -> _Problem:
        """The same for another estimated latency, not below the floors."""
        return replace(self, fraction=max(estimate, self.smallest) / self.dense)

    @classmethod
    def of(
        cls,
        structures: Structures,
        params: float | None,
        macs: float | None,
        units: float | None,
        round_to: PerStructure | None,
        min_units: PerStructure,
        latency: float | None = None,
        table: LatencyTable | None = None,
    ) -> _Problem:
        metric, fraction = _target(params, macs, units, latency)
        for s in structures:
            if s.kind == "vocab":
                raise ValueError(
                    f"Expected structures among which a budget can choose, but got the vocabulary {s.name!r}: which "
                    "ids a corpus needs is no question of importance. Plan it with PruningPlan.of(model, structures, "
                    "{name: used_ids(tokenizer, texts)})."
                )
        minima = _per_structure("min_units", min_units, structures)
        default: PerStructure = 1
        model = None
        if metric == "latency":
            if table is None:
                raise ValueError(
                    "Expected table=... for a latency, what measure_latency_table(...) returned, but got none."
                )
            cost_polynomial(structures, "macs")  # refuses a list without costs
            if any(s.kind == "layer" for s in structures):
                raise ValueError(
                    "Expected structures whose units are measured at several counts for a latency, but layers are one "
                    "unit each. Plan them with macs=... or params=..., or leave them out: structures.of_kind(...)."
                )
            model, default = (
                table.model(structures),
                {n: m for n, m in table.multiples.items() if n in structures.counts},
            )
            polynomial = model.polynomial
        else:
            polynomial = cost_polynomial(structures, metric)
        _check_prunable(structures, polynomial, metric)
        multiples = _per_structure("round_to", default if round_to is None else round_to, structures)
        problem = cls(structures, metric, fraction, polynomial, 0.0, multiples, {}, model)
        floors = problem.floors
        for s in structures:
            floor = -(-max(minima[s.name], s.floor) // multiples[s.name]) * multiples[s.name]
            floors[s.name] = floor = _floor(s, floor, min_units)
            if s.name not in polynomial.variables or problem.width(s.name, floor) >= problem.width(s.name, s.units):
                floors[s.name] = s.units  # removing its units saves nothing of this cost
        problem = replace(problem, stand_ins=_keep_one_layer(structures, polynomial, floors))
        if model is not None:
            dense, smallest = model.estimate(structures.counts), model.estimate(floors)
        else:
            dense, smallest = polynomial.evaluate(structures.counts), polynomial.evaluate(floors)
        # an estimate is not exact: what lies at its edge is tried
        slack = 1e-9 if model is None else LATENCY_TOLERANCE
        if smallest > fraction * dense * (1 + slack):
            reachable = math.ceil(smallest / dense * 1e4) / 1e4  # rounded up: the printed fraction must work
            raise ValueError(
                f"Expected a budget within reach, but {metric}={fraction:g} lies below {metric}={reachable:g}, the "
                f"smallest possible with min_units={min_units!r} and round_to={round_to!r}: ask for more, lower these "
                f"floors, or let more kinds go."
            )
        if smallest > fraction * dense and model is not None:
            fraction = smallest / dense
        return replace(problem, fraction=fraction, dense=dense)

    def ladders(self, scores: Mapping[str, Tensor]) -> list[Ladder]:
        """The removal steps of every structure; raises ValueError for malformed scores."""
        given = {s.name: _scores_of(s, scores) for s in self.structures}
        floors = dict(self.floors)
        for stack in stacks_of(self.structures):
            if any(s.name in self.stand_ins for s in stack):  # the layer with the largest score stays
                floors.update((s.name, 0) for s in stack)
                floors[max(stack, key=lambda s: float(given[s.name])).name] = 1
        return [
            Ladder.of(
                s.name,
                s.kind,
                given[s.name],
                self.multiples[s.name],
                floors[s.name],
                functools.partial(self.width, s.name),
            )
            for s in self.structures
        ]

    def solve(self, scores: Mapping[str, Tensor], per_layer: bool) -> tuple[dict[str, Tensor], float]:
        """Kept masks by structure name, and the cost that they leave."""
        if per_layer and any(s.kind == "layer" for s in self.structures):
            raise ValueError(
                "Expected structures that can keep a fraction of their units for per_layer=True, but layers go whole "
                "or stay. Leave them out: structures.of_kind(...), or plan without per_layer."
            )
        ladders = self.ladders(scores)
        choose = choose_uniform if per_layer else choose_global
        removed = choose(ladders, self.polynomial, self.budget * (1 + 1e-12))
        masks = {}
        for ladder, steps in zip(ladders, removed, strict=True):
            masks[ladder.name] = ladder.kept_mask(steps)
        return masks, self.cost({name: int(mask.sum()) for name, mask in masks.items()})

    def explain_gap(self, masks: Mapping[str, Tensor], cost: float, per_layer: bool) -> str:
        """Why the plan stays below the target: the smallest step that would have come back."""
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        steps = {}
        for s in self.structures:
            more = min(s.units, (counts[s.name] // self.multiples[s.name] + 1) * self.multiples[s.name])
            if more > counts[s.name]:
                added = self.cost({**counts, s.name: more}) - cost
                steps[s.name] = (added, more - counts[s.name])
        name = min(steps, key=lambda n: steps[n])
        share, size = steps[name][0] / self.dense, steps[name][1]
        rule = " in every structure of a kind (per_layer)" if per_layer else ""
        return (
            f"Expected to keep {self.metric}={self.fraction:g} of the prunable part, but the plan keeps "
            f"{cost / self.dense:.4f}: units come back whole{rule}, and the smallest step left is {size} unit(s) of "
            f"{name!r}, {share:.4f} of the cost. A smaller round_to, or more kinds, would allow smaller steps."
        )

    def explain_latency(self, met: LatencyMet, goal: LatencyGoal, table: LatencyTable) -> str:
        """How far a plan is from the latency that was asked for, and why."""
        asked = f"latency_ms={goal.seconds * 1e3:g}" if goal.seconds is not None else f"latency={goal.fraction:g}"
        noise = max(table.noise, met.dense.spread, met.small.spread)
        hint = (
            f" Equal runs differ by {noise:.0%} here: measure for longer (seconds=...), or when less else runs."
            if noise > LATENCY_TOLERANCE / 2
            else ""
        )
        return (
            f"Expected {asked} of one call within {LATENCY_TOLERANCE:.0%}, but the plan measures "
            f"{met.small.seconds * 1e3:.3g} ms where the dense model takes {met.dense.seconds * 1e3:.3g} ms, "
            f"{abs(met.ratio - 1):.0%} {'above' if met.ratio > 1 else 'below'} what was asked for: {met.stuck}.{hint}"
        )


def _fraction_of(latency_ms: float | None, table: LatencyTable, structures: Structures) -> float:
    """An absolute latency as a fraction of that of the model with ``structures``, by the table alone."""
    assert latency_ms is not None
    return min(1.0, latency_ms / 1e3 / (table.dense_seconds * table.estimate(structures)))


def _check_without_latency(example: object, table: object) -> None:
    if example is not None or table is not None:
        raise ValueError(
            f"Expected {'example' if example is not None else 'table'} together with latency=... or latency_ms=..., "
            "for which something is measured, but got neither of these."
        )


def _one_target(**targets: float | None) -> tuple[str, float]:
    """The one that is given."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        shown = ", ".join(f"{k}={v!r}" for k, v in given.items()) or "none"
        names = [name for name in targets if name not in ("latency", "latency_ms") or name in given]
        expected = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(f"Expected exactly one target among {expected}, but got {shown}.")
    ((name, value),) = given.items()
    if name == "latency_ms":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"Expected latency_ms to be a positive number of milliseconds, but got {value!r}.")
        return name, float(value)
    return _check_fraction(name, value)


def _target(
    params: float | None, macs: float | None, units: float | None, latency: float | None
) -> tuple[Target, float]:
    return _one_target(params=params, macs=macs, units=units, latency=latency)  # type: ignore[return-value]


def _check_fraction(metric: str, fraction: object) -> tuple[str, float]:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        hint = f" Did you mean {metric}={fraction / 100:g}?" if isinstance(fraction, int) and 1 < fraction < 100 else ""
        raise ValueError(f"Expected {metric} to be a kept fraction in (0, 1], but got {fraction!r}.{hint}")
    return metric, float(fraction)


def _floor(structure: Structure, asked: int, min_units: PerStructure) -> int:
    """Fewest units of a structure that may stay: what it needs itself, and what was asked for.

    A number for all structures does not speak of layers, which are one unit each.
    """
    if not structure.floor and not (isinstance(min_units, Mapping) and min_units.keys() & {structure.name, "layer"}):
        return 0
    return min(max(asked, structure.floor), structure.units)


def _keep_one_layer(structures: Structures, polynomial: Polynomial, floors: dict[str, int]) -> frozenset[str]:
    """Raise the floor of the dearest layer of each stack whose layers could all go; returns these layers."""
    raised = set()
    for stack in stacks_of(structures):
        if not any(floors[s.name] for s in stack):
            inside = {**floors, **{s.name: 1 for s in stack}}
            dearest = max(stack, key=lambda s: polynomial.derivative(s.name).evaluate(inside))
            floors[dearest.name] = 1
            raised.add(dearest.name)
    return frozenset(raised)


def _check_prunable(structures: Structures, polynomial: Polynomial, metric: Target) -> None:
    if not polynomial.variables:
        lines = [f"  {p.name} ({p.kind}, {p.units} units): {'; '.join(p.reasons)}" for p in structures.pinned]
        pinned = (
            "\nWhat was pinned, and why:\n" + "\n".join(lines) if lines else " No family of units was pinned either."
        )
        what = "the structures cost nothing" if len(structures) else "there are no structures"
        raise ValueError(f"Expected structures whose removal lowers the {metric}, but {what}.{pinned}")


def _per_structure(argument: str, value: PerStructure, structures: Structures) -> dict[str, int]:
    """The value for every structure: by its name, else by its kind, else 1."""
    if not isinstance(value, Mapping):
        _check_count(argument, value)
        return {s.name: value for s in structures}
    names = [s.name for s in structures]
    for key, number in value.items():
        if key not in KINDS and key not in names:
            raise ValueError(
                f"Expected the keys of {argument} to be kinds ({', '.join(KINDS)}) or structure names, but got {key!r}."
                f"{_hint(key, [*KINDS, *names])}"
            )
        _check_count(f"{argument}[{key!r}]", number)
    return {s.name: value.get(s.name, value.get(s.kind, 1)) for s in structures}


def _check_count(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {argument} to be an integer of at least 1, but got {value!r}.")


def _scores_of(structure: Structure, scores: Mapping[str, Tensor]) -> Tensor:
    if structure.name not in scores:
        raise ValueError(f"Expected scores for structure {structure.name!r}, but got none.")
    score = torch.as_tensor(scores[structure.name]).detach().double().cpu()
    if tuple(score.shape) != (structure.units,):
        raise ValueError(
            f"Expected scores of shape ({structure.units},) for structure {structure.name!r}, "
            f"but got shape {tuple(score.shape)}."
        )
    if not bool((torch.isfinite(score) & (score >= 0)).all()):
        raise ValueError(
            f"Expected finite, non-negative scores for structure {structure.name!r}, but got {float(score.min()):g} to "
            f"{float(score.max()):g}."
        )
    return score


def _hint(name: object, names: Iterable[str]) -> str:
    close = get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
