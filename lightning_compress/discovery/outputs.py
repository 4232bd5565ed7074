"""The tensors inside the nested outputs of a call, and which of them the caller gets to see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Output:
    """One tensor among the outputs of a call.

    Args:
        tensor: the tensor.
        internal: whether it lies inside an object that is no plain container beside others that do not (a key/value
            cache, say): the model reads it back, and its size and content may follow a removal.
    """

    tensor: Tensor
    internal: bool


def flatten(value: Any) -> dict[str, Output]:
    """The tensors inside nested outputs by path: mappings, sequences, dataclasses, attributes of other objects."""
    found = dict(_walk(value, "output"))
    if all(output.internal for output in found.values()):  # an object of the user's own holds the result
        return {path: replace(output, internal=False) for path, output in found.items()}
    return found


def _walk(value: Any, path: str) -> Iterator[tuple[str, Output]]:
    seen: set[int] = set()
    queue: list[tuple[str, Any, bool]] = [(path, value, False)]  # no recursion: an output may be deep, or a cycle
    while queue:
        path, value, internal = queue.pop()
        if isinstance(value, Tensor):
            yield path, Output(value, internal)
            continue
        plain = isinstance(value, str | bytes | int | float | complex | nn.Module | type)
        if value is None or plain or id(value) in seen:
            continue
        seen.add(id(value))
        children: list[tuple[str, Any]]
        if isinstance(value, Mapping):
            children = [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            children = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif is_dataclass(value):
            children = [(f"{path}.{f.name}", getattr(value, f.name)) for f in fields(value)]
        else:
            children = [(f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]
            internal = True
        queue.extend((child, item, internal) for child, item in reversed(children))


__all__ = ["Output", "flatten"]
