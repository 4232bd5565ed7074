"""Budget: structures, scores and one target become a pruning plan.

The target is a kept fraction of the *prunable part* of a cost: the monomials of its polynomial in which a structure
occurs. What no plan can change (embeddings, a patch projection, the classifier) is in neither side of the fraction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.importance import Importance, unit_scores
from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.selection import Ladder, choose_global, choose_uniform
from lightning_compress.structures import KINDS, Structure, Structures

Metric = Literal["params", "macs", "units"]
PerStructure = int | Mapping[str, int]

# A plan hits its target when its cost is within this fraction of the target, from below.
TOLERANCE = 0.01


class BudgetWarning(UserWarning):
    """A plan respects its budget but stays more than 1 % below it, because no smaller step is left."""


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
        units: kept fraction of the number of units. Exactly one of the three.
        importance: "norm", "taylor" or a function, see ``importance.unit_scores``.
        round_to: kept counts are multiples of this (or all units), for every structure or by kind or by structure name.
        min_units: every structure keeps at least this many units, or all that it has; likewise.
        per_layer: keep the same fraction of units in every structure of a kind, and compare scores only inside a
            structure. The fraction of the kinds with fewer units is as near to that of the others as whole units allow.
        scores: scores of shape (units,) by structure name, in place of ``importance``.

    Raises:
        ValueError: if not exactly one target is given or it lies outside (0, 1], nothing is prunable (with what was
            pinned and why), the budget lies below the floors (with the smallest fraction within reach), or
            ``round_to``, ``min_units`` or scores are malformed.

    Warns:
        BudgetWarning: if the plan stays more than 1 % below the target because no smaller step is left.
    """
    problem = _Problem.of(structures, params, macs, units, round_to, min_units)
    if scores is None:
        scores = unit_scores(model, structures, importance)
    masks, cost = problem.solve(scores, per_layer)
    if cost < (1 - TOLERANCE) * problem.budget:
        warnings.warn(problem.explain_gap(masks, cost, per_layer), BudgetWarning, stacklevel=2)
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
) -> dict[str, Tensor]:
    """The choice of ``make_plan`` without the plan: structure name -> bool of shape (units,), True for a kept unit.

    Fast enough to be called every few steps of training. Takes and raises what ``make_plan`` does; never warns.
    """
    return _Problem.of(structures, params, macs, units, round_to, min_units).solve(scores, per_layer)[0]


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
    metric: Metric
    fraction: float
    polynomial: Polynomial
    dense: float  # cost of the prunable part with all units
    multiples: dict[str, int]
    floors: dict[str, int]

    @property
    def budget(self) -> float:
        """Cost that may be kept."""
        return self.fraction * self.dense

    @classmethod
    def of(
        cls,
        structures: Structures,
        params: float | None,
        macs: float | None,
        units: float | None,
        round_to: PerStructure | None,
        min_units: PerStructure,
    ) -> _Problem:
        metric, fraction = _target(params, macs, units)
        for s in structures:
            if s.kind == "vocab":
                raise ValueError(
                    f"Expected structures among which a budget can choose, but got the vocabulary {s.name!r}: which "
                    "ids a corpus needs is no question of importance. Plan it with PruningPlan.of(model, structures, "
                    "{name: used_ids(tokenizer, texts)})."
                )
        polynomial = cost_polynomial(structures, metric)
        _check_prunable(structures, polynomial, metric)
        multiples = _per_structure("round_to", 1 if round_to is None else round_to, structures)
        minima = _per_structure("min_units", min_units, structures)
        floors = {}
        for s in structures:
            floor = -(-minima[s.name] // multiples[s.name]) * multiples[s.name]
            floors[s.name] = min(floor, s.units)
            if s.name not in polynomial.variables:
                floors[s.name] = s.units  # removing its units saves nothing of this cost
        dense = polynomial.evaluate(structures.counts)
        problem = cls(structures, metric, fraction, polynomial, dense, multiples, floors)
        smallest = polynomial.evaluate(floors)
        if smallest > problem.budget * (1 + 1e-9):
            reachable = math.ceil(smallest / dense * 1e4) / 1e4  # rounded up: the printed fraction must work
            raise ValueError(
                f"Expected a budget within reach, but {metric}={fraction:g} lies below {metric}={reachable:g}, the "
                f"smallest possible with min_units={min_units!r} and round_to={round_to!r}: ask for more, lower these "
                f"floors, or let more kinds go."
            )
        return problem

    def ladders(self, scores: Mapping[str, Tensor]) -> list[Ladder]:
        """The removal steps of every structure; raises ValueError for malformed scores."""
        return [
            Ladder.of(s.name, s.kind, _scores_of(s, scores), self.multiples[s.name], self.floors[s.name])
            for s in self.structures
        ]

    def solve(self, scores: Mapping[str, Tensor], per_layer: bool) -> tuple[dict[str, Tensor], float]:
        """Kept masks by structure name, and the cost that they leave."""
        ladders = self.ladders(scores)
        choose = choose_uniform if per_layer else choose_global
        removed = choose(ladders, self.polynomial, self.budget * (1 + 1e-12))
        masks = {}
        for ladder, steps in zip(ladders, removed, strict=True):
            masks[ladder.name] = ladder.kept_mask(steps)
        return masks, self.polynomial.evaluate({name: int(mask.sum()) for name, mask in masks.items()})

    def explain_gap(self, masks: Mapping[str, Tensor], cost: float, per_layer: bool) -> str:
        """Why the plan stays below the target: the smallest step that would have come back."""
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        steps = {}
        for s in self.structures:
            more = min(s.units, (counts[s.name] // self.multiples[s.name] + 1) * self.multiples[s.name])
            if more > counts[s.name]:
                added = self.polynomial.evaluate({**counts, s.name: more}) - cost
                steps[s.name] = (added, more - counts[s.name])
        name = min(steps, key=lambda n: steps[n])
        share, size = steps[name][0] / self.dense, steps[name][1]
        rule = " in every structure of a kind (per_layer)" if per_layer else ""
        return (
            f"Expected to keep {self.metric}={self.fraction:g} of the prunable part, but the plan keeps "
            f"{cost / self.dense:.4f}: units come back whole{rule}, and the smallest step left is {size} unit(s) of "
            f"{name!r}, {share:.4f} of the cost. A smaller round_to, or more kinds, would allow smaller steps."
        )


def _target(params: float | None, macs: float | None, units: float | None) -> tuple[Metric, float]:
    given: dict[Metric, float] = {}
    if params is not None:
        given["params"] = params
    if macs is not None:
        given["macs"] = macs
    if units is not None:
        given["units"] = units
    if len(given) != 1:
        shown = ", ".join(f"{k}={v!r}" for k, v in given.items()) or "none"
        raise ValueError(f"Expected exactly one target among params, macs and units, but got {shown}.")
    ((metric, fraction),) = given.items()
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        hint = f" Did you mean {metric}={fraction / 100:g}?" if isinstance(fraction, int) and 1 < fraction < 100 else ""
        raise ValueError(f"Expected {metric} to be a kept fraction in (0, 1], but got {fraction!r}.{hint}")
    return metric, float(fraction)


def _check_prunable(structures: Structures, polynomial: Polynomial, metric: Metric) -> None:
    if not polynomial.terms:
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
