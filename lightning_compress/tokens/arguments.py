"""Tensors in the arguments of a call, by path: ``args.0``, ``kwargs.mask``, ``kwargs.positions.1``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Visit = Callable[[str, Tensor], Tensor]


def tensors_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Paths and tensors, positional arguments first; inside tuples, lists and dicts, too."""
    for number, value in enumerate(args):
        yield from _inside(f"args.{number}", value)
    for name, value in kwargs.items():
        yield from _inside(f"kwargs.{name}", value)


def _inside(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _inside(f"{path}.{number}", item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _inside(f"{path}.{name}", item)


def with_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], visit: Visit
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every tensor replaced by ``visit(path, tensor)``; nothing is changed in place."""
    changed = tuple(_replaced(f"args.{number}", value, visit) for number, value in enumerate(args))
    return changed, {name: _replaced(f"kwargs.{name}", value, visit) for name, value in kwargs.items()}


def _replaced(path: str, value: Any, visit: Visit) -> Any:
    if isinstance(value, Tensor):
        return visit(path, value)
    if isinstance(value, tuple | list) and value:
        items = [_replaced(f"{path}.{number}", item, visit) for number, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict and value:
        return {name: _replaced(f"{path}.{name}", item, visit) for name, item in value.items()}
    return value


def output_state(output: Any) -> Tensor | None:
    """The hidden state in what a layer returned: the tensor itself, or the first entry of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def with_state(output: Any, state: Tensor) -> Any:
    """What a layer returned, with another hidden state."""
    if isinstance(output, Tensor):
        return state
    items = (state, *output[1:])
    return type(output)(*items) if hasattr(output, "_fields") else items


__all__ = ["output_state", "tensors_in", "with_state", "with_tensors"]
