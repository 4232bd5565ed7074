"""All units of many structures as one flat vector: their coupled norms, and scaling them in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.regularizers import group_norms
from lightning_compress.shards import Part, add_up, local
from lightning_compress.structures import Role, Structure


@dataclass(frozen=True)
class _Piece:
    """One slice of one structure: positions ``start:stop`` of the flat vector of positions."""

    parameter: str
    tensor: Tensor
    axis: int
    structure: int
    start: int
    stop: int
    part: Part


class UnitGroups:
    """The coupled groups of several structures, one group for each unit.

    The group of a unit is every scalar at its positions in the producer and consumer slices of its structure:

        norm_u = sqrt( sum over slices, over positions p of u:  || tensor[axis = p] ||^2 )

    Units of all structures lie in one flat vector (structure after structure), so that a proximal map is a handful of
    operations however many layers there are. Norms are taken along whole axes, without gathering: a slice costs one
    read for its norms and, if it is scaled, one read and one write.

    Where tensors are sharded, every process holds a part of each unit: the flat vector of positions has those of this
    process, squares are summed over all of them, and each scales its own part. All processes take norms together.

    Args:
        tensors: parameter name -> tensor; a slice whose parameter is missing (frozen, not in an optimizer) is left out.
        structures: the structures; one without any slice left contributes units of size 0 and norm 0.
        roles: roles of the slices that count.

    Attributes:
        total: number of units of all structures.
        spans: structure name -> ``slice`` of its units in the flat vector.
        sizes: scalars in the group of each unit, float of shape (total,), on the device of the norms.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        structures: Iterable[Structure],
        roles: Sequence[Role] = ("producer", "consumer"),
    ) -> None:
        self.structures = tuple(structures)
        self.spans: dict[str, slice] = {}
        self._pieces: list[_Piece] = []
        owners: list[Tensor] = []
        total = sum(s.units for s in self.structures)
        sizes = torch.zeros(total + 1, dtype=torch.float64)
        first, start = 0, 0
        for number, structure in enumerate(self.structures):
            self.spans[structure.name] = slice(first, first + structure.units)
            for piece in structure.slices:
                if piece.role not in roles or piece.parameter not in tensors:
                    continue
                tensor = tensors[piece.parameter]
                unit = piece.unit_of_position()
                # positions that no unit owns belong to one more unit behind the last, whose factor is always 1
                owner = torch.where(unit < 0, total, unit + first)
                each = float(tensor.numel() // max(piece.size, 1))
                sizes.index_add_(0, owner, torch.full((piece.size,), each, dtype=torch.float64))
                part = Part.of(tensor, piece.parameter)
                owner = owner[part.along(piece.axis, piece.size)]
                stop = start + owner.numel()
                self._pieces.append(_Piece(piece.parameter, tensor, piece.axis, number, start, stop, part))
                owners.append(owner)
                start = stop
            first += structure.units
        self.total = total
        devices = [p.tensor.device for p in self._pieces]
        self.device = devices[0] if devices else torch.device("cpu")
        # sums of squares of half-precision weights are taken in float32
        self.dtype = torch.float64 if any(p.tensor.dtype == torch.float64 for p in self._pieces) else torch.float32
        self._owner = (torch.cat(owners) if owners else torch.zeros(0, dtype=torch.long)).to(self.device)
        self._lengths = [p.stop - p.start for p in self._pieces]
        self._groups = list(dict.fromkeys(p.part.group for p in self._pieces))
        self.sizes = sizes[:total].to(self.device, self.dtype)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Euclidean norm of the group of each unit, shape (total,)."""
        if not self._pieces:
            return torch.zeros(self.total, dtype=self.dtype, device=self.device)
        lengths = [_position_norms(p.tensor, p.axis).to(device=self.device, dtype=self.dtype) for p in self._pieces]
        squares = torch.cat(lengths).square_()  # (positions of all slices,)
        units = torch.zeros(self.total + 1, dtype=self.dtype, device=self.device)
        if not any(group is not None for group in self._groups):
            return units.index_add_(0, self._owner, squares)[: self.total].sqrt_()
        for group in self._groups:  # what every process holds whole must not be summed over them
            own = torch.zeros_like(units)
            for piece in self._pieces:
                if piece.part.group is group:
                    where = slice(piece.start, piece.stop)
                    own.index_add_(0, self._owner[where], squares[where])
            units += add_up(own, group)
        return units[: self.total].sqrt_()

    @torch.no_grad()
    def scale_(self, factors: Tensor, only: Iterable[int] | None = None) -> None:
        """Multiply the group of every unit by its factor, in place.

        Args:
            factors: shape (total,).
            only: numbers of the structures to touch, where the caller knows that the factors of the others are 1.
        """
        touched = None if only is None else set(only)
        for piece, factor in self._along_axes(factors, touched):
            local(piece.tensor).mul_(factor)

    @torch.no_grad()
    def add_scaled_(self, targets: Mapping[str, Tensor], coefficients: Tensor) -> None:
        """``target += coefficient of the unit * weight``, which is how a penalty on norms enters gradients.

        Args:
            targets: parameter name -> tensor of the same shape to add to; a parameter that is missing is skipped.
            coefficients: shape (total,); positions that no unit owns get nothing.
        """
        for piece, coefficient in self._along_axes(coefficients, None, rest=0.0):
            target = targets.get(piece.parameter)
            if target is not None:
                own = local(target)
                own.addcmul_(local(piece.tensor).to(own.dtype), coefficient.to(own.dtype))

    @torch.no_grad()
    def zero_(self, dead: Tensor, targets: Mapping[str, Iterable[Tensor]]) -> None:
        """Set to zero what belongs to dead units in tensors that accompany the slices (an optimizer's moments).

        Args:
            dead: bool of shape (total,), on the CPU or the device of the norms.
            targets: parameter name -> tensors of the same shape.
        """
        kept = 1.0 - dead.to(device=self.device, dtype=self.dtype)
        gone = {n for n, s in enumerate(self.structures) if bool(dead[self.spans[s.name]].any())}
        for piece, factor in self._along_axes(kept, gone):
            for target in targets.get(piece.parameter, ()):
                # a product would keep infinities and NaN of an overflown moment
                local(target).masked_fill_(factor == 0, 0)

    def _along_axes(
        self, values: Tensor, touched: set[int] | None, rest: float = 1.0
    ) -> Iterable[tuple[_Piece, Tensor]]:
        if not self._pieces:
            return
        padded = torch.cat(
            [values.to(device=self.device, dtype=self.dtype), values.new_full((1,), rest).to(self.device)]
        )
        for piece, along in zip(self._pieces, padded[self._owner].split(self._lengths), strict=True):
            if touched is None or piece.structure in touched:
                shape = [1] * piece.tensor.dim()
                shape[piece.axis] = -1
                yield piece, along.to(device=piece.tensor.device, dtype=piece.tensor.dtype).view(shape)


def _position_norms(tensor: Tensor, axis: int) -> Tensor:
    """Norm over all axes but one, shape (own positions of the axis,), up to sign: a bias is its own norm."""
    own = local(tensor.detach())
    return own if own.dim() == 1 else group_norms(own, axis)
