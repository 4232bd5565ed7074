r"""What the layers of a stack cost at a number of tokens, and what is left of it where tokens leave.

Projections and feed-forward parts cost the same for every token, attention costs the same for every pair, so that a
call with :math:`n` tokens takes :math:`a n^2 + b n` multiply-accumulates; :math:`c` is for what tokens do not pay for.
The tail of a layer takes :math:`t` of :math:`b`, and only for the tokens that its attention has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.tokens.stack import python_attention


@dataclass(frozen=True)
class LayerCosts:
    r"""Multiply-accumulates of every call of a stack, for one example of which :math:`n_l` tokens enter call l.

    .. math:: C_l = a_l n_l^2 + (b_l - t_l) n_l + t_l n_{l+1} + c_l, \quad n_{L+1} = n_L

    Args:
        a: per pair of tokens, for every call.
        b: per token.
        c: per call.
        tail: :math:`t`, the part of ``b`` that is only taken for tokens that go on to the next call; empty for none.

    Raises:
        ValueError: for no calls, different numbers of them, costs of which none is positive, or more in the tail than
            in the call.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    tail: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.a) == len(self.b) == len(self.c) or not any(x > 0 for x in (*self.a, *self.b, *self.c)):
            raise ValueError(
                "Expected coefficients a, b and c of at least one call, some of them positive, but got "
                f"a={self.a}, b={self.b}, c={self.c}."
            )
        if self.tail and not (
            len(self.tail) == len(self.b) and all(0 <= t <= b for t, b in zip(self.tail, self.b, strict=True))
        ):
            raise ValueError(f"Expected a tail of every call, from 0 to b={self.b}, but got {self.tail}.")

    @classmethod
    def joined(cls, parts: Iterable[LayerCosts]) -> LayerCosts:
        """The costs of several calls, one after the other."""
        parts = list(parts)
        return cls(
            tuple(x for part in parts for x in part.a),
            tuple(x for part in parts for x in part.b),
            tuple(x for part in parts for x in part.c),
            tuple(x for part in parts for x in part.tail or (0.0,) * len(part.a)) if any(p.tail for p in parts) else (),
        )

    def macs(self, counts: Tensor) -> Tensor:
        """Multiply-accumulates of every call and example.

        Args:
            counts: tokens that enter, (calls, examples), or (examples,) for the same in every call; soft counts get
                gradients.

        Returns:
            (calls, examples), floating point.

        Raises:
            ValueError: for another number of calls.
        """
        calls = len(self.a)
        if counts.dim() not in (1, 2) or (counts.dim() == 2 and counts.shape[0] != calls):
            raise ValueError(
                f"Expected numbers of tokens of shape ({calls}, examples) or (examples,), but got "
                f"{tuple(counts.shape)}."
            )
        if counts.dtype != torch.float64:
            counts = counts.float()  # squares of long lengths overflow in half precision
        a, b, c = (counts.new_tensor(x).unsqueeze(1) for x in (self.a, self.b, self.c))
        macs = (a * counts + b) * counts + c
        if not self.tail or counts.dim() == 1:
            return macs
        behind = torch.cat([counts[1:], counts[-1:]])
        return macs - counts.new_tensor(self.tail).unsqueeze(1) * (counts - behind)

    def relative(self, entering: Tensor, real: Tensor) -> Tensor:
        r"""Multiply-accumulates relative to those at the real lengths, over all calls and examples.

        .. math:: \frac{\sum_l \sum_x C_l(n_{l,x})}{\sum_l \sum_x C_l(n_x)}

        Soft counts, sums of masks, give a soft value with gradients; hard ones what is really computed.

        Args:
            entering: :math:`n_{l,x}`, tokens of each example that enter each call, (calls, examples).
            real: :math:`n_x`, tokens that each example has, (examples,).

        Returns:
            A scalar; 1 where there is nothing to compute at all.

        Raises:
            ValueError: for other shapes.
        """
        if entering.dim() != 2 or real.shape != entering.shape[1:]:
            raise ValueError(
                f"Expected entering tokens of shape (calls, examples) and real ones of shape (examples,), but got "
                f"{tuple(entering.shape)} and {tuple(real.shape)}."
            )
        whole = self.macs(real).sum()
        nothing = whole <= 0
        return torch.where(nothing, 1.0, self.macs(entering).sum() / whole.masked_fill(nothing, 1.0))


def relative_macs(costs: LayerCosts, entering: Tensor, real: Tensor) -> float:
    """``LayerCosts.relative`` in double precision, as a number; entering (calls, examples), real (examples,)."""
    return costs.relative(entering.detach().cpu().double(), real.detach().cpu().double()).item()


def fit_costs(run: Callable[[int], int], lengths: Sequence[int]) -> LayerCosts:
    r"""The coefficients of one call, exact: through three lengths, and checked at the others.

    Args:
        run: multiply-accumulates of the call with so many tokens, for one example.
        lengths: at least four different numbers of tokens.

    Raises:
        ValueError: for fewer lengths, or a call whose costs are no quadratic polynomial, as with windows or tokens
            padded inside.

    >>> fit_costs(lambda n: 3 * n * n + 8 * n, (4, 8, 12, 16))
    LayerCosts(a=(3.0,), b=(8.0,), c=(0.0,), tail=())
    """
    if len(set(lengths)) < 4 or min(lengths) < 1:
        raise ValueError(f"Expected at least four different positive lengths, but got {tuple(lengths)}.")
    costs = {length: run(length) for length in dict.fromkeys(lengths)}
    (x, p), (y, q), (z, r), *others = costs.items()
    first, second = Fraction(q - p, y - x), Fraction(r - q, z - y)
    a = (second - first) / (z - x)
    b = first - a * (x + y)
    c = p - (a * x + b) * x
    for length, cost in others:
        expected = (a * length + b) * length + c
        if expected != cost:
            raise ValueError(
                f"Expected costs of a layer that are a quadratic polynomial in the number of tokens: {p}, {q} and {r} "
                f"multiply-accumulates with {x}, {y} and {z} tokens go on as {float(expected):g} with {length}, but "
                f"got {cost}: it pads, cuts or groups its tokens."
            )
    return LayerCosts((float(a),), (float(b),), (float(c),))


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Multiply-accumulates of matrix products, convolutions and attention that are computed under it, so far.

    Without gradients, and without the fused attention and encoder layers of PyTorch: they are not all counted.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), python_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        yield lambda: counter.get_total_flops() // 2


def counted_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention that ``call`` computes, as by ``counted``."""
    with counted() as macs:
        call()
        return macs()


__all__ = ["LayerCosts", "counted", "counted_macs", "fit_costs", "relative_macs"]
