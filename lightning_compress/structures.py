"""The one noun of this library: a structure, a family of interchangeable units that live or die together.

Slice(parameter, axis, indices)    where the units live in one parameter or buffer: an explicit table Structure(name,
kind, slices)      every place where the units live Structures                         what discovery returns: a list of
them, with the exact cost of the model as a function of
                                   their kept counts, and what was pinned and why
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.polynomials import Polynomial

# Kinds whose units are silent once the weights that read (or make) them are zero, and those that need more than that:
# statistics that leave the unit out, a layer passed by, a router that may not choose, ids that never come.
EXACT_KINDS = ("head", "qk_dim", "vo_dim", "ffn", "channel")
KINDS = (*EXACT_KINDS, "hidden", "layer", "expert", "vocab")

Role = Literal["producer", "consumer", "companion"]
Tier = Literal["native", "shim"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the units of a structure live in one parameter or buffer.

    Args:
        parameter: dotted name in the traced model; for a shared tensor the first of its names.
        axis: axis of the tensor on which the units lie.
        size: length of that axis before any removal.
        indices: int64 tensor of shape (units, positions): ``indices[u]`` are the positions that unit ``u`` owns on the
            axis. An explicit table covers packed projections, grouped queries, rotary pairs and depthwise filters
            alike.
        role: "producer" makes the unit (its weight rows and biases), "consumer" contracts over the unit, "companion"
            travels along (norm scales, running statistics, per-unit buffers).
        zero: whether this slice is set to zero to silence the unit exactly; see ``surgery.zero_units``.
    """

    parameter: str
    axis: int
    size: int
    indices: Tensor
    role: Role
    zero: bool = False

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Slice)
            and (self.parameter, self.axis, self.size, self.role, self.zero)
            == (other.parameter, other.axis, other.size, other.role, other.zero)
            and torch.equal(self.indices, other.indices)
        )

    def __hash__(self) -> int:
        return hash((self.parameter, self.axis, self.size, self.role))

    def positions(self, units: Iterable[int]) -> Tensor:
        """Sorted unique positions on the axis owned by ``units``, shape (count,)."""
        rows = torch.as_tensor(list(units), dtype=torch.long)
        return self.indices[rows].reshape(-1).unique()

    def unit_of_position(self) -> Tensor:
        """For every position of the axis the unit that owns it, or -1; int64 of shape (size,)."""
        owner = torch.full((self.size,), -1, dtype=torch.long)
        units = torch.arange(self.indices.shape[0]).unsqueeze(1).expand_as(self.indices)
        owner[self.indices.reshape(-1)] = units.reshape(-1)
        return owner


@dataclass(frozen=True)
class AttributeEdit:
    """An attribute that counts units: ``setattr(module, attribute, size evaluated at the kept counts)``.

    Args:
        module: dotted path of the module that owns the attribute.
        attribute: its name; "config.NAME" edits a copy of the module's configuration object (or any other plain object
            that it holds) that is private to the module, "NAME[1]" an item of a list or tuple.
        size: the new value as a polynomial in the kept counts.
    """

    module: str
    attribute: str
    size: Polynomial


@dataclass(frozen=True)
class ShimEdit:
    """A module whose sliced output is scattered back to, or whose input is gathered from, the original width.

    Args:
        module: dotted path of the module that owns the sliced weight.
        side: "output" (producer: scatter with zeros) or "input" (consumer: gather the kept positions).
        dim: dimension of the module's output or input tensor that carries the units.
    """

    module: str
    side: Literal["output", "input"]
    dim: int


@dataclass(frozen=True)
class CoreEdit:
    """A ``torch.nn.MultiheadAttention`` whose forward is replaced by one with independent head count and widths.

    Args:
        module: dotted path of the attention module.
        axis: which of its sizes the structure counts: "heads", "qk_head_dim", "vo_head_dim", or "width", that of its
            inputs and outputs.
    """

    module: str
    axis: Literal["heads", "qk_head_dim", "vo_head_dim", "width"]


@dataclass(frozen=True)
class Passage:
    """What a module that is passed by returns: inputs of its, in the form of its output.

    Args:
        form: "tensor" where it returns one input as it is, else the container: "tuple", "list" or "dict".
        items: for every item of the output the position of a positional input, the name of a keyword input, or None
            for None.
        keys: keys of the items of a "dict".
    """

    form: Literal["tensor", "tuple", "list", "dict"]
    items: tuple[int | str | None, ...]
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModuleEdit:
    """A module that goes as a whole.

    Args:
        module: its dotted path.
        way: "drop" deletes it from its container, where the other members keep their keys; "skip" puts a module without
            parameters in its place that returns its inputs.
        passage: what passing it by means; None where the container alone decides whether it is called (an expert).
        numbers: attributes that hold the position of a member in the container, as paths from the member; after a
            "drop" they count again.
    """

    module: str
    way: Literal["drop", "skip"]
    passage: Passage | None = None
    numbers: tuple[str, ...] = ()


Edit = AttributeEdit | ShimEdit | CoreEdit | ModuleEdit


@dataclass(frozen=True)
class Normalisation:
    """A module that takes statistics over the units of a structure: a unit is silent only where they leave it out.

    Args:
        module: its dotted path.
        dim: dimension of its input and output that carries the units, negative.
    """

    module: str
    dim: int


@dataclass(frozen=True)
class Structure:
    """A family of ``units`` interchangeable units, and every slice in which they live.

    Args:
        name: unique display name: the path of the innermost module that holds all slices, a dot and the kind.
        kind: one of ``KINDS``.
        units: number of units n.
        slices: every place where the units live.
        sizes: every size in the model's shapes that depends on the kept count, as polynomials in structure names: the
            count itself, heads * head_dim, 3 * heads * head_dim, ... Surgery looks for integer attributes that equal
            one of them.
        tier: how removal was proven to work: "native" (weights sliced, attributes repaired) or "shim" (a gather or
            scatter keeps the original width between the sliced weights); None before it is proven.
        edits: what removal changes besides tensors, found by the proof and replayed by surgery.
        floor: fewest units that can stay; 0 only where a unit is a whole layer.
        norms: modules that take statistics over the units.
        members: where a unit is a module rather than a set of positions (a layer, an expert): its path, per unit.
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...]
    sizes: tuple[Polynomial, ...] = ()
    tier: Tier | None = None
    edits: tuple[Edit, ...] = ()
    floor: int = 1
    norms: tuple[Normalisation, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters and buffers touched, each once, in order."""
        return tuple(dict.fromkeys(s.parameter for s in self.slices))

    def tensors_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of ``names`` that the structure touches or that lie inside one of its modules."""
        own = set(self.parameters)
        return tuple(n for n in names if n in own or any(is_inside(n, member) for member in self.members))

    def without(self, gone: Collection[str]) -> Structure:
        """The structure with nothing of it inside the modules ``gone``."""
        if not gone:
            return self

        def stays(path: str) -> bool:
            return not any(is_inside(path, module) for module in gone)

        return replace(
            self,
            slices=tuple(piece for piece in self.slices if stays(piece.parameter)),
            edits=tuple(edit for edit in self.edits if stays(edit.module)),
            norms=tuple(norm for norm in self.norms if stays(norm.module)),
        )


@dataclass(frozen=True)
class Pinned:
    """A family of units that stays whole, and why.

    Args:
        name: display name like that of a structure.
        kind: kind it would have had, or "unknown".
        units: number of units.
        parameters: names of the parameters that share the axis.
        reasons: sentences; each names the operation and the module where the units stopped being interchangeable.
        positions: (parameter, axis) -> positions of that axis that its units own; empty where that is not known.
    """

    name: str
    kind: str
    units: int
    parameters: tuple[str, ...]
    reasons: tuple[str, ...]
    positions: Mapping[tuple[str, int], Tensor] = field(default_factory=dict, compare=False, repr=False)


class Structures(list[Structure]):
    """The structures of one model: a list, with costs and pinned families beside it.

    Attributes:
        weight_macs: multiply-accumulates of the traced call in operations with a weight (linear, convolution), as a
            polynomial in the kept counts; variables are structure names.
        activation_macs: the same for products of two activations (attention scores and mixing).
        params: number of elements of the parameters, as such a polynomial.
        pinned: families that stay whole, with reasons.
        shapes: shape of every parameter of the traced model, a shared one once; empty where that is not known.
    """

    def __init__(
        self,
        structures: Iterable[Structure] = (),
        *,
        weight_macs: Polynomial | None = None,
        activation_macs: Polynomial | None = None,
        params: Polynomial | None = None,
        pinned: Iterable[Pinned] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(structures)
        self.weight_macs = weight_macs if weight_macs is not None else Polynomial()
        self.activation_macs = activation_macs if activation_macs is not None else Polynomial()
        self.params = params if params is not None else Polynomial()
        self.pinned: tuple[Pinned, ...] = tuple(pinned)
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes or {})
        names = [s.name for s in self]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"Expected structure names to be unique, but got {twice} more than once.")

    @property
    def counts(self) -> dict[str, int]:
        """Units of each structure: the point at which the cost polynomials give the cost of the unpruned model."""
        return {s.name: s.units for s in self}

    @property
    def macs(self) -> Polynomial:
        """Multiply-accumulates of the traced call.

        A structure of tier "shim" is sliced in the weights only: between them the original width stays, so its kept
        count is frozen in the products of activations.
        """
        shims = {s.name: float(s.units) for s in self if s.tier == "shim"}
        return self.weight_macs + self.activation_macs.substitute(shims)

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        """By position, or by name."""
        if isinstance(key, str):
            for structure in self:
                if structure.name == key:
                    return structure
            raise KeyError(f"Expected the name of a structure, one of {[s.name for s in self]}, but got {key!r}.")
        return super().__getitem__(key)

    def rebuilt(self, structures: Iterable[Structure], pinned: Iterable[Pinned] | None = None) -> Structures:
        """The same costs over other (fewer, or proven) structures.

        Variables of structures left out become constants, in sizes and edits too.
        """
        kept = list(structures)
        names = {k.name for k in kept}
        gone = {s.name: float(s.units) for s in self if s.name not in names}
        if gone:
            kept = [with_constants(structure, gone) for structure in kept]
        return Structures(
            kept,
            weight_macs=self.weight_macs.substitute(gone),
            activation_macs=self.activation_macs.substitute(gone),
            params=self.params.substitute(gone),
            pinned=self.pinned if pinned is None else pinned,
            shapes=self.shapes,
        )

    def of_kind(self, *kinds: str) -> Structures:
        """Only the structures of these kinds; raises ValueError for an unknown kind."""
        check_kinds(kinds)
        return self.rebuilt(s for s in self if s.kind in kinds)


def with_constants(structure: Structure, counts: dict[str, float]) -> Structure:
    """``structure`` with the kept counts of other structures fixed."""
    edits = tuple(
        replace(edit, size=edit.size.substitute(counts)) if isinstance(edit, AttributeEdit) else edit
        for edit in structure.edits
    )
    sizes = dict.fromkeys(size.substitute(counts) for size in structure.sizes)
    return replace(structure, sizes=tuple(sizes), edits=edits)


def is_inside(path: str, outer: str) -> bool:
    """Whether the module or tensor ``path`` is ``outer`` or inside it."""
    return not outer or path == outer or path.startswith(outer + ".")


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return ``kinds`` as a tuple, or raise ValueError naming the unknown one and what was probably meant."""
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            close = get_close_matches(kind, KINDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Expected kinds to be among {KINDS}, but got {kind!r}.{hint}")
    if not kinds:
        raise ValueError(f"Expected at least one kind among {KINDS}, but got none.")
    return kinds


def owner_path(parameter: str) -> str:
    """Path of the module that a tensor belongs to; for a parametrized weight the layer, not its parametrization.

    >>> owner_path("body.up.weight"), owner_path("body.up.parametrizations.weight.original0")
    ('body.up', 'body.up')
    """
    layer, _, inner = f".{parameter}".partition(".parametrizations.")
    return layer[1:] if inner else parameter.rpartition(".")[0]


def stacks_of(structures: Iterable[Structure]) -> list[list[Structure]]:
    """Layers in groups of which at least one must stay: all that is left of a stack."""
    groups: dict[Polynomial, list[Structure]] = {}
    for structure in structures:
        if structure.kind == "layer" and structure.sizes:
            groups.setdefault(structure.sizes[0], []).append(structure)
    return [group for size, group in groups.items() if size.evaluate(dict.fromkeys(size.variables, 0)) < 1]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of ``model`` by dotted name; a shared tensor under each of its names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors
