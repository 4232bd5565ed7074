"""What token pruning leaves: of each layer, of each example, and together with removed structures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_compress.report.text import aligned, ratio, si
from lightning_compress.token_policies import TokenPolicy
from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.distribution import TokenDistribution

BINS = 20  # of 5 % each
LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class TokenSummary:
    r"""What a token policy leaves of some examples, as plain numbers.

    With :math:`C_l(n)` the multiply-accumulates of layer l for n tokens, :math:`n_x` the real tokens of example x,
    padding left out, :math:`n_{l,x}` those that enter layer l, and :math:`C'_l` the same layer before structures were
    removed, over N examples:

    .. math:: \text{macs} = \frac1N \sum_x \Bigl(\sum_l C_l(n_x), \sum_l C_l(n_{l,x})\Bigr), \quad
        \text{dense\_macs} = \frac1N \sum_{l,x} C'_l(n_x)

    Only the layers count, not what lies before and behind them.

    Args:
        policy: its kind: "thresholds", "top_k" or "keep_all".
        values: thresholds of scores with mean 1, or rates, fractions; one for each layer but the last.
        examples: N, how many examples were measured; one that was seen twice counts twice.
        tokens: real tokens of an example, the mean.
        macs: multiply-accumulates of the layers for an example, the mean: with all tokens, and with those that stay.
        dense_macs: the same with all tokens, before structures were removed in the fit; None if none were.
        kept_per_layer: fraction of the real tokens of all examples that enters each layer.
        quantiles: 5 %, 50 % and 95 % quantile over the examples of the fraction
            :math:`\sum_l C_l(n_{l,x}) / \sum_l C_l(n_x)` that is left of each.
        histogram: numbers of examples by that fraction, in bins of equal width from 0 to 1; a fraction on a border is
            in the bin above it, 1 in the last.
    """

    policy: str
    values: tuple[float, ...]
    examples: int
    tokens: float
    macs: tuple[float, float]
    dense_macs: float | None
    kept_per_layer: tuple[float, ...]
    quantiles: tuple[float, float, float]
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, distribution: TokenDistribution, policy: TokenPolicy, dense: LayerCosts | None = None) -> TokenSummary:
        """The summary of what was measured.

        Args:
            distribution: what was kept of each example.
            policy: what decided so.
            dense: costs of the layers before structures were removed; None if none were.

        Raises:
            ValueError: if no example was measured.
        """
        entering, real, costs = distribution.entering.double(), distribution.real.double(), distribution.costs
        examples = real.numel()
        if not examples:
            raise ValueError("Expected a distribution of at least one example for its summary, but got none.")
        state = policy.state()
        share = torch.tensor(distribution.kept_per_example, dtype=torch.float64)
        low, median, high = torch.quantile(share, share.new_tensor(LEVELS)).tolist()
        return cls(
            policy=state["kind"],
            values=tuple(state.get("values") or state.get("rates") or ()),
            examples=examples,
            tokens=real.mean().item(),
            macs=(_mean(costs.macs(real)), _mean(costs.macs(entering))),
            dense_macs=None if dense is None else _mean(dense.macs(real)),
            kept_per_layer=distribution.kept_per_layer,
            quantiles=(low, median, high),
            histogram=histogram(share),
        )

    @property
    def macs_kept(self) -> float:
        """Multiply-accumulates of the layers with the tokens that stay, relative to the same layers with all tokens."""
        return self.macs[1] / self.macs[0] if self.macs[0] else 1.0

    @property
    def macs_kept_overall(self) -> float | None:
        """The same, relative to the layers with all tokens before structures were removed; None if none were."""
        return self.macs[1] / self.dense_macs if self.dense_macs else None

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain numbers, ready for JSON."""
        return {**asdict(self), "macs_kept": self.macs_kept, "macs_kept_overall": self.macs_kept_overall}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TokenSummary:
        """The inverse of ``to_dict``; lists, as JSON has them, become tuples."""
        values = ((f.name, data[f.name]) for f in fields(cls))
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values}
        return cls(**plain)

    def metrics(self) -> dict[str, float]:
        """The headline numbers under flat names, as loggers take them."""
        low, median, high = self.quantiles
        values = {
            "token_pruning/macs_kept": self.macs_kept,
            "token_pruning/macs_kept_p05": low,
            "token_pruning/macs_kept_median": median,
            "token_pruning/macs_kept_p95": high,
        }
        if self.macs_kept_overall is not None:
            values["token_pruning/macs_kept_overall"] = self.macs_kept_overall
        return values

    def __str__(self) -> str:
        whole, left = self.macs
        lines = [
            f"Tokens that stay by {self.policy}: {self.macs_kept:.1%} of the MACs of the layers are left, on "
            f"{self.examples} examples of {self.tokens:.1f} tokens without padding"
        ]
        costs = [("MACs of the layers, an example", "before", "after", "ratio")]
        tokens = (si(whole), si(left), ratio(whole, left))
        if self.dense_macs is None:
            costs.append(("  by tokens that leave", *tokens))
        else:
            dense = self.dense_macs
            costs.append(("  by structures that were removed", si(dense), si(whole), ratio(dense, whole)))
            costs.append(("  then by tokens that leave", *tokens))
            costs.append(("  by both", si(dense), si(left), ratio(dense, left)))
        examples = [("examples", "5 %", "median", "95 %"), ("  MACs left", *(f"{q:.1%}" for q in self.quantiles))]
        layers = [("layer", "tokens that enter", self.policy)]
        for number, kept in enumerate(self.kept_per_layer):
            value = f"{self.values[number]:.3g}" if number < len(self.values) else ""
            layers.append((f"  {number + 1}", f"{kept:.1%}", value))
        return "\n".join([*lines, *("  " + line for table in (costs, examples, layers) for line in aligned(table))])


def histogram(share: Tensor, bins: int = BINS) -> tuple[int, ...]:
    """How many of ``share``, (examples,), from 0 to 1, lie in each of some bins of equal width.

    >>> histogram(torch.tensor([0.0, 0.5, 0.6, 1.0]), bins=4)
    (1, 0, 2, 1)
    """
    # 1 itself would begin another bin
    return tuple(torch.bincount((share * bins).long().clamp(0, bins - 1), minlength=bins).tolist())


def _mean(macs: Tensor) -> float:
    """The mean over the examples of (layers, examples), summed over the layers."""
    return macs.sum(0).mean().item()


__all__ = ["BINS", "LEVELS", "TokenSummary", "histogram"]
