"""Sparsity maps as arrays: what of a model is alive, dead or gone, relative to the model before any removal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from lightning_compress.plan import PruningPlan
from lightning_compress.quantization import packed_weights, weight_quantizers
from lightning_compress.report.matrix_maps import MatrixMap, matrix_map, removed_map
from lightning_compress.report.tokens import TokenSummary
from lightning_compress.report.unit_maps import UnitMap, all_weights, unit_maps
from lightning_compress.structures import Structures

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True, eq=False)
class ModelMaps:
    r"""A model at one moment, as plain arrays.

    With :math:`n_m` elements of matrix m before removals, :math:`s_m` its part that was removed or is zero and
    :math:`b_m` bits of an element that is left:

    .. math:: \text{sparsity} = \frac{\sum_m n_m s_m}{\sum_m n_m}, \quad
        \text{mean\_bits} = \frac{\sum_m n_m (1 - r_m) b_m}{\sum_m n_m (1 - r_m)}

    where :math:`r_m` is the part that was removed.

    Args:
        step: optimizer steps taken.
        matrices: maps of the matrices, in the order of the model.
        structures: norms of the units of structures; empty where none are known.
        tokens: fraction of the real tokens that enters each layer; None without token pruning.
    """

    step: int
    matrices: tuple[MatrixMap, ...]
    structures: tuple[UnitMap, ...] = ()
    tokens: TokenSummary | None = None
    _sizes: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sizes", tuple(m.shape[0] * m.shape[1] for m in self.matrices))

    @property
    def sparsity(self) -> float:
        """Part of the elements of all matrices that was removed or is zero."""
        return self._mean([m.sparsity for m in self.matrices])

    @property
    def removed(self) -> float:
        """Part of the elements of all matrices that was removed."""
        return self._mean([m.removed for m in self.matrices])

    @property
    def mean_bits(self) -> float:
        """Mean number of bits of an element that is left."""
        left = [size * (1 - m.removed) for size, m in zip(self._sizes, self.matrices, strict=True)]
        total = sum(left)
        return sum(n * m.bits for n, m in zip(left, self.matrices, strict=True)) / total if total else 0.0

    def _mean(self, parts: Sequence[float]) -> float:
        total = sum(self._sizes)
        return sum(n * part for n, part in zip(self._sizes, parts, strict=True)) / total if total else 0.0

    def metrics(self) -> dict[str, float]:
        """The headline numbers under flat names, as loggers take them."""
        values = {
            "sparsity_maps/sparsity": self.sparsity,
            "sparsity_maps/removed": self.removed,
            "sparsity_maps/mean_bits": self.mean_bits,
        }
        kinds: dict[str, list[int]] = {}
        for units in self.structures:
            alive, total = kinds.setdefault(units.kind, [0, 0])
            kinds[units.kind] = [alive + units.alive, total + units.units]
        values.update({f"sparsity_maps/alive/{kind}": alive / total for kind, (alive, total) in kinds.items()})
        if self.tokens is not None:
            values["sparsity_maps/tokens_macs_kept"] = self.tokens.macs_kept
        return values

    def to_dict(self) -> dict[str, Any]:
        """All arrays as plain numbers, ready for JSON."""
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "removed": self.removed,
            "mean_bits": self.mean_bits,
            "matrices": [m.to_dict() for m in self.matrices],
            "structures": [u.to_dict() for u in self.structures],
            "tokens": None if self.tokens is None else self.tokens.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelMaps:
        """The inverse of ``to_dict``."""
        return cls(
            step=data["step"],
            matrices=tuple(MatrixMap.from_dict(m) for m in data["matrices"]),
            structures=tuple(UnitMap.from_dict(u) for u in data["structures"]),
            tokens=None if data["tokens"] is None else TokenSummary.from_dict(data["tokens"]),
        )


def model_maps(
    model: nn.Module,
    structures: Structures | None = None,
    plan: PruningPlan | None = None,
    *,
    parameters: Sequence[str] | None = None,
    block_shape: tuple[int, int] | None = None,
    block_grid: tuple[int, int] | None = None,
    threshold: float = 0.0,
    tokens: TokenSummary | None = None,
    step: int = 0,
    order: Sequence[str] = (),
) -> ModelMaps:
    """The maps of a model; removed units stay visible, at the places that they had.

    Args:
        model: the model as it is now.
        structures: its structures before anything was removed, as `discover` returns them; None for maps of matrices
            alone.
        plan: everything that was removed since, in the coordinates of the model before, as `SurgeryReport` and
            `FinalizeCompression` have it; None for nothing.
        parameters: shell patterns of the parameters that are shown, ``("encoder.*.weight",)``. Default: all with two
            dims or more.
        block_shape: ``(out, in)`` size of a block; or
        block_grid: ``(out, in)`` number of blocks. Default: at most 32 a side.
        threshold: elements and lines count as dead up to this root mean square; 0 for exact zeros.
        tokens: what token pruning leaves.
        step: optimizer steps taken.
        order: names of matrices in the order in which they are shown, as far as they are there.

    Raises:
        TypeError, ValueError: as `matrix_map`; and ValueError if a pattern matches nothing, or nothing is left to show.

    >>> model_maps(nn.Sequential(nn.Linear(3, 2), nn.ReLU())).matrices[0].counts
    {'gone': 0, 'dead': 0, 'partly dead': 0, 'alive': 6}
    """
    own = {name for name, _ in model.named_parameters()} | set(packed_weights(model))
    weights = {n: t for n, t in all_weights(model).items() if n in own and t.dim() >= 2 and t.is_floating_point()}
    before = {} if plan is None else {n: s for n, s in plan.shapes.items() if len(s) >= 2}
    lost = [n for n in before if n not in own and plan is not None and n not in plan.new_shapes()]
    names = _chosen([*weights, *lost], parameters, model)
    place = {name: number for number, name in enumerate(order)}
    names.sort(key=lambda name: place.get(name, len(place)))
    kept = {} if plan is None else plan.kept_positions()
    bits = _bits(model)
    blocks: dict[str, Any] = {"block_shape": block_shape, "block_grid": block_grid, "threshold": threshold}
    matrices = []
    for name in names:
        shape = before[name][:2] if name in before else None
        if name not in weights:
            assert shape is not None
            matrices.append(removed_map(name, (shape[0], shape[1]), **blocks))
            continue
        sides = (kept.get((name, 0)), kept.get((name, 1)))
        size = None if shape is None else (shape[0], shape[1])
        matrices.append(matrix_map(weights[name], name, shape=size, kept=sides, bits=bits.get(name), **blocks))
    units = () if structures is None else unit_maps(model, structures, plan)
    return ModelMaps(step, tuple(matrices), units, tokens)


def family(name: str) -> tuple[str, int]:
    """The place of a parameter or structure in a stack: its name without its first number, and that number.

    >>> family("decoder.layers.3.up.weight"), family("head.weight")
    (('decoder.layers.*.up.weight', 3), ('head.weight', 0))
    """
    found = _NUMBER.search(name)
    if found is None:
        return name, 0
    return f"{name[: found.start()]}*{name[found.end() :]}", int(found[0])


def families(parts: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Values by name as curves over the depth of a stack: family -> {number in the stack: value}."""
    curves: dict[str, dict[int, float]] = {}
    for name, value in parts.items():
        stack, depth = family(name)
        curves.setdefault(stack, {})[depth] = value
    return curves


def _bits(model: nn.Module) -> dict[str, float]:
    """Bits of the integers of every weight that is quantized, by name."""
    found = {n: float(q.quantizer.stored_bits) for n, q in weight_quantizers(model).items() if q.enabled}
    found.update((name, float(packed.form.bits)) for name, packed in packed_weights(model).items())
    return found


def _chosen(names: list[str], patterns: Sequence[str] | None, model: nn.Module) -> list[str]:
    if patterns is not None:
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(
                    f"Expected parameters to match matrices of {type(model).__name__}, but {pattern!r} matches none of "
                    f"{names[:8]}{' ...' if len(names) > 8 else ''}."
                )
        names = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise ValueError(
            f"Expected a model with matrices to draw maps of, but {type(model).__name__} has no parameter with two "
            "dims or more."
        )
    return names


__all__ = ["ModelMaps", "families", "family", "model_maps"]
