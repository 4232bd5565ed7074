"""TPrune's choice of what to regularize in an encoder-decoder, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lightning_compress.regularizers._checks import unknown_name


class RegularizedAxis(NamedTuple):
    """One kind of group of one kind of matrix.

    Attributes:
        stack: ``"encoder"`` or ``"decoder"``.
        matrix: ``"query"``, ``"key"``, ``"value"``, ``"output"``, ``"ffn_in"`` or ``"ffn_out"``; attention matrices are
            those of self- and of cross-attention.
        axis: dim of a ``torch.nn.Linear`` weight whose indices are the groups: 0 = output units (out_features), 1 =
            input units (in_features).
    """

    stack: str
    matrix: str
    axis: int


_OUTPUT_UNITS, _INPUT_UNITS = 0, 1
_STACKS = ("encoder", "decoder")
_COUPLED_AXES = {
    "query": _OUTPUT_UNITS,
    "key": _OUTPUT_UNITS,
    "value": _OUTPUT_UNITS,
    "output": _INPUT_UNITS,
    "ffn_in": _OUTPUT_UNITS,
    "ffn_out": _INPUT_UNITS,
}

TPRUNE_STRATEGIES: Mapping[str, frozenset[RegularizedAxis]] = {
    "fine": frozenset(
        [RegularizedAxis("encoder", matrix, axis) for matrix, axis in _COUPLED_AXES.items()]
        + [RegularizedAxis("decoder", matrix, _OUTPUT_UNITS) for matrix in ("query", "key")]
    ),
    "coarse": frozenset(
        RegularizedAxis(stack, matrix, axis) for stack in _STACKS for matrix, axis in _COUPLED_AXES.items()
    ),
    "naive": frozenset(
        RegularizedAxis(stack, matrix, axis)
        for stack in _STACKS
        for matrix in _COUPLED_AXES
        for axis in (_OUTPUT_UNITS, _INPUT_UNITS)
    ),
}


def tprune_strategy(name: str) -> frozenset[RegularizedAxis]:
    """Which axes of which matrices one of TPrune's three strategies regularizes.

    ========  ==============================================================  ================================
    name      encoder                                                         decoder
    ========  ==============================================================  ================================
    fine      columns of Q, K, V, FFN1; rows of O, FFN2                       columns of Q, K
    coarse    columns of Q, K, V, FFN1; rows of O, FFN2                       the same as the encoder
    naive     rows and columns of all six                                     rows and columns of all six
    ========  ==============================================================  ================================

    The paper writes ``y = x W`` with W of shape ``(in_features, out_features)``: its columns are output units, axis 0
    of a ``torch.nn.Linear`` weight, and its rows are input units, axis 1. FFN1 is ``ffn_in`` and FFN2 is ``ffn_out``.
    The axes of "coarse" are those that meet inside a coupled structure: columns of V with rows of O, columns of FFN1
    with rows of FFN2, columns of Q with columns of K.

    Raises:
        ValueError: if there is no such strategy; the message lists the names.

    Reference: Mao, Yang, Li, Li & Chen 2021, "TPrune: Efficient Transformer Pruning for Mobile Devices".

    >>> sorted(axis for axis in tprune_strategy("fine") if axis.stack == "decoder")  # doctest: +NORMALIZE_WHITESPACE
    [RegularizedAxis(stack='decoder', matrix='key', axis=0), RegularizedAxis(stack='decoder', matrix='query', axis=0)]
    """
    if name not in TPRUNE_STRATEGIES:
        raise unknown_name("TPrune strategy", name, TPRUNE_STRATEGIES)
    return TPRUNE_STRATEGIES[name]
