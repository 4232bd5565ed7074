"""Scores of units out of a checkpoint, for models that fit into no memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.export.checkpoint import Rename, plan_names, read_checkpoint
from lightning_compress.export.safetensors_file import read_tensor
from lightning_compress.progress import Progress, quiet
from lightning_compress.structures import Structure

CHUNK = 2**22  # elements squared at once


def checkpoint_scores(
    structures: Iterable[Structure],
    in_dir: str | os.PathLike[str],
    *,
    rename: Rename | None = None,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    r"""The importance "norm" of every unit, read from a checkpoint one tensor at a time.

    :math:`s_u = \lVert w_u \rVert_2^2` as in ``unit_scores``, for ``make_plan(..., scores=...)``.

    Args:
        structures: structures to score.
        in_dir: folder with the checkpoint, see ``apply_plan_to_checkpoint``.
        rename: see ``apply_plan_to_checkpoint``.
        progress: see ``apply_plan_to_checkpoint``.

    Returns:
        structure name -> scores of shape (units,), in float64.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the checkpoint lacks a parameter, or has it in another size.
    """
    structures = tuple(structures)
    headers, _ = read_checkpoint(Path(in_dir))
    wanted: dict[str, dict[int, int]] = {}  # name in the plan -> axis -> its size
    for structure in structures:
        for piece in structure.slices:
            if piece.role != "companion":
                wanted.setdefault(piece.parameter, {})[piece.axis] = piece.size
    squares: dict[tuple[str, int], Tensor] = {}
    names = plan_names([name for header in headers for name in header.entries], rename)
    for header in headers:
        with header.path.open("rb") as file:
            for name, entry in progress(header.entries.items(), f"tensors of {header.path.name}"):
                parameter = names[name]
                axes = wanted.get(parameter, {})
                for axis, size in axes.items():
                    if axis >= len(entry.shape) or entry.shape[axis] != size:
                        raise ValueError(
                            f"Expected axis {axis} of {name!r} to have size {size} in the checkpoint, as in the model "
                            f"whose structures these are, but its shape is {entry.shape}."
                        )
                if axes and (parameter, next(iter(axes))) not in squares:
                    tensor = read_tensor(file, entry)
                    for axis in axes:
                        squares[parameter, axis] = _squares(tensor, axis)
    scores = {}
    for structure in structures:
        total = torch.zeros(structure.units, dtype=torch.float64)
        for piece in structure.slices:
            if piece.role == "companion":
                continue
            if (piece.parameter, piece.axis) not in squares:
                raise ValueError(
                    f"Expected the checkpoint to have {piece.parameter!r} of structure {structure.name!r}, but it has "
                    "none. If it has another name there, pass rename, see apply_plan_to_checkpoint."
                )
            total += squares[piece.parameter, piece.axis][piece.indices].sum(1)
        scores[structure.name] = total
    return scores


def _squares(tensor: Tensor, axis: int) -> Tensor:
    """Sum of squares at every position of ``axis``, float64 of shape (size,); a piece of the tensor at a time."""
    total = torch.zeros(tensor.shape[axis], dtype=torch.float64)
    step = max(1, CHUNK * tensor.shape[0] // max(1, tensor.numel()))
    for start in range(0, tensor.shape[0], step):
        piece = tensor[start : start + step].double().square()
        sums = piece.sum([d for d in range(piece.dim()) if d != axis]) if piece.dim() > 1 else piece
        if axis == 0:
            total[start : start + step] = sums
        else:
            total += sums
    return total
