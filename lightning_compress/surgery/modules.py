"""Modules that go as a whole: a layer that is passed by, dropped from its stack or skipped, an expert that is dropped.

passed by    the layer is there and returns its inputs; nothing in it runs          the reference
dropped      its key is deleted; the others keep theirs, so parameter names stay    way "drop"
skipped      a module without parameters that returns its inputs takes its place    way "skip"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_compress.structures import ModuleEdit, Passage
from lightning_compress.surgery.errors import SurgeryError

_PLAIN = (bool, int, float, str, type(None))
_INTERNAL = frozenset(nn.Module().__dict__)
# Containers whose members are reached by going through them, not each by a name of its own.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def pass_by(passage: Passage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module that is passed by returns for these inputs; raises TypeError where they lack one that it needs."""

    def item(key: int | str | None) -> Any:
        if key is None:
            return None
        if isinstance(key, int) and key < len(args):
            return args[key]
        if isinstance(key, str) and key in kwargs:
            return kwargs[key]
        raise TypeError(
            f"Expected a call with the input {key!r}, as when the module was traced, but got {len(args)} positional "
            f"and the keyword inputs {sorted(kwargs)}."
        )

    values = [item(key) for key in passage.items]
    if passage.form == "tensor":
        return values[0]
    if passage.form == "dict":
        return dict(zip(passage.keys, values, strict=True))
    return tuple(values) if passage.form == "tuple" else values


class PassBy:
    """A ``forward`` for a module that is there but passed by; put on and taken off as an attribute of the module."""

    def __init__(self, passage: Passage) -> None:
        self.passage = passage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs, in the form of the module's output."""
        return pass_by(self.passage, args, kwargs)


class Skip(nn.Module):
    """Takes the place of a removed layer: no parameters, returns its inputs in the form of the layer's output.

    Args:
        passage: which inputs, in which form.
        settings: plain attributes of the layer that the model may ask for.
    """

    def __init__(self, passage: Passage, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.passage = passage
        for name, value in (settings or {}).items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs, in the form of the layer's output."""
        return pass_by(self.passage, args, kwargs)

    def extra_repr(self) -> str:
        """What it returns."""
        return f"{self.passage.form} of {list(self.passage.items)}"


class GappedList(nn.ModuleList):
    """A ``ModuleList`` some of whose members were dropped: the others keep their keys, and are indexed by position."""

    def _key(self, index: Any) -> Any:
        return list(self._modules)[index.__index__()] if hasattr(index, "__index__") else index

    def __getitem__(self, index: Any) -> Any:
        """The member at this position, or a plain list of those in a slice."""
        if isinstance(index, slice):
            return nn.ModuleList(list(self._modules.values())[index])
        return self._modules[self._key(index)]

    def __setitem__(self, index: Any, module: nn.Module) -> None:
        """Exchange the member at this position."""
        setattr(self, self._key(index), module)

    def __delitem__(self, index: Any) -> None:
        """Delete the member at this position, or those in a slice; the others keep their keys."""
        keys = list(self._modules)[index] if isinstance(index, slice) else [self._key(index)]
        for key in keys:
            delattr(self, key)

    def append(self, module: nn.Module) -> GappedList:
        """Add a member behind the last, under the next free number."""
        self.add_module(str(1 + max((int(key) for key in self._modules), default=-1)), module)
        return self

    def extend(self, modules: Iterable[nn.Module]) -> GappedList:
        """Add members behind the last."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index: int, module: nn.Module) -> None:
        """Refused: the members behind would lose their keys."""
        raise NotImplementedError(
            "Expected members of a list with gaps to be appended, but one was inserted, which would give the members "
            "behind it other names. Use append, or make a new ModuleList."
        )


def is_container(module: nn.Module) -> bool:
    """Whether members can be dropped from ``module``."""
    return isinstance(module, CONTAINERS)


def container_of(path: str) -> str:
    """Path of the module that holds the module ``path``."""
    return path.rpartition(".")[0]


def remove_module(modules: Mapping[str, nn.Module], edit: ModuleEdit) -> None:
    """Carry out one edit in place; raises SurgeryError where the module is not there."""
    outer, _, name = edit.module.rpartition(".")
    container = modules.get(outer)
    old = None if container is None else container._modules.get(name)
    if container is None or old is None:
        raise SurgeryError(
            f"Expected the model to have a module {edit.module!r}, as the plan's edits say, but it has none."
        )
    if edit.way == "skip":
        assert edit.passage is not None
        settings = {
            key: value
            for key, value in vars(old).items()
            if key not in _INTERNAL and isinstance(value, _PLAIN) and not key.startswith("__")
        }
        skip = Skip(edit.passage, settings)
        skip.training = old.training
        container._modules[name] = skip
        return
    del container._modules[name]
    if type(container) is nn.ModuleList:
        container.__class__ = GappedList


def renumber(container: nn.Module, numbers: Iterable[str]) -> None:
    """Let attributes of the members that say where in the container they are count again."""
    numbers = tuple(numbers)
    for position, member in enumerate(container._modules.values()):
        for path in numbers:
            inner, _, attribute = path.rpartition(".")
            module: Any = member
            for part in inner.split(".") if inner else ():
                module = None if module is None else module._modules.get(part)
            if module is not None and type(vars(module).get(attribute)) is int:
                setattr(module, attribute, position)


__all__ = [
    "CONTAINERS",
    "GappedList",
    "PassBy",
    "Skip",
    "container_of",
    "is_container",
    "pass_by",
    "remove_module",
    "renumber",
]
