"""The form in which an example call is given: (args, kwargs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def example_call(argument: str, value: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``value`` as a tuple of positional and a dict of keyword arguments.

    Args:
        argument: name of the argument, for the message.
        value: what was given for it.

    Raises:
        TypeError: if it is not a pair of a sequence and a mapping.
    """
    if (
        not isinstance(value, tuple | list)
        or len(value) != 2
        or not isinstance(value[0], tuple | list)
        or not isinstance(value[1], Mapping)
    ):
        raise TypeError(
            f"Expected {argument} to be (args, kwargs), a tuple and a dict, but got {type(value).__name__}. For "
            f"model(x) pass {argument}=((x,), {{}})."
        )
    return tuple(value[0]), dict(value[1])


__all__ = ["example_call"]
