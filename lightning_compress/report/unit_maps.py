"""Norms of the units of structures, in the numbering that they had before anything was removed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan
from lightning_compress.quantization import packed_weights
from lightning_compress.structures import Structures, named_tensors
from lightning_compress.unit_groups import UnitGroups

BINS = 20


@dataclass(frozen=True, eq=False)
class UnitMap:
    """The units of one structure.

    Args:
        name: of the structure.
        kind: its kind.
        norms: coupled Euclidean norm of each unit over all its weights, float64 (units before removals,); nan where the
            unit was removed.
    """

    name: str
    kind: str
    norms: Tensor

    @property
    def units(self) -> int:
        """Number of units before removals."""
        return self.norms.numel()

    @property
    def removed(self) -> int:
        """Number of units that were removed."""
        return int(self.norms.isnan().sum())

    @property
    def dead(self) -> int:
        """Number of units that are there and exactly zero."""
        return int((self.norms == 0).sum())

    @property
    def alive(self) -> int:
        """Number of units that are there and not zero."""
        return self.units - self.removed - self.dead

    def histogram(self, upper: float | None = None, bins: int = BINS) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """How many of the living units have which norm.

        Args:
            upper: end of the last bin; larger norms count there. Default: the largest norm.
            bins: number of bins of equal width from 0.

        Returns:
            Counts and the borders of the bins, one more.

        >>> UnitMap("up.ffn", "ffn", torch.tensor([0.0, 1.0, 3.0, 4.0, float("nan")])).histogram(bins=2)
        ((1, 2), (0.0, 2.0, 4.0))
        """
        living = self.norms[self.norms.isfinite() & (self.norms > 0)]
        upper = (float(living.max()) if living.numel() else 1.0) if upper is None else upper
        places = (living / upper * bins).long().clamp(0, bins - 1)
        counts = torch.bincount(places, minlength=bins).tolist()
        return tuple(counts), tuple(upper * number / bins for number in range(bins + 1))

    def to_dict(self) -> dict[str, Any]:
        """The map as plain numbers, ready for JSON: None where a unit was removed, "inf" where a norm is not finite."""
        return {"name": self.name, "kind": self.kind, "norms": [_plain(norm) for norm in self.norms.tolist()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UnitMap:
        """The inverse of ``to_dict``."""
        norms = [math.nan if norm is None else float(norm) for norm in data["norms"]]
        return cls(data["name"], data["kind"], torch.tensor(norms, dtype=torch.float64))


@torch.no_grad()
def unit_maps(model: nn.Module, structures: Structures, plan: PruningPlan | None = None) -> tuple[UnitMap, ...]:
    """The map of every structure whose units are slices of weights.

    Args:
        model: the model as it is now.
        structures: those of the model before anything was removed.
        plan: everything that was removed since; None for nothing.
    """
    tensors = all_weights(model)
    current = structures if plan is None else plan.shrunk(structures)
    shown = [s for s in current if not s.members]
    groups = UnitGroups(tensors, shown)
    # a weight that diverged has a norm that is not finite; removed units alone are nan
    norms = groups.norms().double().nan_to_num(nan=math.inf).cpu()
    found = []
    for structure in structures:
        if structure.members:
            continue
        dense = torch.full((structure.units,), math.nan, dtype=torch.float64)
        if structure.name in groups.spans:
            kept = range(structure.units) if plan is None else plan.kept.get(structure.name, range(structure.units))
            dense[torch.as_tensor(list(kept), dtype=torch.long)] = norms[groups.spans[structure.name]]
        found.append(UnitMap(structure.name, structure.kind, dense))
    return tuple(found)


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, and the values of weights that are stored as packed integers."""
    tensors = named_tensors(model)
    tensors.update((name, packed.values()) for name, packed in packed_weights(model).items())
    return tensors


def of_kinds(maps: Iterable[UnitMap], *kinds: str) -> tuple[UnitMap, ...]:
    """Those of these kinds."""
    return tuple(m for m in maps if m.kind in kinds)


def _plain(norm: float) -> float | str | None:
    if math.isnan(norm):
        return None
    return norm if math.isfinite(norm) else "inf"


__all__ = ["BINS", "UnitMap", "all_weights", "of_kinds", "unit_maps"]
