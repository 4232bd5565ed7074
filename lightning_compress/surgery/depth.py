"""The search for a way in which a layer goes: dropped from its stack, or skipped where that changes anything else.

drop         the container forgets it; positions and counts that modules hold follow where the outputs need them
skip         a module without parameters that returns its inputs
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_compress.structures import AttributeEdit, Edit, ModuleEdit, Structure
from lightning_compress.surgery.attribute_paths import integers
from lightning_compress.surgery.attributes import Candidate, around, selections
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.modules import container_of, is_container

if TYPE_CHECKING:
    from lightning_compress.surgery.workbench import Workbench

KIND = "layer"
# Sets of attributes that are tried for one drop.
ATTEMPTS = 12
_INTERNAL = frozenset(nn.Module().__dict__)


def find_layer(
    bench: Workbench, removal: Removal, others: Sequence[Removal], hint: Structure | None
) -> Structure | str:
    """How one layer goes beside ``others``, or why it cannot.

    Args:
        bench: the workbench; its reference has the layer passed by.
        removal: the layer.
        others: removals that are carried out at the same time.
        hint: a layer of the same stack whose way is known; its way is tried first.
    """
    reasons: dict[str, str] = {}
    for edits in ways(bench.modules, removal.structure, hint):
        structure = replace(removal.structure, tier="native", edits=edits)
        reason = bench.attempt([*others, replace(removal, structure=structure)])
        if reason is None:
            return structure
        reasons.setdefault(way_of(edits), reason)
    words = {"drop": "dropped from its stack", "skip": "replaced by a module that returns its inputs"}
    return "; ".join(f"{words[way]}: {reason}" for way, reason in reasons.items())


def way_of(edits: Iterable[Edit]) -> str:
    """The way of the module among edits: drop or skip."""
    return next(edit.way for edit in edits if isinstance(edit, ModuleEdit))


def ways(
    modules: Mapping[str, nn.Module], structure: Structure, hint: Structure | None = None
) -> Iterator[tuple[Edit, ...]]:
    """Edits to try for a layer, best first: like ``hint``, dropped, dropped with counts that follow, skipped."""
    edit = next(e for e in structure.edits if isinstance(e, ModuleEdit))
    container = container_of(edit.module)
    drop, skip = replace(edit, way="drop"), replace(edit, way="skip", numbers=())
    droppable = is_container(modules[container]) and not has_settings_per_layer(modules, container)
    if hint is not None and (droppable or way_of(hint.edits) == "skip"):
        counts = tuple(e for e in hint.edits if isinstance(e, AttributeEdit))
        yield (drop if way_of(hint.edits) == "drop" else skip, *counts)
    if droppable:
        for chosen in selections(counters(modules, structure, container), ATTEMPTS):
            yield (drop, *(e for candidate in chosen for e in candidate.edits()))
    yield (skip,)


def counters(modules: Mapping[str, nn.Module], structure: Structure, container: str) -> list[Candidate]:
    """Integers in the modules around a stack, and in objects that they hold, that equal its number of layers."""
    size = structure.sizes[0]
    depth = len([m for m in modules[container].children() if any(True for _ in m.parameters())])
    found = []
    for path in around(container):
        for holders in (False, True):
            for attribute, value in integers(modules[path], holders=holders):
                if value == depth and path != container:
                    found.append(Candidate((path, attribute), (path,), attribute, size))
    return found


def has_settings_per_layer(modules: Mapping[str, nn.Module], container: str) -> bool:
    """Whether a module around a stack holds a list with an entry of its own for each layer, and the entries differ.

    A forward that walks over both would give the layers behind a dropped one the settings of others; on a short example
    that may not show (windows of attention that are wider than it).
    """
    depth = len(list(modules[container].children()))
    for path in around(container):
        for value in _settings_of(modules[path]):
            if len(value) == depth and any(item != value[0] for item in value):
                return True
    return False


def _settings_of(module: nn.Module) -> Iterator[Sequence[Any]]:
    """Lists and tuples of numbers or words in ``module`` and in the plain objects that it holds."""
    plain = [v for n, v in vars(module).items() if n not in _INTERNAL and not isinstance(v, nn.Module | Tensor | type)]
    holders = [vars(v) for v in plain if hasattr(v, "__dict__") and not callable(v)]
    for value in (*plain, *(item for holder in holders for item in holder.values())):
        if type(value) in (list, tuple) and value and all(isinstance(item, bool | int | float | str) for item in value):
            yield value
