"""Carrying out a removal: tensors are cut, then sizes, attention cores, shims and attributes follow.

Nothing here verifies or restores; callers hold a ``Transaction``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, CoreEdit, ModuleEdit, ShimEdit, Slice, Structure, owner_path
from lightning_compress.surgery.attention import resize, slim_
from lightning_compress.surgery.attribute_paths import write_attribute
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.modules import container_of, remove_module, renumber
from lightning_compress.surgery.shim import Side, place_shim, shims_of
from lightning_compress.surgery.slicing import AxisPositions, cut, is_torch_layer, owners_of, repair, resize_norm


@dataclass(frozen=True)
class Removal:
    """A structure and the units of it that stay; its tier and edits say how."""

    structure: Structure
    kept: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Units that go, increasing."""
        kept = set(self.kept)
        return tuple(u for u in range(self.structure.units) if u not in kept)


def module_edits(removals: Iterable[Removal]) -> list[ModuleEdit]:
    """The modules that go as a whole: removed layers as their edits say, removed experts out of their list."""
    edits: list[ModuleEdit] = []
    for removal in removals:
        if removal.removed and removal.structure.members:
            own = {edit.module: edit for edit in removal.structure.edits if isinstance(edit, ModuleEdit)}
            paths = [removal.structure.members[unit] for unit in removal.removed]
            edits += [own.get(path, ModuleEdit(path, "drop")) for path in paths]
    return edits


def outside(removals: Sequence[Removal]) -> list[Removal]:
    """``removals`` without what lies inside modules that go as a whole: it goes with them."""
    gone = {edit.module for edit in module_edits(removals)}
    if not gone:
        return list(removals)
    result = []
    for removal in removals:
        structure = removal.structure
        if structure.slices:
            structure = structure.without(gone)
            if not structure.slices:
                continue
        result.append(replace(removal, structure=structure))
    return result


def kept_axes(removals: Iterable[Removal]) -> dict[str, AxisPositions]:
    """parameter -> axis -> sorted positions that stay, for every axis that loses at least one."""
    masks: dict[tuple[str, int], Tensor] = {}
    for removal in removals:
        gone = torch.tensor(removal.removed, dtype=torch.long)
        for piece in removal.structure.slices:
            mask = masks.setdefault((piece.parameter, piece.axis), torch.ones(piece.size, dtype=torch.bool))
            mask[piece.indices[gone].reshape(-1)] = False
    kept: dict[str, AxisPositions] = {}
    for (parameter, axis), mask in masks.items():
        if not mask.all():
            kept.setdefault(parameter, {})[axis] = mask.nonzero().reshape(-1)
    return kept


def zeroed_axes(removals: Iterable[Removal]) -> dict[tuple[str, int], Tensor]:
    """(parameter, axis) -> positions that are set to zero to silence the removed units."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for removal in removals:
        gone = torch.tensor(removal.removed, dtype=torch.long)
        for piece in removal.structure.slices:
            if piece.zero and gone.numel():
                found.setdefault((piece.parameter, piece.axis), []).append(piece.indices[gone].reshape(-1))
    return {axis: torch.cat(positions).unique() for axis, positions in found.items()}


def install(
    modules: Mapping[str, nn.Module],
    removals: Sequence[Removal],
    tensors: Mapping[str, Tensor],
    bystanders: Sequence[Structure] = (),
    *,
    gradients: bool = True,
) -> None:
    """Carry out ``removals``, each by the edits of its structure, in place.

    Args:
        modules: modules of the model by path.
        removals: what goes.
        tensors: its parameters and buffers by name.
        bystanders: further structures of the model that stay whole for now; a shim remembers where their units are.
        gradients: whether gradients are cut, too; a trial run has no use for them.
    """
    whole, removals = removals, outside(removals)
    kept = kept_axes(removals)
    cores: dict[str, dict[str, int]] = {}
    for removal in removals:
        for edit in removal.structure.edits:
            if isinstance(edit, CoreEdit):
                cores.setdefault(edit.module, {})[edit.axis] = len(removal.kept)
    for path in cores:
        slim_(_module(modules, path))  # type: ignore[arg-type]  # reads the old sizes: before anything is cut
    gone = once(kept, tensors)
    for name, axes in gone.items():
        cut(tensors[name], axes, gradient=gradients)
    weights = {id(tensors[name]): axes for name, axes in gone.items() if tensors[name].dim() > 2}
    layers: dict[str, AxisPositions] = {}
    for path, owner in owners_of(modules, (tensors[name] for name in kept)):
        layer = layers.setdefault(owner_path(f"{path}."), {})
        for tensor in owner._parameters.values():  # the weight of a convolution, or what it is made of
            layer.update(weights.get(id(tensor), {}))
    for path, layer in layers.items():
        repair(_module(modules, path), layer)
    for removal in removals:
        for norm in removal.structure.norms:
            resize_norm(_module(modules, norm.module), len(removal.kept))
        if removal.structure.kind == "vocab" and removal.removed:
            _renumber_padding(modules, removal)
    for path, counts in cores.items():
        resize(
            _module(modules, path),  # type: ignore[arg-type]
            counts.get("heads"),
            counts.get("qk_head_dim"),
            counts.get("vo_head_dim"),
        )
    _place_shims(modules, removals, tensors, kept, bystanders)
    _set_attributes(modules, removals, bystanders)
    _remove_modules(modules, whole)


def _renumber_padding(modules: Mapping[str, nn.Module], removal: Removal) -> None:
    """Give the padding id of the embeddings of a vocabulary its new number."""
    for piece in removal.structure.slices:
        module = modules.get(piece.parameter.rpartition(".")[0])
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            if module.padding_idx not in removal.kept:
                raise SurgeryError(
                    f"Expected the padding id {module.padding_idx} of {piece.parameter!r} to be kept, but it is not "
                    f"among the {len(removal.kept)} ids of {removal.structure.name!r} that stay. Keep it."
                )
            module.padding_idx = removal.kept.index(module.padding_idx)


def once(kept: Mapping[str, AxisPositions], tensors: Mapping[str, Tensor]) -> dict[str, AxisPositions]:
    """Each tensor under one name only; raises SurgeryError where the names of a shared tensor disagree."""
    first: dict[int, str] = {}
    result: dict[str, AxisPositions] = {}
    for name, axes in kept.items():
        other = first.setdefault(id(tensors[name]), name)
        if other == name:
            result[name] = axes
        elif result[other].keys() != axes.keys() or any(not torch.equal(p, result[other][a]) for a, p in axes.items()):
            raise SurgeryError(
                f"Expected the names of a shared parameter to agree on what goes, but {other!r} and {name!r} are one "
                f"tensor and the plan cuts axes {sorted(result[other])} of the first and {sorted(axes)} of the second, "
                "or other positions. Discover the structures of this very model, where the sharing is seen."
            )
    return result


def counts_between(removals: Iterable[Removal], bystanders: Iterable[Structure] = ()) -> dict[str, float]:
    """Kept counts as the work between sliced weights sees them: a structure with a shim keeps its width there."""
    counts = {s.name: float(s.units) for s in bystanders}
    for removal in removals:
        structure = removal.structure
        counts[structure.name] = float(structure.units if structure.tier == "shim" else len(removal.kept))
    return counts


def _remove_modules(modules: Mapping[str, nn.Module], removals: Sequence[Removal]) -> None:
    edits = module_edits(removals)
    numbers: dict[str, dict[str, None]] = {}
    for edit in edits:
        remove_module(modules, edit)
        if edit.way == "drop":
            numbers.setdefault(container_of(edit.module), {}).update(dict.fromkeys(edit.numbers))
    for container, paths in numbers.items():
        renumber(modules[container], paths)


def _module(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    if path not in modules:
        raise SurgeryError(f"Expected the model to have a module {path!r}, as the plan's edits say, but it has none.")
    return modules[path]


# Shims


def _place_shims(
    modules: Mapping[str, nn.Module],
    removals: Sequence[Removal],
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, AxisPositions],
    bystanders: Sequence[Structure],
) -> None:
    edits: dict[tuple[str, Side], ShimEdit] = {}
    faces: dict[tuple[str, Side], Slice] = {}
    for removal in removals:
        for edit in removal.structure.edits:
            if isinstance(edit, ShimEdit) and removal.removed:
                place = (edit.module, edit.side)
                edits[place] = edit
                faces.setdefault(place, _facing(_module(modules, edit.module), edit, removal.structure, tensors))
    # a shim of an earlier removal faces an axis that may be cut now by a structure that goes natively
    for path, module in modules.items():
        for side, shim in shims_of(module):
            own = f"{path}.{shim.parameter}" if path else shim.parameter
            name = _first_name(module, shim.parameter, own, kept, tensors)
            if (path, side) not in edits and shim.axis in kept.get(name, {}):
                edits[path, side] = ShimEdit(path, side, shim.dim)
                faces[path, side] = next(
                    piece
                    for removal in removals
                    for piece in removal.structure.slices
                    if (piece.parameter, piece.axis) == (name, shim.axis)
                )
    for place, edit in edits.items():
        face = faces[place]
        native: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for structure, units in [
            *((r.structure, r.kept) for r in removals),
            *((s, tuple(range(s.units))) for s in bystanders),
        ]:
            if structure.tier == "shim":
                continue
            for piece in structure.slices:
                if (piece.parameter, piece.axis) == (face.parameter, face.axis):
                    native[structure.name] = (piece.unit_of_position(), units)
        place_shim(
            _module(modules, edit.module),
            edit,
            parameter=_name_in(_module(modules, edit.module), tensors[face.parameter]) or face.parameter,
            axis=face.axis,
            size=face.size,
            kept=kept.get(face.parameter, {}).get(face.axis, torch.arange(face.size)),
            native=native,
        )


def faced_side(module: nn.Module, piece: Slice) -> tuple[Side, ...]:
    """Sides of ``module`` that carry the axis of one of its own parameters: ("output",), ("input",), both, or none."""
    major: tuple[Side, ...]
    minor: tuple[Side, ...]
    if isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1):
        major, minor = ("output",), ("input",)
        if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
            major, minor = (minor, major) if piece.parameter.rpartition(".")[2] == "weight" else (major, minor)
        return (major, minor)[piece.axis] if piece.axis < 2 else ()
    if isinstance(module, nn.Embedding):
        return ("output",) if piece.axis == 1 else ()
    if is_torch_layer(module) and not isinstance(module, nn.modules.conv._ConvNd):
        return ("input", "output")  # norms: a unit goes in and comes out
    sides: dict[str, tuple[Side, ...]] = {
        "producer": ("output",),
        "consumer": ("input",),
        "companion": ("input", "output"),
    }
    return sides[piece.role]


def shim_dim(module: nn.Module) -> int:
    """Dimension of the module's input and output that carries its channels; negative where unbatched calls exist."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.PReLU):
        return 1
    return -1


def _name_in(module: nn.Module, tensor: Tensor) -> str | None:
    """Name of ``tensor`` in ``module``, which may be one of several that share it."""
    own = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return next((name for name, candidate in own if candidate is tensor), None)


def _first_name(
    module: nn.Module, parameter: str, name: str, kept: Mapping[str, AxisPositions], tensors: Mapping[str, Tensor]
) -> str:
    """The name by which a plan knows the tensor ``parameter`` of ``module``."""
    return next((known for known in kept if _name_in(module, tensors[known]) == parameter), name)


def _facing(module: nn.Module, edit: ShimEdit, structure: Structure, tensors: Mapping[str, Tensor]) -> Slice:
    for piece in structure.slices:
        if _name_in(module, tensors[piece.parameter]) is not None and edit.side in faced_side(module, piece):
            return piece
    raise SurgeryError(
        f"Expected a parameter of {edit.module!r} to face its {edit.side} shim in structure {structure.name!r}, but "
        "none does."
    )


# Attributes


def _set_attributes(
    modules: Mapping[str, nn.Module], removals: Sequence[Removal], bystanders: Sequence[Structure]
) -> None:
    between = counts_between(removals, bystanders)
    real = {**between, **{r.structure.name: float(len(r.kept)) for r in removals}}
    for removal in removals:
        if not removal.removed:
            continue
        for edit in removal.structure.edits:
            if isinstance(edit, AttributeEdit):
                module = _module(modules, edit.module)
                # a layer with a shim has the sizes of its weights, not those of the interface
                counts = real if shims_of(module) else between
                write_attribute(module, edit.attribute, evaluate(edit.size, counts, removal.structure.name))


def evaluate(size: Polynomial, counts: Mapping[str, float], structure: str) -> int:
    """The whole number that ``size`` is at ``counts``."""
    missing = sorted(size.variables - counts.keys())
    if missing:
        raise SurgeryError(
            f"Expected the kept counts of {missing} beside those of {structure!r}, because a size depends on all of "
            "them, but the plan does not hold them. Make the plan from all structures that discovery returned."
        )
    value = size.evaluate(counts)
    if value != int(value) or value < 0:
        raise SurgeryError(f"Expected {size} to be a whole number for {structure!r}, but got {value}.")
    return int(value)
