"""Maps of single matrices: which blocks are alive, partly dead, dead, or no longer there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_compress.regularizers import block_borders, block_line_norms

GONE, DEAD, PARTLY, ALIVE = range(4)
STATES = ("gone", "dead", "partly dead", "alive")
BLOCKS = 32  # a side of a map has at most so many by default


@dataclass(frozen=True, eq=False)
class MatrixMap:
    """The blocks of one matrix, in the shape that it had before anything was removed.

    Args:
        name: of the parameter.
        shape: (out_features, in_features) before removals; of a convolution (out_channels, in_channels).
        borders: positions where blocks begin and end, along out and along in.
        alive: part of each block that lies on living lines, (blocks along out, blocks along in): the share of its rows
            that are alive times that of its columns. A line is dead when all of its elements in the block are.
        gone: part of each block that was removed, likewise.
        sparsity: part of the elements that were removed or are zero (at most the threshold).
        removed: part of the elements that were removed.
        bits: of a stored element; of one with a quantizer those of its integers. 0 where the whole matrix was removed.
    """

    name: str
    shape: tuple[int, int]
    borders: tuple[tuple[int, ...], tuple[int, ...]]
    alive: Tensor
    gone: Tensor
    sparsity: float
    removed: float
    bits: float

    @property
    def states(self) -> Tensor:
        """One of GONE, DEAD, PARTLY and ALIVE for each block, int64."""
        states = torch.full(self.alive.shape, PARTLY)
        states[self.alive == 0] = DEAD
        states[self.alive == 1] = ALIVE
        states[self.gone == 1] = GONE
        return states

    @property
    def counts(self) -> dict[str, int]:
        """Number of blocks in each state, by its name in STATES."""
        found = torch.bincount(self.states.reshape(-1), minlength=len(STATES)).tolist()
        return dict(zip(STATES, found, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The map as plain numbers, ready for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "borders": [list(side) for side in self.borders],
            "alive": self.alive.tolist(),
            "gone": self.gone.tolist(),
            "sparsity": self.sparsity,
            "removed": self.removed,
            "bits": self.bits,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MatrixMap:
        """The inverse of ``to_dict``."""
        values = {f.name: data[f.name] for f in fields(cls)}
        values["shape"] = tuple(values["shape"])
        values["borders"] = tuple(tuple(side) for side in values["borders"])
        size = tuple(len(side) - 1 for side in values["borders"])
        for name in ("alive", "gone"):
            values[name] = torch.tensor(values[name], dtype=torch.float64).reshape(size)
        return cls(**values)


@torch.no_grad()
def matrix_map(
    weight: Tensor,
    name: str = "weight",
    *,
    shape: tuple[int, int] | None = None,
    kept: tuple[Tensor | None, Tensor | None] = (None, None),
    block_shape: tuple[int, int] | None = None,
    block_grid: tuple[int, int] | None = None,
    threshold: float = 0.0,
    bits: float | None = None,
) -> MatrixMap:
    """The map of a matrix.

    Args:
        weight: matrix (out_features, in_features) as it is now; a convolution (out, in, ...) is one of the norms of its
            kernels.
        name: of the parameter.
        shape: what it was before removals. Default: as it is.
        kept: positions that stayed of the rows and of the columns, increasing; None for all.
        block_shape: ``(out, in)`` size of a block; or
        block_grid: ``(out, in)`` number of blocks, or as many as the matrix has lines. Default: at most 32 a side.
        threshold: elements and lines count as dead up to this root mean square; 0 for exact zeros.
        bits: of a stored element. Default: those of its type.

    Returns:
        The map; its tensors are float64 on the CPU.

    Raises:
        TypeError, ValueError: as `block_group_lasso`; and ValueError for fewer than two dims, a negative threshold, or
            positions that do not fit the matrix.
    """
    if threshold < 0:
        raise ValueError(f"Expected threshold, a root mean square of elements, to be at least 0, but got {threshold}.")
    if weight.dim() < 2:
        raise ValueError(
            f"Expected a matrix or the kernels of a convolution, but {name!r} has shape {tuple(weight.shape)}. "
            "Leave it out: what has one dim is seen in the units of a structure."
        )
    here, elements = weight.detach(), 1
    if here.dim() > 2:
        here, elements = torch.linalg.vector_norm(here.flatten(2).float(), dim=2), here[0, 0].numel()
    shape = (int(here.shape[0]), int(here.shape[1])) if shape is None else shape
    rows, columns = (_positions(kept[axis], here.shape[axis], shape[axis], name, axis) for axis in (0, 1))
    dense = here.new_zeros(shape)
    dense[rows.to(here.device)[:, None], columns.to(here.device)] = here
    if block_shape is None:
        block_grid = (BLOCKS, BLOCKS) if block_grid is None else block_grid
        block_grid = _at_most(block_grid, shape)
    borders = block_borders(dense, block_shape, block_grid)
    row_norms, column_norms = block_line_norms(dense, block_shape, block_grid)
    there = (_counts(rows, borders[0]), _counts(columns, borders[1]))
    # a line is as long as its block has positions that are still there
    row_alive = _alive(row_norms.cpu(), there[1][None, :] * elements, threshold)
    column_alive = _alive(column_norms.cpu(), there[0][:, None] * elements, threshold)
    sizes = tuple(torch.tensor(side, dtype=torch.float64).diff() for side in borders)
    alive = _summed(row_alive, borders[0], 0) / sizes[0][:, None] * (_summed(column_alive, borders[1], 1) / sizes[1])
    left = there[0][:, None] * there[1] / (sizes[0][:, None] * sizes[1])
    total = max(1, shape[0] * shape[1])
    living = int((~(here.abs() <= threshold * elements**0.5)).sum())  # what is not a number is not zero
    return MatrixMap(
        name=name,
        shape=shape,
        borders=borders,
        alive=alive,
        gone=1 - left,
        sparsity=1 - living / total,
        removed=1 - here.numel() / total,
        bits=float(8 * weight.dtype.itemsize if bits is None else bits) if here.numel() else 0.0,
    )


def removed_map(name: str, shape: tuple[int, int], **options: Any) -> MatrixMap:
    """The map of a matrix that is no longer there, of a layer that was removed; options as `matrix_map`."""
    nothing = torch.zeros(0, dtype=torch.long)
    return matrix_map(torch.zeros(0, 0), name, shape=shape, kept=(nothing, nothing), **options)


def _positions(kept: Tensor | None, now: int, before: int, name: str, axis: int) -> Tensor:
    positions = torch.arange(before) if kept is None else kept.cpu()
    if positions.numel() != now or (now and int(positions[-1]) >= before):
        raise ValueError(
            f"Expected the positions of axis {axis} of {name!r} that stayed of {before} to be those of a matrix with "
            f"{now}, but got {positions.numel()}. Pass the plan of everything that was removed, in the coordinates of "
            "the model before."
        )
    return positions


def _at_most(grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(type(number) is int for number in grid):
        return grid  # refused by its own message
    return min(grid[0], max(1, shape[0])), min(grid[1], max(1, shape[1]))


def _counts(positions: Tensor, borders: tuple[int, ...]) -> Tensor:
    """How many positions lie in each block, float64."""
    return torch.searchsorted(positions, torch.tensor(borders)).diff().double()


def _alive(norms: Tensor, lengths: Tensor, threshold: float) -> Tensor:
    """Whether each line is alive, float64: its root mean square exceeds the threshold."""
    return (~(norms.double() <= threshold * lengths.sqrt())).double()


def _summed(lines: Tensor, borders: tuple[int, ...], axis: int) -> Tensor:
    """Sums of the lines of each block along an axis."""
    zero = torch.zeros_like(lines.narrow(axis, 0, 1))
    return torch.cat((zero, lines.cumsum(axis)), axis).index_select(axis, torch.tensor(borders)).diff(dim=axis)


__all__ = ["ALIVE", "DEAD", "GONE", "PARTLY", "STATES", "MatrixMap", "matrix_map", "removed_map"]
