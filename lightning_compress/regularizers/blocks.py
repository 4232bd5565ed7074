"""The block-wise group lasso: rows and columns of the blocks of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.regularizers._checks import checked_step, require_floating
from lightning_compress.regularizers.lasso import shrinking_factors
from lightning_compress.regularizers.norms import norm_over


def block_group_lasso(
    weight: Tensor, block_shape: tuple[int, int] | None = None, block_grid: tuple[int, int] | None = None
) -> Tensor:
    r"""Block-wise group lasso (BSSL): the rows and the columns of every block of a matrix are groups.

    .. math:: R = \sum_{\text{blocks } B} \Bigl( \sum_r \lVert B_{r,:} \rVert_2 + \sum_c \lVert B_{:,c} \rVert_2 \Bigr)

    Every element lies in one row and one column of its block, and the gradients of both, two unit vectors, add. Blocks
    need not divide the matrix: with ``block_shape`` the last blocks are what is left, with ``block_grid`` the sizes
    differ by at most one.

    ::

        weight (out_features 4, in_features 6), block_shape (2, 4)         the groups of the first block
            a a a a | b b                                                      - - - -     row groups
            a a a a | b b                                                      - - - -
            --------+----                                                      | | | |     column groups
            c c c c | d d
            c c c c | d d

    Args:
        weight: matrix of shape ``(out_features, in_features)``.
        block_shape: ``(out, in)`` size of a block.
        block_grid: ``(out, in)`` number of blocks; at most one of the two. Neither: the whole matrix is one block.

    Returns:
        Scalar tensor, float32 for half-precision weights.

    Raises:
        TypeError: if ``weight`` is not floating-point, or the block is not two integers.
        ValueError: if ``weight`` is not a matrix, both ``block_shape`` and ``block_grid`` are given, a number is below
            1, or the grid has more blocks than there are rows or columns.

    Reference: Mao, Yang, Li, Li & Chen 2021, "TPrune: Efficient Transformer Pruning for Mobile Devices".

    >>> import torch
    >>> block_group_lasso(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor(12.)
    """
    rows, columns = block_line_norms(weight, block_shape, block_grid)
    return rows.sum() + columns.sum()


def block_line_norms(
    weight: Tensor, block_shape: tuple[int, int] | None = None, block_grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Norms of the rows and of the columns of every block.

    Which lines die is what the block-wise group lasso is read for.

    Args:
        weight: matrix of shape ``(out_features, in_features)``.
        block_shape: ``(out, in)`` size of a block.
        block_grid: ``(out, in)`` number of blocks; at most one of the two. Neither: the whole matrix is one block.

    Returns:
        Row norms of shape ``(out_features, blocks along in)`` and column norms of shape ``(blocks along out,
        in_features)``.

    Raises:
        TypeError, ValueError: as `block_group_lasso`.
    """
    out_parts, in_parts = _block_parts(weight, block_shape, block_grid)
    # (out, blocks, block) -> (out, blocks)
    rows = [norm_over(part.along(weight, axis=1), (2,)) for part in in_parts]
    # (blocks, block, in) -> (blocks, in)
    columns = [norm_over(part.along(weight, axis=0), (1,)) for part in out_parts]
    return torch.cat(rows, dim=1), torch.cat(columns, dim=0)


def block_borders(
    weight: Tensor, block_shape: tuple[int, int] | None = None, block_grid: tuple[int, int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the blocks of a matrix begin and end.

    Args:
        weight: matrix of shape ``(out_features, in_features)``.
        block_shape: ``(out, in)`` size of a block.
        block_grid: ``(out, in)`` number of blocks; at most one of the two. Neither: the whole matrix is one block.

    Returns:
        Along out and along in the positions of the borders, increasing, from 0 to the size: one more than blocks.

    Raises:
        TypeError, ValueError: as `block_group_lasso`.

    >>> import torch
    >>> block_borders(torch.zeros(4, 6), block_shape=(2, 4))
    ((0, 2, 4), (0, 4, 6))
    """
    out_parts, in_parts = _block_parts(weight, block_shape, block_grid)
    return _borders(out_parts), _borders(in_parts)


@torch.no_grad()
def block_group_lasso_prox_(
    weight: Tensor,
    step: float,
    block_shape: tuple[int, int] | None = None,
    block_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Shrink the rows of every block and then its columns, in place: one pass for the block-wise group lasso.

    Row and column groups overlap, and the proximal map of a sum of overlapping norms is not the composition of the two
    maps: this is one pass of the two exact maps one after the other, which brings whole lines to exact zero, not the
    proximal map of the sum.

    Args:
        weight: matrix of shape ``(out_features, in_features)``, changed in place; a leaf that requires grad is allowed.
        step: learning rate times strength, >= 0.
        block_shape: ``(out, in)`` size of a block.
        block_grid: ``(out, in)`` number of blocks; at most one of the two. Neither: the whole matrix is one block.

    Returns:
        ``weight``.

    Raises:
        TypeError, ValueError: as `block_group_lasso`; and ValueError if ``step`` is negative or not finite. ``weight``
            is then unchanged.

    >>> import torch
    >>> block_group_lasso_prox_(torch.tensor([[6.0, 8.0], [0.5, 0.0]]), step=1.0)
    tensor([[4.4000, 6.2000],
            [0.0000, 0.0000]])
    """
    step = checked_step(step)
    out_parts, in_parts = _block_parts(weight, block_shape, block_grid)
    for parts, axis, within in ((in_parts, 1, 2), (out_parts, 0, 1)):
        for part in parts:
            blocks = part.along(weight, axis)
            blocks.mul_(shrinking_factors(norm_over(blocks, (within,)), step).unsqueeze(within))
    return weight


class _Part(NamedTuple):
    """``blocks`` blocks of ``size`` positions each, from ``start`` on, along one axis.

    One or two of them describe any division of an axis, so that a ragged one costs two passes and not one per block.
    """

    start: int
    blocks: int
    size: int

    def along(self, weight: Tensor, axis: int) -> Tensor:
        """View with ``axis`` split into (blocks, size)."""
        return weight.narrow(axis, self.start, self.blocks * self.size).unflatten(axis, (self.blocks, self.size))


def _block_parts(
    weight: Tensor, block_shape: tuple[int, int] | None, block_grid: tuple[int, int] | None
) -> tuple[list[_Part], list[_Part]]:
    require_floating(weight, "weight")
    if weight.ndim != 2:
        raise ValueError(
            f"Expected weight to be a matrix (out_features, in_features), but got shape {tuple(weight.shape)}. "
            "Reshape the kernel to a matrix, e.g. weight.flatten(1), which is a view."
        )
    if block_shape is not None and block_grid is not None:
        raise ValueError(
            f"Expected block_shape or block_grid, but got both: block_shape={block_shape}, block_grid={block_grid}. "
            "block_shape is the size of a block, block_grid the number of blocks."
        )
    name, block = ("block_grid", block_grid) if block_grid is not None else ("block_shape", block_shape)
    if block is None:
        block = (max(1, weight.shape[0]), max(1, weight.shape[1]))
    if not isinstance(block, (tuple, list)) or len(block) != 2 or not all(type(number) is int for number in block):
        raise TypeError(f"Expected {name} to be two integers (out, in), but got {block!r}.")
    if min(block) < 1:
        raise ValueError(f"Expected the numbers of {name} to be at least 1, but got {tuple(block)}.")
    if name == "block_grid" and (block[0] > weight.shape[0] or block[1] > weight.shape[1]):
        raise ValueError(
            f"Expected block_grid to have at most as many blocks as weight has rows and columns, "
            f"{tuple(weight.shape)}, but got {tuple(block)}. Use a coarser grid, or block_shape for a size."
        )
    split = _split_into if name == "block_grid" else _split_by
    return split(weight.shape[0], block[0]), split(weight.shape[1], block[1])


def _split_by(length: int, size: int) -> list[_Part]:
    full, rest = divmod(length, size)
    return _without_empty(_Part(0, full, size), _Part(full * size, 1, rest))


def _split_into(length: int, count: int) -> list[_Part]:
    size, larger = divmod(length, count)
    return _without_empty(_Part(0, larger, size + 1), _Part(larger * (size + 1), count - larger, size))


def _borders(parts: list[_Part]) -> tuple[int, ...]:
    return (0, *(part.start + part.size * (number + 1) for part in parts for number in range(part.blocks)))


def _without_empty(*parts: _Part) -> list[_Part]:
    """The parts that hold something; for an axis of length 0 a part of no blocks, so that norms keep their shape."""
    return [part for part in parts if part.blocks and part.size] or [_Part(0, 0, 1)]
