"""Progress bars of what callbacks do between the steps of a loop: like those of the Trainer, where it shows any."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_compress.progress import Progress, quiet

EVERY = 0.1  # seconds between two drawings of a bar of rich


def bars(trainer: pl.Trainer, wanted: bool = True) -> Progress:
    """What wraps iterables for a bar: in process 0, if the Trainer has a progress bar that is switched on.

    Args:
        trainer: the Trainer; with ``enable_progress_bar=False`` nothing is shown.
        wanted: whether bars are wanted at all.
    """
    shown = trainer.progress_bar_callback
    if not wanted or not trainer.is_global_zero or not getattr(shown, "is_enabled", False):
        return quiet

    def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
        display = getattr(shown, "progress", None)
        if isinstance(shown, RichProgressBar) and display is not None and display.live.is_started:
            return _in_display(display, items, what)
        return Tqdm(items, desc=what, leave=False)

    return bar


def _in_display(display: Any, items: Iterable[Any], what: str) -> Iterator[Any]:
    """A line in the display of rich that stands on the screen already.

    A bar of tqdm would be taken for printed lines there: one for every time that it is drawn.
    """
    total = len(items) if isinstance(items, Sized) else math.inf
    task = display.add_task(what, total=total)
    display.refresh()
    try:
        drawn = time.monotonic()
        for item in items:
            yield item
            display.update(task, advance=1)
            # here and not in the thread of the display, which would run beside what is measured
            if time.monotonic() - drawn >= EVERY:
                display.refresh()
                drawn = time.monotonic()
    finally:
        # hidden, not removed: the callback finds its own tasks by their places among all
        display.update(task, visible=False)
        display.refresh()


__all__ = ["bars"]
