"""Integers that modules hold, where they are and how to exchange one without touching anything shared.

NAME                 an attribute of the module
HOLDER.NAME          of a plain object that it holds: a configuration
NAME[1], NAME['h']   an item of a list, tuple or dict, also of one inside another: NAME[0][1]
NAME(h), NAME(0)     an argument that a functools.partial carries, by name or place
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_compress.plan_format import ATTRIBUTE, STEP

# Containers with more items than this are data, not sizes; so is what lies deeper than DEPTH containers.
ITEMS = 8
DEPTH = 3
_INTERNAL = frozenset(nn.Module().__dict__)


def _parsed(path: str) -> tuple[str, str, list[str]]:
    match = ATTRIBUTE.fullmatch(path)
    if match is None:
        raise AttributeError(path)
    holder, name, steps = match.groups()
    return (holder or "").removesuffix("."), name, re.findall(STEP, steps)


def read_attribute(module: nn.Module, path: str) -> Any:
    """What is at ``path``, see above; raises AttributeError for a path of another form or one that leads nowhere."""
    holder, name, steps = _parsed(path)
    value = getattr(getattr(module, holder) if holder else module, name)
    try:
        for step in steps:
            value = _inside(value, step)
    except (LookupError, TypeError) as error:
        raise AttributeError(path) from error
    return value


def write_attribute(module: nn.Module, path: str, value: int) -> None:
    """Set what ``read_attribute`` reads; a holder or container is replaced by the module's own copy."""
    holder, name, steps = _parsed(path)
    owner: Any = module
    if holder:
        owner = copy.copy(getattr(module, holder))
        setattr(module, holder, owner)
    try:
        new = _exchanged(getattr(owner, name), steps, value)
    except (LookupError, TypeError) as error:
        raise AttributeError(path) from error
    try:
        setattr(owner, name, new)
    except FrozenInstanceError:  # a frozen configuration; it is our own copy
        object.__setattr__(owner, name, new)


def _key(step: str) -> str | int:
    inner = step[1:-1]
    return int(inner) if inner.isdigit() else inner.strip("'")


def _inside(value: Any, step: str) -> Any:
    key = _key(step)
    if step.startswith("["):
        return value[key]
    if not isinstance(value, partial):
        raise TypeError(step)
    return value.args[key] if isinstance(key, int) else value.keywords[key]


def _exchanged(value: Any, steps: Sequence[str], new: int) -> Any:
    """A copy of ``value`` with ``new`` at the end of ``steps``."""
    if not steps:
        return new
    key, item = _key(steps[0]), _exchanged(_inside(value, steps[0]), steps[1:], new)
    if isinstance(value, partial):
        if isinstance(key, int):
            arguments = (*value.args[:key], item, *value.args[key + 1 :])
            return type(value)(value.func, *arguments, **value.keywords)
        return type(value)(value.func, *value.args, **{**value.keywords, key: item})
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        changed[key] = item
        return changed
    items = list(value)
    items[int(key)] = item
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def integers(module: nn.Module, *, holders: bool) -> Iterator[tuple[str, int]]:
    """Integers that ``module`` holds itself, or those of the plain objects that it holds, with their paths."""
    if not holders:
        yield from _integers_of(module.__dict__, "")
        return
    for name, value in module.__dict__.items():
        plain = not isinstance(value, nn.Module | Tensor | type) and not callable(value) and name not in _INTERNAL
        if plain and hasattr(value, "__dict__") and not name.startswith("_"):
            yield from _integers_of(vars(value), f"{name}.")


def _integers_of(attributes: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    for name, value in list(attributes.items()):
        if name not in _INTERNAL and ATTRIBUTE.fullmatch(prefix + name):
            yield from _integers_in(value, prefix + name, DEPTH)


def _integers_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield path, value
    elif depth and isinstance(value, list | tuple) and len(value) <= ITEMS:
        for number, item in enumerate(value):
            yield from _integers_in(item, f"{path}[{number}]", depth - 1)
    elif depth and isinstance(value, dict) and len(value) <= ITEMS:
        for key, item in value.items():
            if type(key) is int:
                yield from _integers_in(item, f"{path}[{key}]", depth - 1)
            elif type(key) is str and ATTRIBUTE.fullmatch(f"x['{key}']"):
                yield from _integers_in(item, f"{path}['{key}']", depth - 1)
    elif depth and isinstance(value, partial):
        for key, item in (*enumerate(value.args), *value.keywords.items()):
            if ATTRIBUTE.fullmatch(f"x({key})"):
                yield from _integers_in(item, f"{path}({key})", depth - 1)


__all__ = ["integers", "read_attribute", "write_attribute"]
