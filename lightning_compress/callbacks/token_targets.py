"""Policies with one number to turn, and the number for which a budget of multiply-accumulates is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_compress.token_policies import Thresholds, TokenPolicy, TopK
from lightning_compress.token_scores import linear_ramp
from lightning_compress.tokens.calibration import bisect_shift

Measure = Callable[[TokenPolicy], float]
Family = Callable[[float], TokenPolicy]  # the larger the number, the fewer tokens stay

TOLERANCE = 0.01  # of the budget
CLOSE = 0.003  # a calibration ends here
FAR = 100.0  # steps end here
FLOOR = 0.01


def shifted(policy: Thresholds, scales: Sequence[float]) -> Family:
    """All thresholds moved by one number of their scales."""

    def moved(shift: float) -> TokenPolicy:
        return replace(policy, values=tuple(t + shift * c for t, c in zip(policy.values, scales, strict=True)))

    return moved


def ramped(layers: int) -> Family:
    """Thresholds that grow linearly with the layer, to this number."""
    return lambda final: Thresholds(linear_ramp(final, layers)[: layers - 1])


def cascade(layers: int, whole: int) -> Family:
    """Rates that fall by this number from layer to layer, behind some layers that keep all."""

    def policy(step: float) -> TopK:
        return TopK(tuple(min(1.0, max(FLOOR, 1 - step * max(0, n - whole + 1))) for n in range(layers - 1)))

    return policy


def meet(measure: Measure, family: Family, start: float, step: float, target: float) -> tuple[TokenPolicy, float]:
    """The member of a family whose cost comes closest to ``target`` and not above it, and that cost.

    Where the target cannot be reached it is the cheapest member that was looked at.

    Args:
        measure: relative cost of a policy.
        family: the policies.
        start: number to begin with.
        step: first step away from it, doubled until the target lies between two numbers.
        target: relative cost.
    """
    costs: dict[float, float] = {}

    def cost(number: float) -> float:
        if number not in costs:
            costs[number] = measure(family(number))
        return costs[number]

    near, far = start, start
    direction = 1.0 if cost(start) > target else -1.0
    while (cost(far) - target) * direction > 0 and step < FAR:
        near, far, step = far, far + direction * step, 2 * step
    if near == far:
        return family(near), cost(near)
    low, high = min(near, far), max(near, far)
    if min(cost(low), cost(high)) > target:
        return family(far), cost(far)
    number, found = bisect_shift(cost, target, low, high, tolerance=CLOSE * target)
    return family(number), found


def top_k_for(measure: Measure, layers: int, target: float) -> tuple[TokenPolicy, float]:
    """Rates of a cascade that meets the target.

    As many layers as the re-implementation of SpAtten leaves whole, 15 % and at least 3, are left whole here, or fewer
    where a shallow stack could not meet the target without taking nearly everything at once.
    """
    for whole in range(min(layers - 2, max(3, math.ceil(0.15 * layers))), -1, -1):
        family = cascade(layers, whole)
        # the steepest cascade in which the last decision is not cut off by the floor
        steepest = (1 - FLOOR) / (layers - 1 - whole)
        if whole == 0 or measure(family(steepest)) <= target * (1 + CLOSE):
            return meet(measure, family, steepest / 2, steepest / 2, target)
    raise AssertionError("unreachable")


__all__ = ["TOLERANCE", "Family", "Measure", "cascade", "meet", "ramped", "shifted", "top_k_for"]
