"""The search behind the budget: how many units of each structure go, so that a cost polynomial meets a bound.

Inside a structure the order is given: units with smaller scores go first, in steps of whole multiples. What is searched
is how far down its *ladder* of steps each structure goes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_compress.polynomials import Polynomial

# Where steps are coarse: how many more steps of one structure are tried so that others fit better.
LARGEST_DETOUR = 4


@dataclass(frozen=True)
class Ladder:
    """The removal steps of one structure.

    Args:
        name: name of the structure, its variable in the cost polynomial.
        kind: its kind.
        units: its number of units.
        order: unit numbers by increasing score, shape (units,); ties by unit number.
        sizes: units that go with each step; the first may be smaller, so that what stays is a multiple.
        losses: sum of the scores of the units of each step.
        left: units left after 0, 1, 2, ... steps.
        widths: what these count for in the cost: the units themselves, or what a measured curve makes of them.
    """

    name: str
    kind: str
    units: int
    order: Tensor
    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    left: tuple[int, ...]
    widths: tuple[float, ...]

    @classmethod
    def of(
        cls,
        name: str,
        kind: str,
        scores: Tensor,
        multiple: int,
        floor: int,
        width: Callable[[int], float] = float,
    ) -> Ladder:
        """Steps that keep at least ``floor`` units, and multiples of ``multiple`` once anything goes."""
        units = scores.numel()
        order = torch.argsort(scores, stable=True)
        left = [units, *range((units - 1) // multiple * multiple, floor - 1, -multiple)] if floor < units else [units]
        sizes = tuple(a - b for a, b in pairwise(left))
        # sums of the smallest scores; the loss of a step is the difference of two of them
        sums = [0.0, *torch.cumsum(scores[order], 0).tolist()]
        losses = tuple(sums[units - b] - sums[units - a] for a, b in pairwise(left))
        return cls(name, kind, units, order, sizes, losses, tuple(left), tuple(width(n) for n in left))

    @property
    def unit_width(self) -> float:
        """What one unit counts for on the way down: 1, or the mean slope of a measured curve."""
        removed = self.left[0] - self.left[-1]
        return (self.widths[0] - self.widths[-1]) / removed if removed else 1.0

    def kept_mask(self, steps: int) -> Tensor:
        """Bool of shape (units,): what stays after the first ``steps`` steps."""
        mask = torch.ones(self.units, dtype=torch.bool)
        mask[self.order[: self.units - self.left[steps]]] = False
        return mask


class _State:
    """How far each ladder has been gone down, and what the counts that are left cost."""

    def __init__(self, ladders: Sequence[Ladder], polynomial: Polynomial, removed: Sequence[int] | None = None) -> None:
        self.ladders = ladders
        self.removed = [0] * len(ladders) if removed is None else list(removed)
        self.counts = [ladder.widths[steps] for ladder, steps in zip(ladders, self.removed, strict=True)]
        number = {ladder.name: i for i, ladder in enumerate(ladders)}
        # per structure the monomials in which it occurs: (coefficient, its power, numbers of the other variables)
        self.terms: list[list[tuple[float, int, tuple[int, ...]]]] = [[] for _ in ladders]
        for names, coefficient in polynomial:
            for name in set(names):
                others = tuple(number[other] for other in names if other != name)
                self.terms[number[name]].append((coefficient, names.count(name), others))
        self.cost = polynomial.evaluate(dict(zip(number, self.counts, strict=True)))

    def change(self, i: int, size: float) -> float:
        """How much the cost falls when structure ``i`` loses the width ``size``; negative where it gains some."""
        counts = self.counts
        count = counts[i]
        total = 0.0
        for coefficient, power, others in self.terms[i]:
            value = coefficient * (size if power == 1 else count**power - (count - size) ** power)
            for other in others:
                value *= counts[other]
            total += value
        return total

    def down(self, i: int) -> None:
        """Take the next step of structure ``i``."""
        widths, steps = self.ladders[i].widths, self.removed[i]
        self.cost -= self.change(i, widths[steps] - widths[steps + 1])
        self.counts[i] = widths[steps + 1]
        self.removed[i] += 1

    def added(self, i: int) -> float:
        """How much the cost rises when the last step of structure ``i`` is taken back."""
        widths, steps = self.ladders[i].widths, self.removed[i]
        return -self.change(i, widths[steps] - widths[steps - 1])

    def up(self, i: int) -> None:
        """Take back the last step of structure ``i``."""
        self.cost += self.added(i)
        self.removed[i] -= 1
        self.counts[i] = self.ladders[i].widths[self.removed[i]]

    def copy(self) -> _State:
        other = _State.__new__(_State)
        other.__dict__.update(self.__dict__, removed=list(self.removed), counts=list(self.counts))
        return other


def choose_global(
    ladders: Sequence[Ladder], polynomial: Polynomial, budget: float, tolerance: float = 0.01
) -> list[int]:
    """Steps to go down each ladder: smallest score per cost first, until the cost is at most ``budget``.

    The cost of a unit that orders the steps is what it costs in the whole model. When half of the heads are gone, a V/O
    dim saves half as much, but half of its weights are gone too: what other structures remove takes its share of the
    score and of the cost alike, and their ratio stays. (Dividing the old score by the new cost would make the kind that
    happened to begin go to its end: all heads, of one dim each.) How far to go is decided by the true cost.

    The last step overshoots; the best steps that fit are taken back. Where even that leaves the cost more than
    ``tolerance`` under the budget, a few more steps of some structure are tried, with a refill, and the best outcome
    stays.

    Args:
        ladders: steps of every structure.
        polynomial: cost in the kept counts, with coefficients that are not negative.
        budget: bound on the cost; must be within reach of the ladders.
        tolerance: a cost of at least (1 - tolerance) * budget is near enough.
    """
    state = _State(ladders, polynomial)
    if state.cost <= budget:
        return state.removed
    ratios = []
    for i, ladder in enumerate(ladders):
        if ladder.sizes:
            cost = state.change(i, ladder.unit_width)
            ratios += [loss / (size * cost) for loss, size in zip(ladder.losses, ladder.sizes, strict=True)]
    # owners of all steps, best to remove first; the sort is stable, so the steps of one ladder stay in order
    owners = torch.repeat_interleave(torch.tensor([len(ladder.sizes) for ladder in ladders]))
    owners = owners[torch.argsort(torch.tensor(ratios, dtype=torch.float64), stable=True)]

    def after(number: int) -> _State:
        removed = torch.bincount(owners[:number], minlength=len(ladders)).tolist()
        return _State(ladders, polynomial, removed)

    number = bisect_left(range(len(owners)), True, key=lambda n: after(n).cost <= budget)
    state, path = after(number), owners[:number].tolist()
    _refill(state, path, budget)
    if state.cost < (1 - tolerance) * budget:
        state = _best_neighbour(state, path, budget, tolerance)
    return state.removed


def _refill(state: _State, path: Sequence[int], budget: float, without: int = -1) -> None:
    """Take back the steps of ``path``, last first, that fit; of a structure whose step did not fit no other can."""
    open_ = {i for i in path if i != without}
    for i in reversed(path):
        if i not in open_ or not state.removed[i]:
            continue
        if state.cost + state.added(i) <= budget:
            state.up(i)
        else:
            open_.discard(i)
            if not open_:
                break


def _best_neighbour(state: _State, path: Sequence[int], budget: float, tolerance: float) -> _State:
    """The best of ``state`` and the states with a few more steps of one structure, refilled with others.

    A refill begins with the best steps, or, where the search is small, with a step of each other structure in turn.
    Among those within the tolerance the one that moves the least cost between structures; otherwise the one nearest to
    the budget.
    """
    enough = (1 - tolerance) * budget
    costs = [state.change(i, 1) for i in range(len(state.ladders))]

    def rank(candidate: _State) -> tuple[bool, float]:
        if candidate.cost < enough:
            return True, -candidate.cost
        changes = zip(costs, candidate.counts, state.counts, strict=True)
        return False, sum(cost * abs(new - old) for cost, new, old in changes)

    # steps of the path that are still gone, in its order: those that a refill may take back
    left, gone = list(state.removed), []
    for i in path:
        if left[i]:
            gone.append(i)
            left[i] -= 1
    number = len(state.ladders)
    small = number**2 * len(gone) <= 200_000
    candidates = [state]
    for i, ladder in enumerate(state.ladders):
        lower = state.copy()
        for _ in range(min(LARGEST_DETOUR, len(ladder.sizes) - state.removed[i])):
            lower.down(i)
            for first in (None, *range(number)) if small else (None,):
                candidate = lower.copy()
                if first is not None and first != i and candidate.removed[first]:
                    candidate.up(first)
                    if candidate.cost > budget:
                        continue
                _refill(candidate, gone, budget, without=i)
                candidates.append(candidate)
    return min(candidates, key=rank)


def choose_uniform(ladders: Sequence[Ladder], polynomial: Polynomial, budget: float) -> list[int]:
    """Steps to go down each ladder so that all structures of a kind keep the same fraction of their units.

    First the largest fraction, common to all kinds, whose cost fits; then, since the kind with few units moves in large
    steps, the fraction of each kind in turn, the one with the most units first, is raised as far as fits.

    Args:
        ladders: steps of every structure.
        polynomial: cost in the kept counts, with coefficients that are not negative.
        budget: bound on the cost; must be within reach of the ladders.
    """
    totals: dict[str, int] = {}
    for ladder in ladders:
        totals[ladder.kind] = totals.get(ladder.kind, 0) + ladder.units
    kinds = sorted(totals, key=lambda kind: -totals[kind])

    def steps(fractions: dict[str, float]) -> list[int]:
        return [_steps_to(ladder, fractions[ladder.kind]) for ladder in ladders]

    def fits(fractions: dict[str, float]) -> bool:
        counts = {ladder.name: ladder.widths[n] for ladder, n in zip(ladders, steps(fractions), strict=True)}
        return polynomial.evaluate(counts) <= budget

    common = _largest(lambda q: fits(dict.fromkeys(kinds, q)), 0.0)
    fractions = dict.fromkeys(kinds, common)
    for kind in kinds:
        fractions[kind] = _largest(lambda q, kind=kind: fits({**fractions, kind: q}), fractions[kind])  # type: ignore[misc]
    return steps(fractions)


def _steps_to(ladder: Ladder, fraction: float) -> int:
    """Fewest steps after which at most ``fraction`` of the units are left, or all steps."""
    # a fraction such as 1/3 comes with rounding error: 4 of 12 units are a third
    most = fraction * ladder.units * (1 + 1e-9)
    return min(bisect_left(ladder.left, -most, key=lambda left: -left), len(ladder.sizes))


def _largest(fits: Callable[[float], bool], low: float) -> float:
    """Largest fraction in [low, 1] that fits, to 40 binary digits, where ``low`` fits."""
    if fits(1.0):
        return 1.0
    high = 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
