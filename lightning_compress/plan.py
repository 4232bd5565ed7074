"""The pruning plan: which units stay, in original coordinates, as a record that can be saved, composed and checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from operator import index
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_compress import plan_format
from lightning_compress.structures import Slice, Structure, Structures, is_inside, named_tensors, with_constants

Axis = tuple[str, int]


@dataclass(frozen=True)
class PruningPlan:
    """Kept units per structure, in the coordinates of the original (unpruned) model.

    Two structures may share an axis: the heads and the V/O dims of one attention both own positions of its output
    projection. What goes on an axis is the union of what its structures remove.

    Args:
        structures: the structures that lose units (a structure that keeps everything may be present too).
        kept: structure name -> strictly increasing kept unit numbers, at least ``floor`` of each structure.
        shapes: shape in the original model of every parameter and buffer that a structure touches or, where its units
            are modules, holds.

    Raises:
        ValueError: if names, unit numbers, tables of positions and shapes do not fit together, an axis would be left
            empty, or all layers of a stack would go.
        TypeError: if a unit number is not an integer.
    """

    structures: tuple[Structure, ...]
    kept: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    verified: bool = False

    def __post_init__(self) -> None:
        # the record is frozen: its containers are its own copies
        object.__setattr__(self, "structures", tuple(self.structures))
        object.__setattr__(self, "kept", {n: _unit_numbers(n, units) for n, units in self.kept.items()})
        object.__setattr__(self, "shapes", {n: tuple(int(d) for d in shape) for n, shape in self.shapes.items()})
        names = [s.name for s in self.structures]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"Expected structure names to be unique in a plan, but got {twice} more than once.")
        if set(names) != set(self.kept):
            lacking, unknown = sorted(set(names) - set(self.kept)), sorted(set(self.kept) - set(names))
            raise ValueError(
                f"Expected kept units for exactly the structures of the plan, but {lacking} have none and {unknown} "
                f"are no structures of it."
            )
        for structure in self.structures:
            _check_kept(structure, self.kept[structure.name])
            for piece in structure.slices:
                _check_slice(structure, piece, self.shapes)
        for (parameter, axis), positions in self.kept_positions().items():
            if not positions.numel():
                raise ValueError(
                    f"Expected every axis to keep a position, but this plan empties axis {axis} of {parameter!r}."
                )
        for structure in self.structures:
            _check_stack(structure, self.counts)

    @classmethod
    def of(
        cls, model: nn.Module, structures: Iterable[Structure], kept: Mapping[str, Sequence[int] | Tensor]
    ) -> PruningPlan:
        """The plan that keeps the units ``kept`` of ``model``, whose shapes it records.

        Args:
            model: the model that ``structures`` were discovered in.
            structures: its structures.
            kept: structure name -> kept unit numbers, in any order; a structure that is not named keeps all its units.
        """
        structures = tuple(structures)
        names = [s.name for s in structures]
        for name in kept:
            if name not in names:
                hint = _hint(name, names)
                raise ValueError(f"Expected kept units of structures among {names}, but got {name!r}.{hint}")
        tensors = named_tensors(model)
        shapes: dict[str, tuple[int, ...]] = {}
        for structure in structures:
            for parameter in structure.parameters:
                if parameter not in tensors:
                    raise ValueError(_missing(parameter, structure.name, tensors))
                shapes[parameter] = tuple(tensors[parameter].shape)
            if structure.members:
                shapes.update((name, tuple(tensors[name].shape)) for name in structure.tensors_of(tensors))
        chosen = {s.name: kept.get(s.name, range(s.units)) for s in structures}
        return cls(structures, {n: tuple(sorted(_unit_numbers(n, units))) for n, units in chosen.items()}, shapes)

    # What the plan says

    @property
    def counts(self) -> dict[str, int]:
        """Number of kept units of each structure: where the cost polynomials give the cost of the smaller model."""
        return {name: len(units) for name, units in self.kept.items()}

    @property
    def is_empty(self) -> bool:
        """Whether the plan removes nothing."""
        return all(len(self.kept[s.name]) == s.units for s in self.structures)

    def removed(self, name: str) -> tuple[int, ...]:
        """Units of the structure ``name`` that go, increasing."""
        units = {s.name: s.units for s in self.structures}
        if name not in units:
            hint = _hint(name, units)
            raise ValueError(f"Expected a structure of the plan, one of {list(units)}, but got {name!r}.{hint}")
        kept = set(self.kept[name])
        return tuple(u for u in range(units[name]) if u not in kept)

    @property
    def gone(self) -> tuple[str, ...]:
        """Paths of the modules that go as a whole, and every tensor inside them: removed layers and experts."""
        return tuple(s.members[u] for s in self.structures if s.members for u in self.removed(s.name))

    def removed_positions(self) -> dict[Axis, Tensor]:
        """(parameter, axis) -> sorted positions that go, for every axis that loses at least one."""
        return {axis: torch.nonzero(~mask).reshape(-1) for axis, mask in self._kept_masks().items() if not mask.all()}

    def kept_positions(self) -> dict[Axis, Tensor]:
        """(parameter, axis) -> sorted positions that stay, for every axis that loses at least one."""
        return {axis: torch.nonzero(mask).reshape(-1) for axis, mask in self._kept_masks().items() if not mask.all()}

    def new_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape in the smaller model of every parameter and buffer of ``shapes`` that it still has."""
        gone = self.gone
        shapes = {n: list(shape) for n, shape in self.shapes.items() if not any(is_inside(n, m) for m in gone)}
        for (parameter, axis), positions in self.kept_positions().items():
            if parameter in shapes:
                shapes[parameter][axis] = positions.numel()
        return {name: tuple(shape) for name, shape in shapes.items()}

    def _kept_masks(self) -> dict[Axis, Tensor]:
        """(parameter, axis) -> bool of shape (size,), whether the position stays, for every axis of a structure."""
        masks: dict[Axis, Tensor] = {}
        for structure in self.structures:
            gone = torch.tensor(self.removed(structure.name), dtype=torch.long)
            for piece in structure.slices:
                mask = masks.setdefault((piece.parameter, piece.axis), torch.ones(piece.size, dtype=torch.bool))
                mask[piece.indices[gone].reshape(-1)] = False
        return masks

    # The plan and a model

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless every parameter of the plan has its original shape in ``model``; changes nothing."""
        tensors = named_tensors(model)
        new_shapes = self.new_shapes()
        owners = {p: s.name for s in self.structures for p in s.tensors_of(self.shapes)}
        shapes = {name: tuple(tensors[name].shape) for name in self.shapes if name in tensors}
        for parameter in self.shapes:
            if parameter not in tensors:
                if shapes == new_shapes:
                    raise ValueError(
                        f"Expected the model to have {parameter!r} (structure {owners.get(parameter, '?')!r}), but it "
                        "has none. This plan was already applied to this model."
                    )
                raise ValueError(_missing(parameter, owners.get(parameter, "?"), tensors))
        for parameter, shape in self.shapes.items():
            if shapes[parameter] != shape:
                reason = (
                    "This plan was already applied to this model."
                    if shapes == new_shapes
                    else "This is a plan for another model."
                )
                raise ValueError(
                    f"Expected {parameter!r} to have shape {shape}, as in the model that the plan was made for, "
                    f"but got {shapes[parameter]}. {reason}"
                )

    # Plans after plans

    def shrunk(self, structures: Structures) -> Structures:
        """``structures`` of the original model as structures of the model after this plan.

        Units are numbered anew from 0 in their old order, tables of positions follow, and costs stay what they are:
        their variables are kept counts. The exception is a structure of tier "shim": between its sliced weights the
        original width stays for good, so its count in products of activations becomes that constant. What lies inside
        removed modules is gone: structures that lie there as a whole, slices of the others, and their costs.

        Raises:
            ValueError: if the units of a structure would own different numbers of positions, which a table cannot say.
        """
        masks = self._kept_masks()
        # new position of every old one; meaningless where the mask is False
        moved = {axis: torch.cumsum(mask, 0) - 1 for axis, mask in masks.items()}
        smaller = []
        removed_modules = self.gone
        gone: dict[str, float] = {}  # what becomes of the variables of structures that are no longer there
        for structure in structures:
            if structure.members and not self.kept.get(structure.name, (0,)):
                gone[structure.name] = 0.0
                continue
            held, structure = bool(structure.slices), structure.without(removed_modules)
            if held and not structure.slices:
                gone[structure.name] = float(structure.units)
                continue
            rows = torch.tensor(self.kept.get(structure.name, tuple(range(structure.units))), dtype=torch.long)
            slices = []
            for piece in structure.slices:
                axis = (piece.parameter, piece.axis)
                table = piece.indices[rows]
                if axis in masks:
                    if masks[axis].numel() != piece.size:
                        raise ValueError(
                            f"Expected axis {piece.axis} of {piece.parameter!r} to have size {masks[axis].numel()} in "
                            f"structure {structure.name!r}, as in the plan, but got {piece.size}."
                        )
                    stays = masks[axis][table]
                    counts = stays.sum(1)
                    if not counts[0] or (counts != counts[0]).any():
                        raise ValueError(
                            f"Expected each kept unit of {structure.name!r} to keep the same number of positions, one "
                            f"or more, on axis {piece.axis} of {piece.parameter!r}, but got {int(counts.min())} to "
                            f"{int(counts.max())}: another structure removes a part of some units."
                        )
                    table = moved[axis][table[stays]].reshape(rows.numel(), -1)
                size = int(masks[axis].sum()) if axis in masks else piece.size
                slices.append(replace(piece, indices=table, size=size))
            members = tuple(structure.members[int(row)] for row in rows) if structure.members else ()
            smaller.append(replace(structure, units=rows.numel(), slices=tuple(slices), members=members))
        shims = {s.name: float(s.units) for s in structures if s.tier == "shim"}
        return Structures(
            (with_constants(s, gone) for s in smaller) if gone else smaller,
            weight_macs=structures.weight_macs.substitute(gone),
            activation_macs=structures.activation_macs.substitute({**shims, **gone}),
            params=structures.params.substitute(gone),
            pinned=structures.pinned,
        )

    def compose(self, later: PruningPlan) -> PruningPlan:
        """One plan, in the coordinates of this one, that does this plan and then ``later``.

        Args:
            later: a plan made for the model after this plan, where structures bear the same names; it may lack
                structures of this plan and have others.

        Raises:
            ValueError: if ``later`` was not made for the model after this plan.
        """
        shapes = self.new_shapes()
        for parameter, shape in later.shapes.items():
            if shapes.get(parameter, shape) != shape:
                raise ValueError(
                    f"Expected the later plan to be made for the model after this one, where {parameter!r} has shape "
                    f"{shapes[parameter]}, but there it has {shape}."
                )
        mine = {s.name: s for s in self.shrunk(Structures(self.structures))}
        kept = dict(self.kept)
        structures = list(self.structures)
        for structure in later.structures:
            name = structure.name
            if name in kept and name not in mine:
                raise ValueError(
                    f"Expected the later plan to be made for the model after this one, where {name!r} is gone, but it "
                    "has units of it."
                )
            if name not in mine:
                structures.append(self._lifted(structure))
                kept[name] = later.kept[name]
                continue
            if structure.units != mine[name].units:
                raise ValueError(
                    f"Expected the later plan to be made for the model after this one, where {name!r} has "
                    f"{mine[name].units} units, but there it has {structure.units}."
                )
            owners = {(p.parameter, p.axis): p.unit_of_position() for p in mine[name].slices}
            for piece in structure.slices:
                owner = owners.get((piece.parameter, piece.axis))
                units = torch.arange(structure.units).unsqueeze(1).expand_as(piece.indices)
                # a table of ``later`` may lack positions: those that another structure of a composed plan removes
                if owner is not None and not torch.equal(owner[piece.indices], units):
                    raise ValueError(
                        f"Expected the units of {name!r} to own the same positions on axis {piece.axis} of "
                        f"{piece.parameter!r} in the later plan as after this one, but they own others."
                    )
            kept[name] = tuple(self.kept[name][u] for u in later.kept[name])
        both = self.verified and later.verified
        return PruningPlan(tuple(structures), kept, {**later.shapes, **self.shapes}, both)

    def _lifted(self, structure: Structure) -> Structure:
        """A structure of the smaller model in the coordinates of this plan."""
        positions = self.kept_positions()
        slices = []
        for piece in structure.slices:
            old = positions.get((piece.parameter, piece.axis))
            if old is not None:
                size = self.shapes[piece.parameter][piece.axis]
                piece = replace(piece, indices=old[piece.indices], size=size)
            slices.append(piece)
        return replace(structure, slices=tuple(slices))

    # The plan as a file

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back."""
        return plan_format.dumps(self.structures, self.kept, self.shapes, self.verified)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The plan out of JSON text; raises ValueError with the key path of what is malformed."""
        structures, kept, shapes, verified = plan_format.loads(text)
        try:
            return cls(structures, kept, shapes, verified)
        except ValueError as error:
            raise ValueError(f"Malformed pruning plan: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        target = Path(path)
        # the temporary file lies beside its target because a rename is atomic only within a file system
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files for the owner alone; a plan is an ordinary file
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan that ``save`` wrote; raises ValueError naming the file and the key path of what is malformed."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None


def _unit_numbers(name: str, units: Iterable[int] | Tensor) -> tuple[int, ...]:
    values = units.tolist() if isinstance(units, Tensor) else list(units)
    for unit in values:
        if isinstance(unit, bool | float) or not hasattr(unit, "__index__"):
            raise TypeError(f"Expected kept units of {name!r} to be unit numbers (integers), but got {unit!r}.")
    return tuple(index(unit) for unit in values)


def _check_kept(structure: Structure, kept: tuple[int, ...]) -> None:
    where = f"structure {structure.name!r}"
    if len(kept) < structure.floor:
        least = "one" if structure.floor == 1 else str(structure.floor)
        raise ValueError(
            f"Expected {where} to keep at least {least} of its {structure.units} units, but got {len(kept) or 'none'}."
        )
    if not kept:
        return
    if any(b <= a for a, b in pairwise(kept)):
        raise ValueError(f"Expected kept units of {where} to be strictly increasing, but got {_short(kept)}.")
    if kept[0] < 0 or kept[-1] >= structure.units:
        raise ValueError(f"Expected kept units of {where} to lie in [0, {structure.units}), but got {_short(kept)}.")


def _check_stack(structure: Structure, counts: Mapping[str, int]) -> None:
    """At least one layer of every stack stays; the first size of a layer counts its stack."""
    if structure.kind != "layer" or not structure.sizes or counts[structure.name]:
        return
    stack = structure.sizes[0]
    if stack.evaluate({**dict.fromkeys(stack.variables, 1), **counts}) < 1:
        raise ValueError(
            f"Expected at least one layer of a stack to stay, but all of {sorted(stack.variables)} would go. Keep one."
        )


def _check_slice(structure: Structure, piece: Slice, shapes: Mapping[str, tuple[int, ...]]) -> None:
    where = f"axis {piece.axis} of {piece.parameter!r} in structure {structure.name!r}"
    if piece.parameter not in shapes:
        raise ValueError(f"Expected a shape for {piece.parameter!r} of structure {structure.name!r}, but got none.")
    shape = shapes[piece.parameter]
    if not 0 <= piece.axis < len(shape) or shape[piece.axis] != piece.size:
        raise ValueError(f"Expected {where} to have size {piece.size}, but the shape is {shape}.")
    table = piece.indices
    if table.dtype != torch.long or table.dim() != 2 or table.shape[0] != structure.units or not table.shape[1]:
        raise ValueError(
            f"Expected the table of positions of {where} to be int64 of shape ({structure.units}, positions), "
            f"but got {table.dtype} of shape {tuple(table.shape)}."
        )
    if int(table.min()) < 0 or int(table.max()) >= piece.size:
        low, high = int(table.min()), int(table.max())
        raise ValueError(f"Expected positions of {where} to lie in [0, {piece.size}), but got {low} to {high}.")
    if int(torch.bincount(table.reshape(-1), minlength=1).max()) > 1:
        raise ValueError(f"Expected each position of {where} to belong to one unit, but some belong to two.")


def _missing(parameter: str, structure: str, tensors: Mapping[str, Tensor]) -> str:
    message = f"Expected the model to have {parameter!r} (structure {structure!r}), but it has none."
    wrapped = [name for name in tensors if name.endswith("." + parameter)]
    if wrapped:
        prefix = wrapped[0].removesuffix("." + parameter)
        return f"{message} It has {wrapped[0]!r}: the model may be wrapped or compiled; pass its sub-module {prefix!r}."
    return f"{message} This is a plan for another model.{_hint(parameter, tensors)}"


def _hint(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _short(units: tuple[int, ...]) -> str:
    return str(units) if len(units) <= 8 else f"({', '.join(map(str, units[:4]))}, ..., {units[-1]})"
