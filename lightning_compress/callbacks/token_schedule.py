"""The soft stage of learned token pruning: what happens at which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_compress.token_scores import from_padded_scale, linear_ramp
from lightning_compress.tokens.observation import ScoreSpread

Mode = Literal["recommended", "faithful"]

# what the authors of learned token pruning run, on sequences padded to 128 tokens
PADDED_LENGTH = 128
PAPER_TEMPERATURE = 1e-3
PAPER_LEARNING_RATE = 2e-5
PAPER_FINAL_THRESHOLD = 0.01
PAPER_STRENGTH = 0.1

TRAVEL = 8.0  # how far a threshold must be able to go in the soft stage where nothing else moves it, in scales
LEARNING_RATE = 1e-2  # the same, in a step at least
FINE_RATE = 2e-3  # where a budget shifts them, and only differences are learned
TILT = 1.0  # by so many scales the first thresholds are lower, and the last ones higher, than those in the middle
BELOW = 4.0  # so many scales below the median score of its layer a threshold begins
LAST_PART = 2 / 3  # from here on the target is met
# From here on decisions are hard in the forward pass. Before that a mask that is the same for all tokens costs the task
# nothing, as a softmax and a weighted mean do not see it, but it is as cheap as half of the tokens: so not for long.
STRAIGHT_PART = 0.2
WHOLE = -1e4  # a threshold that no score lies below


@dataclass(frozen=True)
class SoftSchedule:
    """Settings of the soft stage by position in it, from 0 to 1.

    Args:
        mode: "recommended" or "faithful", as published.
        temperature: first and last temperature, in units of the spread of the scores of a layer; "faithful": of the
            mean score. By the mode if None.
        learning_rate: of the thresholds, in the same units; by the mode if None.
    """

    mode: Mode
    temperature: tuple[float, float] | None = None
    learning_rate: float | None = None

    def temperature_at(self, position: float) -> float:
        """Annealed geometrically; as published it stays."""
        if self.temperature is not None:
            first, last = self.temperature
        elif self.mode == "faithful":
            first = last = from_padded_scale(PAPER_TEMPERATURE, PADDED_LENGTH)
        else:
            first, last = 1.0, 0.1
        return first * (last / first) ** min(1.0, max(0.0, position))

    @property
    def among_rest(self) -> bool:
        """Whether thresholds are of scores relative to the tokens that may leave; as published relative to all."""
        return self.mode == "recommended"

    def straight_through_at(self, position: float) -> bool:
        """Whether the forward pass takes hard decisions; as published never."""
        return self.mode == "recommended" and position >= STRAIGHT_PART

    def target_at(self, position: float, macs: float) -> float:
        """Relative multiply-accumulates to be met."""
        return 1 - (1 - macs) * min(1.0, max(0.0, position) / LAST_PART)

    def learning_rate_at(self, position: float, steps: float, budget: bool = True) -> float:
        """Of the thresholds, in a soft stage of so many optimizer steps.

        Adam goes about one learning rate in a step: without a budget, which shifts them, the default is larger in a
        short stage, so that thresholds can get anywhere. As published it decays linearly.
        """
        if self.mode == "faithful":
            rate = self.learning_rate
            if rate is None:
                rate = from_padded_scale(PAPER_LEARNING_RATE, PADDED_LENGTH)
            return rate * max(0.0, 1 - position)
        if self.learning_rate is not None:
            return self.learning_rate
        return FINE_RATE if budget else max(LEARNING_RATE, TRAVEL / max(1.0, steps))

    def first_thresholds(
        self, spreads: Sequence[ScoreSpread], whole: bool = False
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Thresholds at the begin, one after each layer but the last, and their scales.

        Deep layers give most of their attention to a few tokens, so that the scores of all others are small and alike:
        a temperature and a threshold in units of the mean would take all of them or none. So both are in units of the
        spread of the layer's own scores, and begin where hardly any token is touched: lower in the first layers and
        higher in the last ones, which can do with fewer tokens. As published they are a ramp, and the first layer lets
        every token through, whatever its threshold becomes.

        Args:
            spreads: of the scores of each layer that decides.
            whole: whether the first layer, whose attention knows words and no context, lets every token through.
        """
        if self.mode == "faithful":
            final = from_padded_scale(PAPER_FINAL_THRESHOLD, PADDED_LENGTH)
            ramp = linear_ramp(final, len(spreads) + 1)[: len(spreads)]
            return (WHOLE, *ramp[1:]), (1.0,) * len(spreads)
        first = int(whole)
        last = max(1, len(spreads) - 1 - first)
        slope = (TILT * (2 * (n - first) / last - 1) - BELOW for n in range(len(spreads)))
        values = tuple(s.median + x * s.spread for s, x in zip(spreads, slope, strict=True))
        return (WHOLE, *values[1:]) if whole else values, tuple(s.spread for s in spreads)


__all__ = [
    "LAST_PART",
    "PADDED_LENGTH",
    "PAPER_FINAL_THRESHOLD",
    "PAPER_STRENGTH",
    "WHOLE",
    "Mode",
    "SoftSchedule",
]
