"""How long training steps take before and after each removal of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.timing import Latency


@dataclass(frozen=True)
class Round:
    """One removal of a fit, and the training steps around it.

    Args:
        step: optimizer steps taken before it.
        params: parameters of the compressed module that it has left.
        macs_kept: fraction of the prunable multiply-accumulates that it has left.
        seconds: time that the removal took.
        before: seconds of a training batch with its share of the optimizer step, over the steps between the removal
            before this one (or the beginning) and this one; None if there were too few of them.
        after: the same up to the next removal (or the end); None if there were too few, or they are yet to come.
    """

    step: int
    params: int
    macs_kept: float
    seconds: float
    before: Latency | None = None
    after: Latency | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Round:
        """The inverse of ``dataclasses.asdict``."""
        times = {name: None if data[name] is None else Latency(**data[name]) for name in ("before", "after")}
        return cls(**{**data, **times})


def training_speedup(rounds: Sequence[Round]) -> float | None:
    """How many times faster training steps are after the last removal than before the first; None if not known."""
    first, last = (rounds[0].before, rounds[-1].after) if rounds else (None, None)
    return first.seconds / last.seconds if first is not None and last is not None and last.seconds else None


def rows(rounds: Sequence[Round]) -> list[tuple[str, ...]]:
    """A table of the rounds whose steps were measured, with its head; empty if none was."""
    if all(r.after is None for r in rounds):
        return []
    table: list[tuple[str, ...]] = [
        ("round", "after steps", "MACs left", "s/step before", "s/step after", "ratio", "removal")
    ]
    for number, r in enumerate(rounds, 1):
        both = r.before is not None and r.after is not None and r.after.seconds > 0
        ratio = f"{r.before.seconds / r.after.seconds:.2f}x" if both and r.before and r.after else "-"
        times = (_seconds(r.before), _seconds(r.after), ratio, f"{r.seconds:.2f} s")
        table.append((str(number), str(r.step), f"{r.macs_kept:.1%}", *times))
    return table


def _seconds(time: Latency | None) -> str:
    return "-" if time is None else f"{time.seconds:.5f}"


__all__ = ["Round", "rows", "training_speedup"]
