"""Finding the number, a common shift of thresholds or a final rate, at which what is measured meets a target."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

ROUNDING = 1e-9


def bisect_shift(
    measure: Callable[[float], float],
    target: float,
    low: float,
    high: float,
    tolerance: float = 0.005,
    steps: int = 30,
) -> tuple[float, float]:
    r"""The number between ``low`` and ``high`` whose measured value comes closest to the target and not above it.

    Halves the interval between a number that meets the target and one that does not:

    .. math:: \max_x f(x) \quad \text{subject to} \quad f(x) \le \tau, \quad l \le x \le h

    The function may rise or fall. It may have steps, as decisions on finitely many tokens have; where one leads across
    the target, its lower side is returned. Small deviations from monotony do no harm: what is returned was measured,
    and is the best of all that was measured.

    Args:
        measure: :math:`f`, called at most ``steps`` + 2 times, never twice with the same number.
        target: :math:`\tau`.
        low: least number.
        high: greatest number.
        tolerance: the search ends when the measured value lies so closely below the target.
        steps: most halvings.

    Returns:
        The number, and what was measured with it: the target is met within ``tolerance``, or on the lower side of a
        step, or the whole interval stays below it.

    Raises:
        ValueError: if the target lies below what can be measured (the message has the least value), for measured values
            that are not finite, and for an empty interval, a negative tolerance or no steps.

    >>> bisect_shift(lambda shift: 1 - shift / 4, target=0.5, low=0.0, high=4.0)
    (2.0, 0.5)
    """
    if not (isfinite(low) and isfinite(high) and low < high):
        raise ValueError(f"Expected an interval with low < high, both finite, but got low={low}, high={high}.")
    if not tolerance >= 0 or steps < 1 or not isfinite(target):
        raise ValueError(
            f"Expected a finite target, a tolerance of at least 0 and at least one step, but got target={target}, "
            f"tolerance={tolerance}, steps={steps}."
        )

    def measured(number: float) -> tuple[float, float]:
        value = float(measure(number))
        if not isfinite(value):
            raise ValueError(f"Expected a finite measured value, but got {value} with {number:.6g}.")
        return number, value

    ends = sorted((measured(low), measured(high)), key=lambda pair: pair[1])
    (inside, least), (outside, most) = ends
    if least > target + ROUNDING:
        raise ValueError(
            f"Expected a target that can be reached, but between {low:.6g} and {high:.6g} the smallest possible value "
            f"is {least:.4f}, and the target {target:.4f}: tokens that are protected, the first layer, which always "
            "gets all tokens, and the fewest tokens to keep set the limit. Raise the target, or protect fewer tokens."
        )
    best = (outside, most) if most <= target + ROUNDING else (inside, least)
    if best[0] == outside:
        return best
    for _ in range(steps):
        if target - best[1] <= tolerance:
            break
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            break
        tried = measured(middle)
        if tried[1] <= target + ROUNDING:
            inside = middle
            best = tried if tried[1] >= best[1] else best
        else:
            outside = middle
    return best


__all__ = ["bisect_shift"]
