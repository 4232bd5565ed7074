"""Candidates for attribute repair: integers in modules that may count units.

Python code in a forward reads sizes from attributes (``self.num_heads``, ``self.split_size``). Which ones depend on a
structure cannot be known from their names; but their values must equal one of the sizes that discovery saw, and they
live near the weights. So candidates are collected by value, and a search tries sets of them against the verified
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any

from torch import nn

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, CoreEdit, Structure, is_inside, owner_path
from lightning_compress.surgery.attribute_paths import integers
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.slicing import is_torch_layer

# An attribute is looked for in the modules that own a sliced weight and in this many modules around each.
ANCESTORS = 3
_CORE_AXES = {"head": "heads", "qk_dim": "qk_head_dim", "vo_dim": "vo_head_dim", "hidden": "width"}


@dataclass(frozen=True)
class Candidate:
    """One attribute of every module of one class in one place, and a size that it may count.

    Args:
        key: class, place, attribute and number of the size: equal for corresponding candidates of look-alike
            structures.
        modules: paths of the modules.
        attribute: path of the attribute, see ``attribute_paths``.
        size: the size as a polynomial in kept counts.
    """

    key: tuple[Any, ...]
    modules: tuple[str, ...]
    attribute: str
    size: Polynomial

    def edits(self) -> tuple[AttributeEdit, ...]:
        """The edits that it stands for."""
        return tuple(AttributeEdit(module, self.attribute, self.size) for module in self.modules)


def anchor(structure: Structure) -> str:
    """Path of the innermost module that holds every slice of ``structure`` and all of its modules."""
    owners = [*(owner_path(p) for p in structure.parameters), *(norm.module for norm in structure.norms)]
    owners += [owner_path(member) for member in structure.members]
    paths = [path.split(".") if path else [] for path in owners]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def around(path: str) -> Iterator[str]:
    """``path`` and the paths of the ``ANCESTORS`` modules around it, from inside out."""
    for _ in range(ANCESTORS + 1):
        yield path
        if not path:
            return
        path = path.rpartition(".")[0]


def core_edits(structure: Structure, modules: Mapping[str, nn.Module]) -> tuple[CoreEdit, ...]:
    """The attentions of torch whose heads or dims ``structure`` counts: any removal exchanges their forward."""
    axis = _CORE_AXES.get(structure.kind)
    if axis == "width":
        return tuple(CoreEdit(path, "width") for path in _attentions(structure, modules, inside=1))
    found = _attentions(structure, modules, inside=0)
    if not found and axis is None:  # a width that no norm runs over
        return tuple(CoreEdit(path, "width") for path in _attentions(structure, modules, inside=1))
    edits = ((path, axis or _core_axis(structure, path, modules[path])) for path in found)
    return tuple(CoreEdit(path, which) for path, which in edits if which is not None)  # type: ignore[arg-type]


def _attentions(structure: Structure, modules: Mapping[str, nn.Module], *, inside: int) -> list[str]:
    """Attentions of torch on whose in-projections the units lie on axis ``inside``, on the output's on the other."""
    found: dict[str, None] = {}
    for piece in structure.slices:
        owner = owner_path(piece.parameter)
        for path, faces in ((owner, piece.axis == inside), (owner.rpartition(".")[0], piece.axis == 1 - inside)):
            added = inside == 0 and piece.parameter.endswith(("bias_k", "bias_v"))
            if isinstance(modules.get(path), nn.MultiheadAttention) and (faces or added):
                found.setdefault(path)
    return list(found)


def _core_axis(structure: Structure, path: str, attention: nn.Module) -> str | None:
    """What the units of ``structure`` are to the attention at ``path``, by where they lie in its projections.

    The kind does not tell where the queries are weights themselves (learned queries that pool a sequence).
    """
    first = attention.num_heads * getattr(attention, "qk_head_dim", attention.head_dim)  # type: ignore[operator]
    scores = mixes = False
    for piece in structure.slices:
        owner, _, name = piece.parameter.rpartition(".")
        if owner == path and name.startswith("in_proj"):
            scores |= bool((piece.indices < 2 * first).any())
            mixes |= bool((piece.indices >= 2 * first).any())
        elif owner == path:
            scores |= name in ("q_proj_weight", "k_proj_weight", "bias_k")
            mixes |= name in ("v_proj_weight", "bias_v")
        elif owner == f"{path}.out_proj":
            mixes |= piece.axis == 1
    axis = "heads" if scores and mixes else "qk_head_dim" if scores else "vo_head_dim" if mixes else ""
    counts = {"heads": attention.num_heads, "qk_head_dim": attention.head_dim, "vo_head_dim": attention.head_dim}
    counted = getattr(attention, axis, counts.get(axis))  # a slim one says it itself
    return axis if axis and structure.units == counted else None


def candidates(
    removal: Removal, modules: Mapping[str, nn.Module], counts: Mapping[str, float], *, holders: bool = False
) -> list[Candidate]:
    """Attributes whose value is a size that ``removal`` changes, those inside the structure's anchor first.

    Args:
        removal: the structure and what stays of it.
        modules: the model's modules by path.
        counts: units of every structure of the model.
        holders: look into configuration objects of the modules (``config.NAME``) instead of at the modules themselves.
    """
    structure = removal.structure
    after = {**counts, structure.name: float(len(removal.kept))}
    sizes: dict[tuple[int, int], tuple[int, Polynomial]] = {}
    for number, size in enumerate(structure.sizes):
        if size.variables <= counts.keys():
            change = (int(size.evaluate(counts)), int(size.evaluate(after)))
            if change[0] != change[1]:
                sizes.setdefault(change, (number, size))

    # which pieces a module holds, and how deep: one layer makes the units and the next, of the same class, reads them
    places: dict[str, set[tuple[str, int, int]]] = {}
    for piece in structure.slices:
        for depth, path in enumerate(around(owner_path(piece.parameter))):
            places.setdefault(path, set()).add((piece.role, piece.axis, depth))
    centre = anchor(structure)
    for (
        path,
        module,
    ) in modules.items():  # helpers without weights of their own (an attention core, a reshape) beside the weights
        if is_inside(path, centre) and not any(True for _ in module.parameters()):
            places.setdefault(path, set())

    found: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted(places, key=lambda p: (not is_inside(p, centre), -p.count("."))):
        owner = modules.get(path)
        if owner is None or (is_torch_layer(owner) and not _is_container(owner)):
            continue
        for attribute, value in integers(owner, holders=holders):
            for (before, _), (number, _) in sizes.items():
                if value == before:
                    kind = f"{type(owner).__module__}.{type(owner).__qualname__}"
                    key = (kind, tuple(sorted(places[path])), is_inside(path, centre), attribute, number)
                    found.setdefault(key, []).append(path)
    return [Candidate(key, tuple(paths), key[3], structure.sizes[key[4]]) for key, paths in found.items()]


def selections(found: Sequence[Candidate], limit: int) -> Iterator[tuple[Candidate, ...]]:
    """At most ``limit`` sets of candidates: none, all, all but one, one, all but two, two, ...

    One attribute never gets two sizes; "all" takes the first size of each.
    """
    first: dict[tuple[Any, ...], Candidate] = {}
    for candidate in found:
        first.setdefault((*candidate.key[:-1], candidate.modules), candidate)
    whole = tuple(first.values())
    ordered: Iterator[tuple[Candidate, ...]] = chain(
        [(), whole],
        *(
            chain(
                (tuple(c for c in whole if c not in left_out) for left_out in combinations(whole, count)),
                combinations(found, count),
            )
            for count in range(1, len(found) + 1)
        ),
    )
    seen: set[frozenset[Candidate]] = set()

    def fresh() -> Iterator[tuple[Candidate, ...]]:
        for selection in ordered:
            chosen = frozenset(selection)
            written = [(module, c.attribute) for c in selection for module in c.modules]
            if chosen not in seen and len(set(written)) == len(written):
                seen.add(chosen)
                yield selection

    return islice(fresh(), limit)


def _is_container(module: nn.Module) -> bool:
    """Whether a module of torch holds others whose sizes it repeats (``nn.Transformer.d_model``)."""
    return any(name != "parametrizations" for name, _ in module.named_children()) and not isinstance(
        module, nn.MultiheadAttention
    )


__all__ = [
    "Candidate",
    "anchor",
    "around",
    "candidates",
    "core_edits",
    "is_inside",
    "selections",
]
