"""From a trace to structures: every free atom that a weight makes and something reads is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.discovery.axes import Axis, atoms, find, flat
from lightning_compress.discovery.tracer import OUTPUT, LookUp, Trace
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import Normalisation, Pinned, Slice, Structure, Structures, owner_path


@dataclass
class Family:
    """An atom and everything the trace knows about it."""

    atom: Axis
    places: list[tuple[str, int]] = field(default_factory=list)  # (parameter or buffer, axis)
    roles: dict[str, set[str]] = field(default_factory=dict)  # parameter or buffer -> roles
    norms: dict[Normalisation, None] = field(default_factory=dict)  # modules that can leave units out of statistics
    answers: bool = False  # its positions are ids that the model returns

    @property
    def has_producer(self) -> bool:
        """Some weight makes it."""
        return any("producer" in roles for roles in self.roles.values())

    @property
    def has_consumer(self) -> bool:
        """Some weight reads it."""
        return any("consumer" in roles for roles in self.roles.values())

    @property
    def between_activations(self) -> bool:
        """Read by a product of two activations or by a sum, where only silent producers make a unit silent."""
        return bool(self.atom.marks & {"contracted", "summed"})

    @property
    def kind(self) -> str:
        """Kind by what operations did to the atom, never by names."""
        marks = self.atom.marks
        if "looked up" in marks or self.answers:
            return "vocab"
        if "normalised" in marks and "contracted" not in marks:  # queries and keys may be normalised, too
            return "hidden"
        if "batched" in marks:
            return "head"
        if "contracted" in marks:
            return "qk_dim"
        if "free" in marks:
            return "vo_dim"
        if "convolved" in marks:
            return "channel"
        return "ffn"


@dataclass(frozen=True)
class Modules:
    """Structures whose units are modules, found beside the axes, and their part in the costs.

    Args:
        structures: layers and mixtures of experts.
        pinned: those that stay whole.
        variables: id of an atom -> the polynomial that its size is.
        gate: module or tensor path -> how often it is there, as a polynomial; for its work and its parameters.
        share: the same for parameters only.
    """

    structures: tuple[Structure, ...] = ()
    pinned: tuple[Pinned, ...] = ()
    variables: Mapping[int, Polynomial] = field(default_factory=dict)
    gate: Callable[[str], Polynomial] = lambda path: Polynomial.constant(1)
    share: Callable[[str], Polynomial] = lambda path: Polynomial.constant(1)


def assemble(trace: Trace, kinds: Sequence[str], modules: Modules | None = None) -> Structures:
    """Structures of these kinds, the model's costs in their kept counts, and what is pinned."""
    modules = modules or Modules()
    families = _families(trace)
    _settle_statistics(trace, families, maskable="hidden" in kinds)
    _settle_look_ups(trace, families, renumber="vocab" in kinds)
    free: list[Family] = []
    pinned: list[Family] = []
    for family in families.values():
        if family.kind == "vocab" and not family.atom.reasons:
            free.append(family)
            continue
        if not family.has_producer or not (family.has_consumer or family.between_activations or family.atom.reasons):
            continue
        if id(family.atom) not in modules.variables:
            (pinned if family.atom.reasons else free).append(family)
    for family in list(free):
        if any(_occurrences(axis, family.atom) > 1 for axis in _axes_of(trace, family)):
            free.remove(family)
            family.atom.reasons.add("it occurs twice in one dimension")
            pinned.append(family)
    chosen = [family for family in free if family.kind in kinds]
    names = _names(chosen)
    variables = {id(family.atom): Polynomial.variable(name) for family, name in zip(chosen, names, strict=True)}
    variables.update(modules.variables)

    structures = []
    for family, name in zip(chosen, names, strict=True):
        structures.append(
            Structure(
                name,
                family.kind,
                family.atom.size,
                _slices(trace, family),
                _sizes(trace, family, variables),
                norms=tuple(family.norms),
            )
        )
    macs = {True: Polynomial(), False: Polynomial()}
    for contraction in trace.contractions:
        cost = modules.gate(contraction.module) * contraction.factor
        for axis in contraction.axes:
            cost = cost * size_of(axis, variables)
        macs[contraction.weight] += cost
    params = Polynomial()
    for member in trace.members.values():
        if member.is_parameter:
            numel = modules.gate(member.name) * modules.share(member.name)
            for dim in member.dims:
                numel = numel if dim is None else numel * size_of(dim, variables)
            params += numel
    pinned_names = _names(pinned)
    return Structures(
        [*structures, *modules.structures],
        weight_macs=macs[True],
        activation_macs=macs[False],
        params=params,
        pinned=[
            Pinned(
                name,
                f.kind,
                f.atom.size,
                tuple(dict.fromkeys(p for p, _ in f.places)),
                tuple(sorted(f.atom.reasons)),
                _positions(trace, f),
            )
            for f, name in zip(pinned, pinned_names, strict=True)
        ]
        + list(modules.pinned),
        shapes={m.name: tuple(m.tensor.shape) for m in trace.members.values() if m.is_parameter},
    )


def _families(trace: Trace) -> dict[int, Family]:
    families: dict[int, Family] = {}
    for member in trace.members.values():
        for position, axis in enumerate(member.dims):
            for atom in atoms(axis):
                if atom.size > 1:
                    family = families.setdefault(id(atom), Family(atom))
                    if (member.name, position) not in family.places:
                        family.places.append((member.name, position))
    for note in trace.notes:
        for atom in atoms(note.axis):
            if id(atom) in families:
                families[id(atom)].roles.setdefault(note.name, set()).add(note.role)
    return families


def _settle_statistics(trace: Trace, families: Mapping[int, Family], *, maskable: bool) -> None:
    """Statistics over a family: by modules that can leave units out, or the reason why the family stays whole."""
    for statistics in trace.statistics:
        parts = list(atoms(statistics.axis))
        for atom in parts:
            family = families.get(id(atom))
            place = _place(trace, statistics.module, atom) if maskable and len(parts) == 1 else None
            if family is not None and place is not None:
                family.norms.setdefault(place)
            else:
                atom.reasons.add(statistics.reason)


def _settle_look_ups(trace: Trace, families: Mapping[int, Family], *, renumber: bool) -> None:
    """Rows that are looked up by ids which the caller gives, and outputs that count such ids, can be numbered anew."""
    by_row: dict[int, list[LookUp]] = {}
    for look_up in trace.look_ups:
        for atom in atoms(look_up.axis):
            by_row.setdefault(id(atom), []).append(look_up)
    sizes = set()
    for key, look_ups in by_row.items():
        family = families.get(key)
        whole = all(find(look_up.axis).form == "atom" and look_up.ids is not None for look_up in look_ups)
        if renumber and family is not None and whole and family.atom.reasons <= {OUTPUT}:
            family.atom.reasons.clear()
            sizes.add(family.atom.size)
        else:
            for look_up in look_ups:
                for atom in atoms(look_up.axis):
                    atom.reasons.add(look_up.reason)
    for family in families.values():
        if family.atom.size in sizes and family.atom.reasons == {OUTPUT} and family.has_producer:
            family.atom.reasons.clear()
            family.answers = True


def _place(trace: Trace, module: str, atom: Axis) -> Normalisation | None:
    """The one dimension of the module's input and output that is ``atom``, in all calls; None where there is none."""
    prefix = f"{module}." if module else ""
    for member in trace.members.values():
        axes = [find(axis) for axis in member.dims if axis is not None]
        if member.name.startswith(prefix) and (len(axes) > 1 or any(axis is not atom for axis in axes)):
            return None  # it does more than normalise: a narrower input would not fit its other weights
    places = set()
    for face in trace.faces.get(module, ()):
        for dims in (face.taken, face.returned):
            found = [i - len(dims) for i, axis in enumerate(dims) if axis is not None and find(axis) is atom]
            others = [axis for axis in dims if axis is not None and find(axis) is not atom and atom in atoms(axis)]
            places.add(found[0] if len(found) == 1 and not others else None)
    place = places.pop() if len(places) == 1 else None
    return Normalisation(module, place) if place is not None else None


def _axes_of(trace: Trace, family: Family) -> Iterable[Axis]:
    for name, position in family.places:
        axis = trace.members[name].dims[position]
        assert axis is not None
        yield axis


def _occurrences(axis: Axis, atom: Axis) -> int:
    """How often an atom enters one position: twice in the product of an axis with itself."""
    axis = find(axis)
    if axis.form == "atom":
        return int(axis is atom)
    counts = [_occurrences(part, atom) for part in axis.parts]
    return sum(counts) if axis.form == "product" else max(counts)


def _names(families: Sequence[Family]) -> list[str]:
    """Path of the innermost module that holds all members, a dot and the kind; numbered where that repeats."""
    names: list[str] = []
    for family in families:
        paths = [owner_path(name).split(".") if "." in name else [] for name, _ in family.places]
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        base = ".".join([*common, family.kind])
        name, number = base, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def unit_numbers(axis: Axis, atom: Axis) -> Tensor:
    """For every position of ``axis`` the unit of ``atom`` that it belongs to, or -1; int64 of shape (size,)."""
    axis = find(axis)
    if axis is atom:
        return torch.arange(axis.size)
    if axis.form == "atom":
        return torch.full((axis.size,), -1)
    numbers = [unit_numbers(part, atom) for part in axis.parts]
    if axis.form == "concat":
        return torch.cat(numbers)
    result = numbers[0]
    for inner in numbers[1:]:  # at most one factor is not -1 everywhere
        result = torch.maximum(result.unsqueeze(1), inner.unsqueeze(0)).reshape(-1)
    return result


def _slices(trace: Trace, family: Family) -> tuple[Slice, ...]:
    slices = []
    silence_producers = family.between_activations or not family.has_consumer
    if family.kind == "vocab":
        silence_producers = False  # an id that never comes needs no silence
    for name, position in family.places:
        axis = trace.members[name].dims[position]
        assert axis is not None
        numbers = unit_numbers(axis, family.atom)
        owned = (numbers >= 0).nonzero().reshape(-1)
        order = numbers[owned].argsort(stable=True)
        indices = owned[order].reshape(family.atom.size, -1)
        roles = family.roles.get(name, set())
        # A weight that reads its own product (a layer applied twice) does both, on two axes: silence both.
        role = "consumer" if "consumer" in roles else "producer" if "producer" in roles else "companion"
        zero = role == "consumer" or "normed" in roles or ("producer" in roles and silence_producers)
        zero = zero and "direction" not in roles
        slices.append(Slice(name, position, axis.size, indices, role, zero))  # type: ignore[arg-type]
    return tuple(slices)


def _positions(trace: Trace, family: Family) -> dict[tuple[str, int], Tensor]:
    found = {}
    for (name, position), axis in zip(family.places, _axes_of(trace, family), strict=True):
        found[name, position] = (unit_numbers(axis, family.atom) >= 0).nonzero().reshape(-1)
    return found


def size_of(axis: Axis, variables: dict[int, Polynomial]) -> Polynomial:
    """Size of an axis as a polynomial in the kept counts of structures."""
    axis = find(axis)
    if axis.form == "atom":
        return variables.get(id(axis), Polynomial.constant(axis.size))
    result = size_of(axis.parts[0], variables)
    for part in axis.parts[1:]:
        other = size_of(part, variables)
        result = result * other if axis.form == "product" else result + other
    return result


def _sizes(trace: Trace, family: Family, variables: dict[int, Polynomial]) -> tuple[Polynomial, ...]:
    """All sizes around this atom: the axes that contain it, their parts, and runs of neighbouring factors."""
    found: dict[Polynomial, None] = {}

    def visit(axis: Axis) -> None:
        axis = find(axis)
        if not any(atom is family.atom for atom in atoms(axis)):
            return
        if axis.form == "product":
            factors = flat(axis, "product")
            for start in range(len(factors)):
                run = Polynomial.constant(1)
                for factor in factors[start:]:
                    run = run * size_of(factor, variables)
                    found.setdefault(run)
        found.setdefault(size_of(axis, variables))
        for part in axis.parts:
            visit(part)

    for axis in _axes_of(trace, family):
        visit(axis)
    own = variables[id(family.atom)].variables
    return tuple(p for p in found if p.variables & own)
