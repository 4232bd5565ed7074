"""Numbers and tables as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.timing import Latency


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def ratio(before: float, after: float) -> str:
    """How many times less there is after than before."""
    return f"{before / after:.2f}x" if after else "-"


def si(value: float) -> str:
    """A number with three digits or more, and its prefix."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def byte_size(value: int) -> str:
    """A number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} B"


def milliseconds(latency: Latency) -> str:
    """The median of a measurement."""
    return f"{latency.seconds * 1e3:.2f} ms"


__all__ = ["aligned", "byte_size", "milliseconds", "ratio", "si"]
