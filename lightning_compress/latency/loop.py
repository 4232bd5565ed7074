"""Meeting a latency: plan by the table, measure the planned model against the reference, correct, plan again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_compress.latency.measuring import Measure, narrowed_copy
from lightning_compress.structures import Structures
from lightning_compress.timing import Latency, measure_latency

# A plan meets a latency within this fraction; the loop stops a little earlier, so that the next measurement agrees.
TOLERANCE = 0.05
NEAR_ENOUGH = 0.025
ROUNDS = 5


@dataclass(frozen=True)
class LatencyGoal:
    """A latency to be met on this device by a measured call.

    Args:
        fraction: of the latency of the reference; or
        seconds: absolute. Exactly one of the two.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        reference: the model that is compared with; None for the model that the plan is made for.
        max_seconds: measure about so long in all rounds together.
        context: makes a context to measure in, such as autocast.
        measure: what measures, ``timing.measure_latency``.
    """

    fraction: float | None = None
    seconds: float | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference: nn.Module | None = None
    max_seconds: float = 30.0
    context: Callable[[], AbstractContextManager[Any]] | None = None
    measure: Measure = measure_latency


@dataclass(frozen=True)
class LatencyMet:
    """How well a plan meets a latency.

    Args:
        kept: structure name -> bool of shape (units,), what stays.
        ratio: measured latency over the one that was asked for.
        small: measured latency of the planned model.
        dense: measured latency of the reference.
        rounds: measurements made.
        stuck: why no other plan was tried after the last; "" where one was near enough.
    """

    kept: Mapping[str, Tensor]
    ratio: float
    small: Latency
    dense: Latency
    rounds: int
    stuck: str = ""

    @property
    def met(self) -> bool:
        """Whether the latency is within 5 % of what was asked for."""
        return abs(self.ratio - 1) <= TOLERANCE


def meet(
    goal: LatencyGoal,
    model: nn.Module,
    structures: Structures,
    solve: Callable[[float], Mapping[str, Tensor]],
    start: float,
    smallest: float,
) -> LatencyMet:
    """The plan whose measured latency is nearest to the goal, after a bounded number of rounds.

    Args:
        goal: what is to be met.
        model: the model that the plan is for.
        structures: its structures, proven.
        solve: estimated latency that may be kept -> kept masks.
        start: estimate to begin with.
        smallest: smallest estimate within reach.
    """
    best: LatencyMet | None = None
    tried: dict[tuple[int, ...], None] = {}
    seen: list[tuple[float, float]] = []  # (estimate, measured / goal)
    estimate, stuck = min(1.0, max(start, smallest)), ""
    for number in range(1, ROUNDS + 1):
        kept = solve(estimate)
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        if (plan := tuple(counts.values())) in tried:
            stuck = "the next plan is one that was measured already: a smaller round_to would allow smaller steps"
            break
        tried[plan] = None
        times = goal.measure(
            {"dense": goal.reference or model, "small": narrowed_copy(model, structures, counts)},
            goal.args,
            goal.kwargs,
            repeats=101,
            warmup=1,
            max_seconds=goal.max_seconds / ROUNDS,
            context=goal.context() if goal.context is not None else None,
        )
        dense, small = times["dense"], times["small"]
        wanted = goal.seconds if goal.seconds is not None else (goal.fraction or 1.0) * dense.seconds
        ratio = small.seconds / wanted
        if best is None or abs(ratio - 1) < abs(best.ratio - 1):
            best = LatencyMet(kept, ratio, small, dense, number)
        if abs(ratio - 1) <= NEAR_ENOUGH:
            return best
        seen.append((estimate, ratio))
        following = min(1.0, max(next_estimate(seen), smallest))
        if following == estimate:
            stuck = "nothing smaller is within reach" if ratio > 1 else "nothing is removed any more"
            break
        estimate = following
    assert best is not None
    if not stuck:
        stuck = f"{ROUNDS} rounds of measuring and correcting did not bring it nearer"
    return LatencyMet(best.kept, best.ratio, best.small, best.dense, len(seen), stuck)


def next_estimate(seen: Sequence[tuple[float, float]]) -> float:
    """The estimate at which the measured latency should be the goal.

    Between measurements on both sides of the goal by interpolation, in logarithms; else in proportion to the last.

    Args:
        seen: (estimate, measured / goal) of each round, one or more.
    """
    below = max((s for s in seen if s[1] <= 1), default=None)
    above = min((s for s in seen if s[1] > 1), default=None)
    if below is not None and above is not None and below[0] < above[0]:
        share = math.log(1 / below[1]) / math.log(above[1] / below[1])
        # away from the ends: a bracket that shrinks on one side only takes long
        share = min(max(share, 0.1), 0.9)
        return below[0] * (above[0] / below[0]) ** share
    estimate, ratio = seen[-1]
    return estimate / ratio
