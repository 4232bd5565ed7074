"""Schedules as functions of progress, and the strength that meets a target in the steps that are left.

A *shape* maps progress in [0, 1] to the part of the way that is done: 0 at the beginning, 1 at the end, never falling.
`ramp` stretches a shape over a part of the run and between two values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Literal

Shape = Literal["linear", "cubic", "cosine", "constant"]


def linear(progress: float) -> float:
    r"""The shape :math:`p`.

    Raises:
        ValueError: if ``progress`` is outside [0, 1].

    >>> linear(0.25)
    0.25
    """
    return _checked_progress(progress)


def cubic(progress: float) -> float:
    r"""The shape :math:`1 - (1 - p)^3`: most of the way early, while there is much to choose from and time to recover.

    Raises:
        ValueError: if ``progress`` is outside [0, 1].

    References: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression";
    used by Sanh, Wolf & Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning".

    >>> cubic(0.5)
    0.875
    """
    return 1.0 - (1.0 - _checked_progress(progress)) ** 3


def cosine(progress: float) -> float:
    r"""The shape :math:`(1 - \cos \pi p) / 2`: slow at both ends.

    Raises:
        ValueError: if ``progress`` is outside [0, 1].

    >>> cosine(1.0)
    1.0
    """
    return 0.5 * (1.0 - math.cos(math.pi * _checked_progress(progress)))


def constant(progress: float) -> float:
    r"""The shape 1: the whole way at once.

    Raises:
        ValueError: if ``progress`` is outside [0, 1].

    >>> constant(0.0)
    1.0
    """
    _checked_progress(progress)
    return 1.0


SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "constant": constant,
}


def ramp(
    progress: float,
    start: float = 0.0,
    end: float = 1.0,
    begin_value: float = 0.0,
    end_value: float = 1.0,
    shape: Shape = "linear",
) -> float:
    r"""A value that goes from ``begin_value`` to ``end_value`` while progress goes from ``start`` to ``end``.

    .. math:: v = v_0 + (v_1 - v_0)\, \text{shape}\!\left(\frac{p - \text{start}}{\text{end} - \text{start}}\right)

    Before ``start`` it is exactly ``begin_value``, from ``end`` on exactly ``end_value``. With the shape "constant", or
    with ``start == end``, it is a jump at ``start``.

    Args:
        progress: part of the run that is done, in [0, 1].
        start: progress at which the ramp begins.
        end: progress at which it is over, ``0 <= start <= end <= 1``.
        begin_value: the value until ``start``.
        end_value: the value from ``end`` on.
        shape: a name in `SHAPES`.

    Raises:
        ValueError: if ``progress`` is outside [0, 1], ``start`` and ``end`` are not ordered within it, or the shape is
            unknown.

    >>> [ramp(p, start=0.2, end=0.6, begin_value=1.0, end_value=0.4) for p in (0.1, 0.4, 0.8)]
    [1.0, 0.7, 0.4]
    """
    progress = _checked_progress(progress)
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"Expected 0 <= start <= end <= 1, but got start={start} and end={end}.")
    if shape not in SHAPES:
        close = get_close_matches(str(shape), SHAPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected the shape to be one of {', '.join(map(repr, sorted(SHAPES)))}, but got {shape!r}.{hint}"
        )
    if progress < start:
        return begin_value
    if progress >= end:
        return end_value
    return begin_value + (end_value - begin_value) * SHAPES[shape]((progress - start) / (end - start))


def remaining_learning_rate(current: float, steps: int, final: float | None = None) -> float:
    r"""Sum of the learning rates of the steps that are left, if the rate is constant or falls linearly.

    .. math:: \sum_{i=0}^{n-1} \Bigl(\eta + (\eta_{\text{final}} - \eta)\, \frac{i}{n}\Bigr)
        = n \eta + (\eta_{\text{final}} - \eta)\, \frac{n - 1}{2}

    Under another schedule this is a forecast that gets better as the end comes near; asked again from time to time, as
    a controller does, it needs no knowledge of the scheduler. Where the schedule is known, sum it instead.

    Args:
        current: learning rate of the next step, >= 0.
        steps: optimizer steps that are left, n >= 0.
        final: learning rate that a linear schedule reaches after the last of them, >= 0. Default: ``current``.

    Raises:
        ValueError: if a learning rate is negative or not finite, or ``steps`` is negative.

    >>> remaining_learning_rate(0.1, steps=4, final=0.0)  # 0.1 + 0.075 + 0.05 + 0.025
    0.25
    """
    final = current if final is None else final
    for name, rate in (("current", current), ("final", final)):
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"Expected the learning rate {name} to be finite and at least 0, but got {rate}.")
    if steps < 0:
        raise ValueError(f"Expected steps, the optimizer steps that are left, to be at least 0, but got {steps}.")
    return steps * current + (final - current) * max(steps - 1, 0) / 2


def strength_to_reach(threshold: float, learning_rate_sum: float) -> float:
    r"""Strength with which the group lasso's proximal steps bring every group below a threshold to zero in time.

    Without gradients each step t takes :math:`\eta_t \lambda w_g` off a group's norm :math:`s_g`, so that after the
    remaining steps exactly the groups with :math:`s_g / w_g \le \tau` are zero if

    .. math:: \lambda = \tau \Big/ \sum_t \eta_t

    Gradients move the norms meanwhile, and rounding decides about a group exactly at the threshold: put the threshold
    in the gap between the last group to go and the first to stay, and ask again every few steps.

    Args:
        threshold: :math:`\tau`, in units of norm over weight, >= 0.
        learning_rate_sum: sum of the learning rates of the remaining steps, > 0; see `remaining_learning_rate`.

    Raises:
        ValueError: if ``threshold`` is negative, ``learning_rate_sum`` is not positive, or one of them is not finite.

    >>> strength_to_reach(0.5, remaining_learning_rate(0.1, steps=10))
    0.5
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"Expected threshold to be finite and at least 0, but got {threshold}.")
    if not (math.isfinite(learning_rate_sum) and learning_rate_sum > 0):
        raise ValueError(
            f"Expected learning_rate_sum to be finite and above 0, but got {learning_rate_sum}. With no steps left, or "
            "a learning rate of 0, no strength moves a weight: start earlier."
        )
    return threshold / learning_rate_sum


def _checked_progress(progress: float) -> float:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"Expected progress, the part of the run that is done, to be in [0, 1], but got {progress}.")
    return progress
