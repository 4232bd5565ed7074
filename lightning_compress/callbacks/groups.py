"""Which lines of which matrices are groups, where groups are not coupled units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Literal, get_args

from torch import nn

from lightning_compress.callbacks.shrinkage import MatrixGroups
from lightning_compress.regularizers import REGULARIZERS, Regularizer, regularizer, tprune_strategy
from lightning_compress.structures import Slice, Structure

Groups = Literal["coupled", "rows", "columns", "blocks"]

# What the matrices of TPrune are in terms of structures: a query and a key are the two producers of Q/K dims, an output
# projection consumes V/O dims, and so on. Its strategies never tell a query from a key.
_MATRIX = {
    ("qk_dim", "producer"): "query",
    ("qk_dim", "consumer"): "query",
    ("vo_dim", "producer"): "value",
    ("vo_dim", "consumer"): "output",
    ("ffn", "producer"): "ffn_in",
    ("ffn", "consumer"): "ffn_out",
}
_OUTPUT_UNITS, _INPUT_UNITS = 0, 1


def regularizer_for(name: str, groups: str, strategy: str | None) -> tuple[Regularizer, Groups]:
    """The regularizer and the groups it acts on; raises ValueError where they do not fit together."""
    entry = regularizer(name)
    if groups not in get_args(Groups):
        raise ValueError(f"Expected groups to be one of {get_args(Groups)}, but got {groups!r}.")
    if entry.acts_on == "matrix":
        if groups in ("rows", "columns") or strategy is not None:
            what = f"groups={groups!r}" if strategy is None else f"strategy={strategy!r}"
            raise ValueError(
                f"Expected {name!r} to act on blocks, but got {what}. Call StructuredSparsity({name!r}, "
                f"block_grid=(2, 2)), or "
                "choose regularizer='group_lasso'."
            )
        return entry, "blocks"
    if groups == "blocks":
        others = [n for n, r in REGULARIZERS.items() if r.acts_on == "matrix"]
        raise ValueError(f"Expected a regularizer of blocks, one of {others}, with groups='blocks', but got {name!r}.")
    if strategy is not None:
        if groups != "coupled":
            raise ValueError(
                f"Expected strategy or groups, but got strategy={strategy!r} and groups={groups!r}: a strategy "
                f"chooses them."
            )
        return entry, "rows"
    return entry, groups  # type: ignore[return-value]


def chosen_groups(
    parameters: Mapping[str, nn.Parameter],
    structures: Sequence[Structure],
    groups: Groups,
    modules: Sequence[str] | None,
    strategy: str | None,
    decoder: Sequence[str],
) -> list[MatrixGroups]:
    """The groups on single matrices.

    Args:
        parameters: parameters of the traced module by name.
        structures: structures of the kinds asked for; the matrices in which they live are the default choice.
        groups: "rows" (axis 0), "columns" (axis 1) or "blocks".
        modules: shell patterns of the modules whose matrices are chosen instead.
        strategy: TPrune's strategy, which overrides ``groups``.
        decoder: dotted names of the modules that are the decoder of the strategy.

    Raises:
        ValueError: if a pattern or a name matches no matrix.
    """
    owners: dict[tuple[str, int], tuple[Structure, Slice]] = {}
    for structure in structures:
        for piece in _matrix_slices(structure, parameters):
            owners.setdefault((piece.parameter, piece.axis), (structure, piece))
    if strategy is not None:
        return _strategy_lines(parameters, structures, strategy, decoder)
    if groups == "blocks":
        names = _matching(parameters, modules) if modules is not None else _unique(n for n, _ in owners)
        return [MatrixGroups(n, None) for n in names if parameters[n].dim() == 2]
    axis = _OUTPUT_UNITS if groups == "rows" else _INPUT_UNITS
    names = _matching(parameters, modules) if modules is not None else _unique(n for n, _ in owners)
    lines = []
    for name in names:
        owner = owners.get((name, axis))
        lines.append(MatrixGroups(name, axis, None if owner is None else (owner[0].name, owner[1].unit_of_position())))
    return lines


def _strategy_lines(
    parameters: Mapping[str, nn.Parameter], structures: Sequence[Structure], strategy: str, decoder: Sequence[str]
) -> list[MatrixGroups]:
    for prefix in decoder:
        if not any(_inside(n, prefix) for n in parameters):
            raise ValueError(f"Expected decoder to name a module that holds parameters, but {prefix!r} holds none.")
    regularized = {tuple(axis) for axis in tprune_strategy(strategy)}
    lines: dict[tuple[str, int, tuple[int, ...]], MatrixGroups] = {}
    for structure in structures:
        for piece in _matrix_slices(structure, parameters):
            name, positions = piece.parameter, piece.indices.reshape(-1).unique()
            stack = "decoder" if any(_inside(name, prefix) for prefix in decoder) else "encoder"
            matrix = _MATRIX[structure.kind, piece.role]
            # the axis of the structure in the stored matrix is the axis of output units if the slice produces, of input
            # units if it consumes, whichever way the matrix is stored
            own = _INPUT_UNITS if matrix in ("output", "ffn_out") else _OUTPUT_UNITS
            # of a packed matrix only the part in which the structure lives: values lie beside queries and keys
            part = None if len(positions) == piece.size else (piece.axis, positions)
            key = () if part is None else tuple(positions.tolist())
            for units in (_OUTPUT_UNITS, _INPUT_UNITS):
                if (stack, matrix, units) not in regularized:
                    continue
                if units == own:
                    owner = (structure.name, piece.unit_of_position()[positions])
                    lines[name, piece.axis, key] = MatrixGroups(name, piece.axis, owner, part)
                else:
                    axis = 1 - piece.axis
                    lines.setdefault((name, axis, key), MatrixGroups(name, axis, part=part))
    return list(lines.values())


def _matrix_slices(structure: Structure, parameters: Mapping[str, nn.Parameter]) -> list[Slice]:
    return [
        piece
        for piece in structure.slices
        if piece.role != "companion" and piece.parameter in parameters and parameters[piece.parameter].dim() >= 2
    ]


def _matching(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> list[str]:
    matrices = {n: n.rpartition(".")[0] for n, p in parameters.items() if p.dim() >= 2}
    for pattern in patterns:
        if not any(fnmatch(module, pattern) for module in matrices.values()):
            known = _unique(matrices.values())
            raise ValueError(
                f"Expected modules to match modules with a weight matrix, but {pattern!r} matches none of {known[:8]}"
                f"{' ...' if len(known) > 8 else ''}."
            )
    return [n for n, module in matrices.items() if any(fnmatch(module, pattern) for pattern in patterns)]


def _inside(name: str, prefix: str) -> bool:
    return name.startswith(prefix + ".")


def _unique(names) -> list[str]:  # type: ignore[no-untyped-def]
    return list(dict.fromkeys(names))
