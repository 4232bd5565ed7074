"""A progress "bar" that notes what it was given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any


class Recorded:
    """Stands in for ``progress_bars``; wraps items and counts them.

    Attributes:
        bars: (what, length or None, items handed out) of every bar, in order of their beginning.
        open: bars that have begun and have not ended.
    """

    def __init__(self) -> None:
        self.bars: list[tuple[str, int | None, int]] = []
        self.open = 0

    def __call__(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        length = len(items) if isinstance(items, Sized) else None
        number = len(self.bars)
        self.bars.append((what, length, 0))
        self.open += 1
        try:
            for count, item in enumerate(items, 1):
                self.bars[number] = (what, length, count)
                yield item
        finally:
            self.open -= 1

    def of(self, what: str) -> list[tuple[int | None, int]]:
        """Length and number of items of the bars of this name, which must have ended."""
        assert self.open == 0
        return [(length, count) for name, length, count in self.bars if name == what]
