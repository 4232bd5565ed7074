"""What hard decisions cost on recent calls, and the policy that meets a budget there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.token_calls import TokenCall, measure_tokens
from lightning_compress.callbacks.token_schedule import SoftSchedule
from lightning_compress.callbacks.token_targets import TOLERANCE, Measure, meet, ramped, shifted, top_k_for
from lightning_compress.token_policies import Thresholds, TokenPolicy
from lightning_compress.tokens.costs import LayerCosts, relative_macs
from lightning_compress.tokens.distribution import TokenDistribution
from lightning_compress.tokens.observation import ScoreObserver, ScoreSpread
from lightning_compress.tokens.runtime import TokenRuntime

Method = Literal["learned", "top_k", "linear"]
WHOLE_PART = 0.6  # of the budget: what is left by the other layers at the least must not be more, or they get too steep


@dataclass(frozen=True)
class TokenMeter:
    """Measures policies with the calls that were seen last.

    Args:
        traced: the module whose tokens are pruned.
        runtime: what is installed on it; its policy is set.
        calls: recent calls of the module.
        costs: of its layers.
        processes: those of the fit; all of them measure.
        context: the precision in which the module runs.
    """

    traced: nn.Module
    runtime: TokenRuntime
    calls: Sequence[TokenCall]
    costs: LayerCosts
    processes: Processes
    context: Callable[[], AbstractContextManager[Any]]

    def measure(self, policy: TokenPolicy) -> TokenDistribution:
        """What ``policy``, which is left on the runtime, keeps."""
        self.runtime.policy = policy
        return measure_tokens(self.traced, self.runtime, list(self.calls), self.costs, self.processes, self.context())

    def first_thresholds(
        self, schedule: SoftSchedule, decisions: int, macs: float | None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The first thresholds and their scales, by the scores that tokens have where all of them stay.

        Args:
            schedule: of the soft stage.
            decisions: number of layers after which tokens may leave.
            macs: the budget, if there is one.
        """
        observer = ScoreObserver(decisions)
        whole = decisions > 1
        if self.calls:
            found = self.measure(observer)
            if macs is not None:
                # the first layer may let every token through if the others can still meet the budget
                entering = found.entering.clone()
                entering[2:] = min(1.0, float(found.real.min()))
                whole = whole and relative_macs(self.costs, entering, found.real) <= WHOLE_PART * macs
        device = next((p.device for p in self.traced.parameters()), None)
        own = observer.spreads().float().to(device)
        spreads = self.processes.mean("average the spread of scores", own).tolist()
        return schedule.first_thresholds([ScoreSpread(*row) for row in spreads], whole)

    def calibrated(
        self, policy: TokenPolicy, method: Method, macs: float | None, scales: Sequence[float] | None = None
    ) -> TokenDistribution:
        """Measure a policy, and put one in its place that meets the budget if it is missed by more than 1 %.

        Args:
            policy: the one in force.
            method: the family in which the other is looked for: thresholds shifted together, shares of the tokens, or
                thresholds that grow linearly.
            macs: the budget; None for none.
            scales: of the thresholds, by which they are shifted.
        """
        found = self.measure(policy)
        if macs is not None and abs(found.relative_macs - macs) > TOLERANCE * macs:
            chosen, _ = self._meet(policy, method, macs, scales)
            found = self.measure(chosen)
            if abs(found.relative_macs - macs) > TOLERANCE * macs:
                rank_zero_warn(
                    f"Expected token pruning to meet macs={macs:g} within 1 %, but {found.relative_macs:.3f} of the "
                    f"multiply-accumulates of the layers is the closest on {len(self.calls)} batches: the protected "
                    "tokens, min_keep and the first layer stay. Lower the target of the structures instead, or protect "
                    "less."
                )
        rank_zero_info(
            f"TokenPruning: {found.relative_macs:.3f} of the multiply-accumulates of the layers at real lengths."
        )
        return found

    def _meet(
        self, policy: TokenPolicy, method: Method, macs: float, scales: Sequence[float] | None
    ) -> tuple[TokenPolicy, float]:
        layers = len(self.runtime.stack.layers)
        measure: Measure = lambda tried: self.measure(tried).relative_macs  # noqa: E731
        if method == "top_k":
            return top_k_for(measure, layers, macs)
        if method == "linear":
            return meet(measure, ramped(layers), 1.0, 0.25, macs)
        assert isinstance(policy, Thresholds)
        return meet(measure, shifted(policy, scales or (1.0,) * len(policy.values)), 0.0, 0.02, macs)


__all__ = ["Method", "TokenMeter"]
