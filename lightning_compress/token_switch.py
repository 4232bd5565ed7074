"""A switch that takes token pruning out of the runs under it, wherever it is installed.

Structures are traced, removals compared and latencies tabulated on models whose every token takes part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_off: ContextVar[bool] = ContextVar("tokens_off", default=False)


@contextmanager
def tokens_off() -> Iterator[None]:
    """Under it no token is pruned."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def tokens_are_off() -> bool:
    """Whether the switch is off."""
    return _off.get()


__all__ = ["tokens_are_off", "tokens_off"]
