"""Meeting a latency: plan by the table, measure the planned model against the reference, correct, plan again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_compress.latency.measuring import Measure, narrowed_copy
from lightning_compress.progress import Progress, quiet
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.structures import Structures
from lightning_compress.timing import Latency, measure_latency
from lightning_compress.token_switch import tokens_off

# A plan meets a latency within this fraction; the loop stops a little earlier, so that the next measurement agrees.
TOLERANCE = 0.05
NEAR_ENOUGH = 0.025
ROUNDS = 6
# A plan that seems right by a measurement with a larger standard error than this is measured a second time.
CERTAIN = 0.015


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
        measure: what measures, ``timing.measure_latency`` or what is called like it.
        progress: wraps the rounds, at most as many as it is told, and what is measured in each.
    """

    fraction: float | None = None
    seconds: float | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference: nn.Module | None = None
    max_seconds: float = 30.0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    measure: Measure = measure_latency
    progress: Progress = quiet


@dataclass(frozen=True)
class LatencyMet:
    """How well a plan meets a latency.

    Args:
        kept: structure name -> bool of shape (units,), what stays.
        ratio: measured latency over the one that was asked for; over all measurements of the plan.
        small: measured latency of the planned model, the last time.
        dense: measured latency of the reference, then.
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


@dataclass
class _Try:
    """One plan and what was measured of it."""

    estimate: float
    kept: Mapping[str, Tensor]
    ratios: list[float] = field(default_factory=list)  # measured / goal
    times: list[dict[str, Latency]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return math.prod(self.ratios) ** (1 / len(self.ratios))

    @property
    def near(self) -> bool:
        return abs(self.ratio - 1) <= NEAR_ENOUGH

    @property
    def certain(self) -> bool:
        """Whether another measurement would tell little more."""
        small, dense = self.times[-1]["small"], self.times[-1]["dense"]
        error = 1.85 * math.hypot(small.spread, dense.spread) / math.sqrt(max(1, small.runs))
        return len(self.ratios) > 1 or error <= CERTAIN

    def met(self, rounds: int, stuck: str = "") -> LatencyMet:
        return LatencyMet(self.kept, self.ratio, self.times[-1]["small"], self.times[-1]["dense"], rounds, stuck)


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
    tries: dict[tuple[int, ...], _Try] = {}  # by kept counts, the last one measured at the end
    uncertain: _Try | None = None
    estimate, rounds = min(1.0, max(start, smallest)), 0
    stuck = f"{ROUNDS} rounds of measuring and correcting did not bring it nearer"
    for _ in goal.progress(range(ROUNDS), "plans measured, at most"):
        kept = solve(estimate)
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        plan = tuple(counts.values())
        tried = tries.pop(plan, None) or _Try(estimate, kept)
        tries[plan] = tried
        if tried.ratios and tried is not uncertain:
            stuck = "the next plan is one that was measured already: a smaller round_to would allow smaller steps"
            break
        with tokens_off(), quantization_off():
            times = goal.measure(
                {"dense": goal.reference or model, "small": narrowed_copy(model, structures, counts)},
                goal.args,
                goal.kwargs,
                repeats=101,
                warmup=1,
                max_seconds=goal.max_seconds / ROUNDS,
                context=goal.context(),
                progress=goal.progress,
            )
        rounds += 1
        wanted = goal.seconds if goal.seconds is not None else (goal.fraction or 1.0) * times["dense"].seconds
        tried.ratios.append(times["small"].seconds / wanted)
        tried.times.append(times)
        uncertain = None
        if tried.near:
            if tried.certain:
                return tried.met(rounds)
            uncertain = tried
            continue
        following = min(1.0, max(next_estimate([(t.estimate, t.ratio) for t in tries.values()]), smallest))
        if following == estimate:
            stuck = "nothing smaller is within reach" if tried.ratio > 1 else "nothing is removed any more"
            break
        estimate = following
    return min(tries.values(), key=lambda t: abs(t.ratio - 1)).met(rounds, stuck)


def next_estimate(seen: Sequence[tuple[float, float]]) -> float:
    """The estimate at which the measured latency should be the goal.

    Linear between measurements on both sides of the goal, and beyond the last two where these agree that less work
    takes less time: what a wrong table lacks is mostly a constant. Else in proportion to the last.

    Args:
        seen: (estimate, measured / goal) of each round, one or more.
    """
    estimate, ratio = seen[-1]
    below = max((s for s in seen if s[1] <= 1), default=None)
    above = min((s for s in seen if s[1] > 1), default=None)
    if below is not None and above is not None:
        if below[0] >= above[0]:
            return estimate / ratio  # noise: the sides are the wrong way round
        # away from the ends: a bracket that shrinks on one side only takes long
        share = min(max((1 - below[1]) / (above[1] - below[1]), 0.1), 0.9)
        return below[0] + (above[0] - below[0]) * share
    if len(seen) > 1:
        before, other = seen[-2]
        if (ratio - other) * (estimate - before) > 0:
            return estimate + (1 - ratio) * (estimate - before) / (ratio - other)
    return estimate / ratio
