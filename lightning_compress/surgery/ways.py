"""Ways of removal: edits put together, replayed on look-alikes, and made consistent among structures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, Edit, ShimEdit, Slice, Structure, Tier
from lightning_compress.surgery.attributes import Candidate
from lightning_compress.surgery.edits import Removal


@dataclass(frozen=True)
class Found:
    """How a structure goes.

    Args:
        structure: with ``tier`` and ``edits`` filled in.
        keys: keys of the candidates that were needed, to replay them on a look-alike.
    """

    structure: Structure
    keys: tuple[tuple[Any, ...], ...] = ()


def edited(removal: Removal, tier: Tier, base: Sequence[Edit], chosen: Iterable[Candidate]) -> Removal:
    """``removal`` by these edits and the attributes of these candidates."""
    edits = (*base, *(edit for candidate in chosen for edit in candidate.edits()))
    return replace(removal, structure=replace(removal.structure, tier=tier, edits=edits))


def without_companions(structure: Structure) -> Structure:
    """``structure`` with only its producers and consumers: a shim keeps the width of everything between them."""
    return replace(structure, slices=tuple(piece for piece in structure.slices if piece.role != "companion"))


def only_carried(structure: Structure, carried: Callable[[Slice], bool]) -> Structure:
    """``structure`` with only the producers and consumers that ``carried`` holds of; other tensors stay whole.

    A tensor that stays whole reads zeros where units are gone, so its units must be silent before it: where one that
    is to be zeroed stays whole, the remaining producers are zeroed.
    """
    kept = [piece for piece in structure.slices if piece.role != "companion" and carried(piece)]
    lost = any(p.zero and p.role == "consumer" for p in structure.slices if not carried(p))
    return replace(structure, slices=tuple(replace(p, zero=True) if lost and p.role == "producer" else p for p in kept))


def harmonised(ways: Mapping[str, Removal]) -> dict[str, Removal]:
    """One size for an attribute that several structures change.

    Alone, the removal of heads cannot tell heads * qk_dim from heads * vo_dim; that of V/O dims can. Where structures
    name different sizes for one attribute, the size that depends on all of them is meant.
    """
    claims: dict[tuple[str, str], dict[Polynomial, set[str]]] = {}
    for name, way in ways.items():
        for edit in way.structure.edits:
            if isinstance(edit, AttributeEdit):
                claims.setdefault((edit.module, edit.attribute), {}).setdefault(edit.size, set()).add(name)
    common: dict[tuple[str, str], Polynomial] = {}
    for place, sizes in claims.items():
        claimants = frozenset().union(*sizes.values())
        fitting = [size for size in sizes if claimants <= size.variables]
        if len(sizes) > 1 and fitting:
            common[place] = fitting[0]
    return {
        name: _with_edits(
            way,
            (
                replace(edit, size=common[edit.module, edit.attribute])
                if isinstance(edit, AttributeEdit) and (edit.module, edit.attribute) in common
                else edit
                for edit in way.structure.edits
            ),
        )
        for name, way in ways.items()
    }


def frozen_shims(ways: Mapping[str, Removal]) -> dict[str, Removal]:
    """Sizes between sliced weights with the counts of shimmed structures as constants: that width stays."""
    constants = {name: float(w.structure.units) for name, w in ways.items() if w.structure.tier == "shim"}
    shimmed = {e.module for w in ways.values() for e in w.structure.edits if isinstance(e, ShimEdit)}
    return {
        name: _with_edits(
            way,
            (
                replace(edit, size=edit.size.substitute(constants))
                if isinstance(edit, AttributeEdit) and edit.module not in shimmed
                else edit
                for edit in way.structure.edits
            ),
        )
        for name, way in ways.items()
    }


def _with_edits(removal: Removal, edits: Iterable[Edit]) -> Removal:
    return replace(removal, structure=replace(removal.structure, edits=tuple(edits)))
