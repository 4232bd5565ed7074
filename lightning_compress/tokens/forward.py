"""The state of one forward with token pruning, and what it left behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_compress.tokens.tail import TailPass
from lightning_compress.tokens.tap import AttentionTap, Heard

Mode = Literal["off", "soft", "mask", "gather"]


@dataclass
class SoftPruning:
    r"""How tokens are pruned in part.

    ``cumulative``: :math:`M_l = M_{l-1}\,\sigma((s_l - \theta_l)/T)`; in layer l+1 keys get the bias
    :math:`\log M_l` and the state becomes :math:`M_l\,f(h) + (1 - M_l)\,h`, and what the tail of layer l adds is
    multiplied with :math:`M_l`, so that for :math:`T \to 0` it is the hard decision. Only thresholds get gradients
    through these masks. Otherwise as published: the state that a layer returns is multiplied with its own mask, and no
    key is masked.

    Attributes:
        thresholds: one scalar per decision, in units of the mean score.
        temperature: T, in the same units; a tensor has one for each decision.
        straight_through: whether the forward takes the hard decision and only the backward the soft one.
        cumulative: see above.
        among_rest: whether thresholds are of ``scores_among_rest``, with what is left of each token as its weight.
    """

    thresholds: Tensor
    temperature: float | Tensor = 0.1
    straight_through: bool = False
    cumulative: bool = True
    among_rest: bool = False


@dataclass(eq=False)
class TokenCounts:
    """What a forward did.

    Attributes:
        entering: (layers, batch), tokens that entered each layer; in soft mode expected ones, with gradients.
        real: (batch,), tokens that are no padding.
        tokens: number of tokens of a row, padding included.
        masks: in soft mode the mask of each decision, (batch, tokens), with gradients.
        present: for every layer the positions that were there, (batch, present) or None for all, and which of them took
            part, or None for all.
    """

    entering: Tensor
    real: Tensor
    tokens: int
    masks: list[Tensor]
    present: list[tuple[Tensor | None, Tensor | None]]

    def layers_of_tokens(self) -> Tensor:
        """Number of layers that each token went through as a token that counts, int64 (batch, tokens)."""
        batch = self.real.shape[0]
        total = torch.zeros(batch, self.tokens, dtype=torch.int64, device=self.real.device)
        for index, shown in self.present:
            took = torch.ones_like(total if index is None else index) if shown is None else shown.long()
            total = total + took if index is None else total.scatter_add(1, index, took)
        return total


@dataclass(eq=False)
class LayerRun:
    """One call of a layer, with all rows of the batch or some of them.

    ``keep`` and ``soft`` (the mask and its logarithm) are set if the decision falls before the layer returns.
    """

    number: int
    decides: bool
    tap: AttentionTap
    rows: Tensor | None  # int64, which rows; None: all
    slots: int
    tail: TailPass | None = None
    keep: Tensor | None = None  # bool (rows, slots)
    soft: tuple[Tensor, Tensor | None] | None = None

    def own(self, value: Tensor) -> Tensor:
        """What belongs to this call of something (batch, present)."""
        return value if self.rows is None else value.index_select(0, self.rows)[:, : self.slots]


@dataclass(eq=False)
class Forward:
    """The state of one forward of the owner. Present tokens are those that have not physically left."""

    mode: Mode
    recording: Any = None  # `graph_recording` when the owner was called
    layer: int = 0
    empty: bool = False  # whether there are no tokens at all
    scatter: bool = True
    dims: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of arguments, those that run over tokens
    batch: int = 0
    tokens: int = 0
    real: Tensor | None = None  # bool (batch, tokens); None: all
    shown: Tensor | None = None  # bool (batch, present), tokens that take part; None: all of them
    frozen: bool = False  # whether there are present tokens that do not take part
    index: Tensor | None = None  # int64 (batch, present), where the present tokens were; None: none has left
    valid: Tensor | None = None  # bool (batch, present), slots that hold a token; None: all
    counts: tuple[int, ...] | None = None  # number of slots of each row that hold a token; None: all
    protected: Tensor | None = None  # bool (batch, present)
    accumulated: Tensor | None = None  # sums of scores
    mask: Tensor | None = None  # soft: the mask in force, (batch, tokens)
    log_mask: Tensor | None = None  # soft and cumulative: its logarithm, the bias of the keys
    stages: list[tuple[Tensor, Tensor | None, Tensor | None]] = field(default_factory=list)
    entering: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    present: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)
    gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    call: LayerRun | None = None  # the call of a layer that is under way

    def real_count(self, like: Tensor) -> Tensor:
        """Number of real tokens of each row, float32 (batch,)."""
        if self.real is None:
            return torch.full((self.batch,), float(self.tokens), device=like.device)
        return self.real.sum(1).float()


@dataclass(frozen=True)
class Ask:
    """What is to be found out in a layer: which tokens are real, whether any may leave, and their scores for that."""

    real: bool
    decides: bool
    scores: bool
    inspect: bool


def shape_of(value: Tensor) -> tuple[int, int]:
    """The first two sizes."""
    return value.shape[0], value.shape[1]


def summed(before: Tensor | None, scores: Tensor) -> Tensor:
    """Scores of all layers so far."""
    return scores.detach() if before is None else before + scores.detach()


def real_count_of(state: Forward, heard: Heard, call: LayerRun) -> Tensor:
    """Number of real tokens of each row of a call, int64 (rows,)."""
    real = heard.real if call.number == 0 else state.real
    if real is not None:
        count = real.sum(1)
        return count if call.rows is None else count.index_select(0, call.rows)
    rows = state.batch if call.rows is None else call.rows.shape[0]
    assert heard.scores is not None
    return torch.full((rows,), state.tokens, device=heard.scores.device)


def key_bias_of(state: Forward, hidden: Tensor) -> Tensor | None:
    """What is added to the scores of the keys of the present tokens, (batch, present); None for nothing."""
    if state.log_mask is not None:
        return state.log_mask
    if state.mode == "soft" or state.shown is None:
        return None
    bias = torch.zeros(state.shown.shape, dtype=hidden.dtype, device=hidden.device)
    return bias.masked_fill(~state.shown, -torch.inf)


def query_weights_of(state: Forward, hidden: Tensor) -> Tensor | None:
    """How much the queries count in the scores of the keys, (batch, present); None for all alike."""
    if state.mode != "soft":
        return None if state.shown is None else state.shown.to(hidden.dtype)
    real = None if state.real is None else state.real.to(hidden.dtype)
    if state.log_mask is None or state.mask is None:
        return real
    return state.mask if real is None else state.mask * real


def entering_of(state: Forward, hidden: Tensor) -> Tensor:
    """Number of tokens that entered the layer, (batch,)."""
    if state.mode == "soft" and state.mask is not None:
        return (state.mask if state.real is None else state.mask * state.real).sum(1)
    if state.mode != "soft" and state.shown is not None:
        return state.shown.sum(1).float()
    if state.index is not None:
        return torch.full((state.batch,), float(hidden.shape[1]), device=hidden.device)
    return state.real_count(hidden)


__all__ = [
    "Ask",
    "Forward",
    "LayerRun",
    "Mode",
    "SoftPruning",
    "TokenCounts",
    "entering_of",
    "key_bias_of",
    "query_weights_of",
    "real_count_of",
    "shape_of",
    "summed",
]
