"""Progress: whoever has a bar wraps what is gone through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], str], Iterable[Any]]  # (items, what is done with them) -> the items


def quiet(items: Iterable[Any], what: str) -> Iterable[Any]:
    """No bar."""
    return items


__all__ = ["Progress", "quiet"]
