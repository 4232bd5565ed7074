r"""Which tokens stay after a layer: records that decide from scores, and their JSON form.

A policy decides after the attention of a layer and for the layers behind it. It sees the scores of the tokens that are
there (``token_scores``), and only ever takes tokens away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_compress.strict_json import StrictReader
from lightning_compress.token_scores import scores_among_rest

KINDS = ("keep_all", "thresholds", "top_k")
FLOOR = 0.01
MOST_LAYERS = 100_000


class TokenPolicy(Protocol):
    """What decides which tokens stay."""

    @property
    def layers(self) -> int | None:
        """For how many layers it decides; None for any number."""
        ...

    @property
    def accumulated(self) -> bool:
        """Whether it wants scores summed over all layers so far in place of those of one layer."""
        ...

    def keeps_all(self, layer: int) -> bool:
        """Whether every token stays after the attention of a layer, whatever its score: none is computed then."""
        ...

    def keep(
        self, layer: int, scores: Tensor, active: Tensor, real: Tensor, protected: Tensor | None, min_keep: int
    ) -> Tensor:
        """The tokens that stay after the attention of a layer.

        Args:
            layer: number of the layer, from 0.
            scores: (batch, tokens), floating point.
            active: (batch, tokens), bool: what is there and not taken so far.
            real: (batch,), the number of tokens that each example had before the first layer, integer.
            protected: (batch, tokens), bool: these stay as long as they are active; None protects nothing.
            min_keep: at least so many tokens stay, or all that are active where they are fewer: the best-scored ones,
                the first of equals.

        Returns:
            (batch, tokens), bool, a subset of ``active``.

        Raises:
            ValueError: for a layer that the policy does not know, a ``min_keep`` below 1 or tensors of other shapes.
        """
        ...

    def state(self) -> dict[str, Any]:
        """The policy as a JSON object; ``policy_from`` reads it."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Nothing is taken away."""

    @property
    def layers(self) -> None:
        """Any number."""

    @property
    def accumulated(self) -> bool:
        """No: scores do not matter."""
        return False

    def keeps_all(self, layer: int) -> bool:
        """Yes, in every layer."""
        return True

    def keep(
        self, layer: int, scores: Tensor, active: Tensor, real: Tensor, protected: Tensor | None, min_keep: int
    ) -> Tensor:
        """All that is active; see ``TokenPolicy.keep``."""
        _check(None, layer, scores, active, real, protected, min_keep)
        return active

    def state(self) -> dict[str, Any]:
        """The policy as a JSON object."""
        return {"kind": "keep_all"}


@dataclass(frozen=True)
class Thresholds:
    r"""A token stays where its score reaches the threshold of the layer.

    .. math:: \text{keep}_i = \text{active}_i \land (s_i \ge \theta_l \lor \text{protected}_i)

    Learned thresholds are those of Kim et al., "Learned Token Pruning for Transformers", 2022, here for scores of
    mean 1.

    Args:
        values: :math:`\theta_l` of every layer.
        among_rest: whether they are of ``scores_among_rest``, relative to the tokens that may leave, and not of scores
            relative to all, as published.

    Raises:
        ValueError: for no values, or some that are not finite numbers.
    """

    values: tuple[float, ...]
    among_rest: bool = False

    def __post_init__(self) -> None:
        _check_numbers("thresholds", self.values, -inf, inf)

    @property
    def layers(self) -> int:
        """One per threshold."""
        return len(self.values)

    @property
    def accumulated(self) -> bool:
        """No: thresholds are of the scores of one layer."""
        return False

    def keeps_all(self, layer: int) -> bool:
        """Where the threshold is not above 0, which no score is below."""
        return self.values[layer] <= 0

    def keep(
        self, layer: int, scores: Tensor, active: Tensor, real: Tensor, protected: Tensor | None, min_keep: int
    ) -> Tensor:
        """Tokens whose score reaches the threshold; see ``TokenPolicy.keep``."""
        _check(self.layers, layer, scores, active, real, protected, min_keep)
        if self.among_rest:
            scores = scores_among_rest(scores, active if protected is None else active & ~protected)
        reached = scores >= self.values[layer]
        keep = (reached if protected is None else reached | protected) & active
        if not scores.shape[1] or (min_keep == 1 and keep.device.type == "cpu" and bool(keep.any(1).all())):
            return keep  # hardly ever is a row without a token that stays, and a look at the values costs nothing here
        rest = scores.masked_fill(~active | keep if min_keep > 1 else ~active, -inf)
        if min_keep == 1:
            # where nothing is kept, the best-scored token is
            best = torch.zeros_like(keep).scatter_(1, rest.argmax(1, keepdim=True), ~keep.any(1, keepdim=True))
        else:
            best = _first(rest, min_keep - keep.sum(1, keepdim=True))
        return keep | (best & active)

    def state(self) -> dict[str, Any]:
        """The policy as a JSON object."""
        return {"kind": "thresholds", "values": list(self.values), "among_rest": self.among_rest}


@dataclass(frozen=True)
class TopK:
    r"""A share of the tokens that an example had before the first layer stays, the best-scored ones.

    .. math:: k_l = \max(k_{\min}, \operatorname{round}(r_l \, n))

    Protected tokens count among the k, and stay also where they are more. Of equal scores the first stay. So does
    SpAtten (Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", 2021),
    with scores that are summed over the layers.

    Args:
        rates: :math:`r_l` of every layer, from 0 to 1.
        accumulated: whether the scores are to be summed over the layers so far.

    Raises:
        ValueError: for no rates, or some that do not lie between 0 and 1.
    """

    rates: tuple[float, ...]
    accumulated: bool = False

    def __post_init__(self) -> None:
        _check_numbers("rates", self.rates, 0, 1)

    @property
    def layers(self) -> int:
        """One per rate."""
        return len(self.rates)

    def keeps_all(self, layer: int) -> bool:
        """Where the rate is 1."""
        return self.rates[layer] == 1

    def keep(
        self, layer: int, scores: Tensor, active: Tensor, real: Tensor, protected: Tensor | None, min_keep: int
    ) -> Tensor:
        """The best-scored share of the tokens; see ``TokenPolicy.keep``."""
        _check(self.layers, layer, scores, active, real, protected, min_keep)
        if self.rates[layer] == 1:
            return active
        ranked = scores.masked_fill(~active, -inf)
        if protected is not None:
            ranked = ranked.masked_fill(protected & active, inf)
        keep = _first(ranked, (real[:, None] * self.rates[layer]).round_().clamp_(min=min_keep))
        return (keep if protected is None else keep | protected) & active

    def state(self) -> dict[str, Any]:
        """The policy as a JSON object."""
        return {"kind": "top_k", "rates": list(self.rates), "accumulated": self.accumulated}


def policy_from(state: object, path: str = "policy") -> TokenPolicy:
    """The policy of a JSON object that ``TokenPolicy.state`` made.

    Args:
        state: the parsed object.
        path: where it lies in its file, for messages.

    Raises:
        ValueError: for anything else than what ``state`` makes; the message says what was expected where.
    """
    read = StrictReader("token policy")
    kind = read.string(read.mapping(state, path).get("kind"), f"{path}.kind", KINDS)
    if kind == "keep_all":
        read.object(state, path, ("kind",))
        return KeepAll()
    if kind == "thresholds":
        data = read.object(state, path, ("kind", "values", "among_rest"))
        return Thresholds(
            _numbers(read, data["values"], f"{path}.values", -inf, inf),
            read.boolean(data["among_rest"], f"{path}.among_rest"),
        )
    data = read.object(state, path, ("kind", "rates", "accumulated"))
    return TopK(
        _numbers(read, data["rates"], f"{path}.rates", 0, 1), read.boolean(data["accumulated"], f"{path}.accumulated")
    )


def spatten_rates(final: float, layers: int) -> tuple[float, ...]:
    r"""Rates for ``TopK``: nothing is taken in the first layers, then linearly more.

    .. math:: r_l = \begin{cases} 1 & l < m \\
        \max\left(0.01, 1 + (r - 1) \frac{l - m + 1}{L - m}\right) & \text{otherwise} \end{cases}, \quad
        m = \max(3, \lceil 0.15 L \rceil)

    Args:
        final: :math:`r`, the rate after the last layer, at most 1; below 0 the floor is reached before the last layer.
        layers: :math:`L`.

    Raises:
        ValueError: for no layers, or a final rate that is not a number of at most 1.

    >>> spatten_rates(0.25, 6)
    (1.0, 1.0, 1.0, 0.75, 0.5, 0.25)
    """
    if layers < 1:
        raise ValueError(f"Expected a number of layers of at least 1, but got {layers}.")
    if not isfinite(final) or final > 1:
        raise ValueError(f"Expected a final rate of at most 1, but got {final}.")
    whole = max(3, ceil(0.15 * layers))
    return tuple(
        1.0 if layer < whole else max(FLOOR, 1 + (final - 1) * (layer - whole + 1) / (layers - whole))
        for layer in range(layers)
    )


def _first(scores: Tensor, number: Tensor) -> Tensor:
    """Marks of the highest scores of each row, the first of equals; ``number`` is (batch, 1)."""
    order = scores.sort(stable=True, dim=1, descending=True).indices
    positions = torch.arange(scores.shape[1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, positions < number)


def _check(
    layers: int | None,
    layer: int,
    scores: Tensor,
    active: Tensor,
    real: Tensor,
    protected: Tensor | None,
    min_keep: int,
) -> None:
    if layer < 0 or (layers is not None and layer >= layers):
        raise ValueError(f"Expected a layer from 0{'' if layers is None else f' to {layers - 1}'}, but got {layer}.")
    if min_keep < 1:
        raise ValueError(f"Expected min_keep of at least 1, but got {min_keep}.")
    shape = scores.shape
    if len(shape) != 2:
        raise ValueError(f"Expected scores of shape (batch, tokens), but got {tuple(shape)}.")
    for name, tensor in (("active", active), ("protected", protected)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bool):
            raise ValueError(
                f"Expected {name} as bool of the shape of the scores, {tuple(shape)}, but got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
    if real.shape != shape[:1]:
        raise ValueError(
            f"Expected the number of real tokens of every example, {tuple(shape[:1])}, but got {tuple(real.shape)}."
        )


def _check_numbers(name: str, numbers: Sequence[float], low: float, high: float) -> None:
    bounds = "finite numbers" if low == -inf else f"numbers from {low} to {high}"
    if not numbers or not all(isfinite(number) and low <= number <= high for number in numbers):
        raise ValueError(f"Expected {name} of at least one layer, {bounds}, but got {tuple(numbers)}.")


def _numbers(read: StrictReader, value: object, path: str, low: float, high: float) -> tuple[float, ...]:
    items = read.items(value, path)
    if not 1 <= len(items) <= MOST_LAYERS:
        read.refuse(path, f"a list of 1 to {MOST_LAYERS} numbers", value)
    return tuple(read.number(number, where, low, high) for where, number in items)


__all__ = ["KeepAll", "Thresholds", "TokenPolicy", "TopK", "policy_from", "spatten_rates"]
