"""Costs of single units, and costs at the lengths that inputs really have.

The trace counts what the traced call computes. A padded position is computed like any other, so the polynomials of a
padded batch are those of its padded length: what the call really costs on kernels that work on rectangles. Where inputs
are served at their own lengths (one by one, or sorted by length), ``at_lengths`` gives what they cost there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import Structures


@dataclass(frozen=True)
class UnitCost:
    """What one unit of a structure costs in the model as it is.

    Args:
        macs: multiply-accumulates of the traced call that go with the unit.
        params: parameters that go with it.
    """

    macs: float
    params: float


def unit_costs(structures: Structures) -> dict[str, UnitCost]:
    r"""What the removal of one unit of each structure saves, all others being there.

    .. math:: c_s = P(n_1, \dots, n_s, \dots) - P(n_1, \dots, n_s - 1, \dots)

    Args:
        structures: what discovery returned.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_compress import discover
    >>> unit_costs(discover(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(3, 4),)))
    {'ffn': UnitCost(macs=18.0, params=7.0)}
    """
    macs, params, counts = structures.macs, structures.params, structures.counts
    return {s.name: UnitCost(_last_unit(macs, counts, s.name), _last_unit(params, counts, s.name)) for s in structures}


def _last_unit(cost: Polynomial, counts: Mapping[str, int], name: str) -> float:
    part = cost.restrict({name})
    return part.evaluate(counts) - part.evaluate({**counts, name: counts[name] - 1})


def at_lengths(structures: Structures, traced: Mapping[int, Structures], lengths: Sequence[float]) -> Structures:
    r"""The same structures with multiply-accumulates per call as they are on average over true input lengths.

    Every coefficient of the cost of a call is a polynomial in the length of its input: constant (a pooler), linear
    (projections, feed-forward parts), quadratic (self-attention). It is interpolated between the lengths that were
    traced, three for a model with attention, and averaged over the true ones:

    .. math:: \bar c = \frac{1}{n} \sum_{i=1}^{n} \sum_{L} c_L \prod_{K \ne L} \frac{\ell_i - K}{L - K}

    Nothing is assumed about which operation grows how. ``lengths=[mean]`` takes one measured mean length for all; the
    lengths themselves, ``attention_mask.sum(1).tolist()``, are exact, since attention costs the mean of the squares.

    Args:
        structures: the structures to use, proven or not.
        traced: what ``discover`` finds for calls of the same batch size at one to four different lengths; a proof is
            not needed for them.
        lengths: true lengths of a sample of inputs.

    Returns:
        ``structures`` with other MACs; parameters, proofs and what is pinned stay.

    Raises:
        ValueError: if a traced call lacks one of the structures or has it with another number of units, for no or more
            than four traced lengths, or for lengths that are not positive.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_compress import discover
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> traced = {n: discover(model, (torch.randn(3, n, 4),)) for n in (4, 8)}
    >>> at_lengths(traced[8], traced, lengths=[2, 3, 7]).macs
    Polynomial(72*ffn)
    """
    if not 1 <= len(traced) <= 4 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in traced):
        raise ValueError(f"Expected one to four traced lengths, positive integers, but got {sorted(traced, key=str)}.")
    if not len(lengths) or any(not isfinite(n) or n <= 0 for n in lengths):
        raise ValueError(f"Expected positive true lengths, at least one, but got {list(lengths)[:8]}.")
    units = structures.counts
    same = {}
    for length, found in traced.items():
        for name, number in units.items():
            got = found.counts.get(name)
            if got != number:
                raise ValueError(
                    f"Expected the call of length {length} to have structure {name!r} with {number} units, but it has "
                    f"{'none' if got is None else got}: trace the same model, with the same kinds, at every length."
                )
        same[length] = found.rebuilt([s for s in found if s.name in units])
    # the mean over the true lengths of each Lagrange polynomial
    weights = {
        length: sum(prod((true - other) / (length - other) for other in traced if other != length) for true in lengths)
        / len(lengths)
        for length in traced
    }

    def mixed(which: str) -> Polynomial:
        total: Polynomial = sum((getattr(s, which) * weights[n] for n, s in same.items()), Polynomial())
        # what cancels leaves rounding behind
        scale = max((abs(c) for _, c in total), default=0.0)
        return Polynomial({names: c for names, c in total if abs(c) > 1e-9 * scale})

    return Structures(
        structures,
        weight_macs=mixed("weight_macs"),
        activation_macs=mixed("activation_macs"),
        params=structures.params,
        pinned=structures.pinned,
    )
