"""What modules remember of a call, forgotten: attributes, and the contents of containers that they hold."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_DEPTH = 3  # containers inside containers
_INTERNAL = frozenset(nn.Module().__dict__)


@contextmanager
def forgotten(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore attributes of ``modules`` at the end, also what was written into dicts, lists and sets that they hold.

    A table of biases that is kept in a dict for the next call, say, would otherwise outlive the weights it was made of.
    """
    attributes = [(module.__dict__, dict(module.__dict__)) for module in modules]
    contents: dict[int, tuple[Any, Any]] = {}
    for _, saved in attributes:
        for name, value in saved.items():
            if name not in _INTERNAL:
                _remember(value, contents, _DEPTH)
    try:
        yield
    finally:
        for live, saved in attributes:
            if live.keys() != saved.keys() or any(live[name] is not value for name, value in saved.items()):
                live.clear()
                live.update(saved)
        for container, content in contents.values():
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                if isinstance(container, deque):
                    container.extend(content)
                else:
                    container.update(content)


def _remember(value: Any, contents: dict[int, tuple[Any, Any]], depth: int) -> None:
    if not depth or type(value) not in _CONTAINERS or id(value) in contents:
        return
    contents[id(value)] = (value, value.copy())
    for item in value.values() if isinstance(value, dict) else value:
        _remember(item, contents, depth - 1)


__all__ = ["forgotten"]
