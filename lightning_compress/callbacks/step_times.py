"""How long training steps take, measured without making them longer."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from lightning_compress.timing import Latency

WARM_UP = 3  # steps of each phase that are left out: compilation, caches, memory that is asked for anew
KEEP = 512  # batches of a phase that count, the last ones


class StepTimes:
    """Seconds of training batches, averaged over those of one optimizer step; the median over the steps of a phase.

    A batch is measured from where it has been loaded to where its optimizer step, if it has one, and the hooks of the
    callbacks before this one are done. So the loading of data, validation and removals are left out. On a CUDA device,
    which works on while Python is ahead of it, events on its stream mark these moments; they are read when a phase
    ends, the only time that the device is waited for. Elsewhere the clock is ``time.perf_counter``.

    Args:
        device: where the module is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin: Any = None
        self._step: list[tuple[Any, Any]] = []
        self._steps: deque[list[tuple[Any, Any]]] = deque()
        self._count = 0
        self._left_out = 0

    def begin(self) -> None:
        """A batch begins."""
        self._begin = self._now()

    def end(self, stepped: bool) -> None:
        """It ends, with or without an optimizer step."""
        if self._begin is None:
            return
        self._step.append((self._begin, self._now()))
        self._begin = None
        if not stepped:
            return
        batches, self._step = self._step, []
        if self._left_out < WARM_UP:
            self._left_out += 1
            return
        self._steps.append(batches)
        self._count += len(batches)
        while self._count > KEEP and len(self._steps) > 1:
            self._count -= len(self._steps.popleft())

    def discard(self) -> None:
        """The batch that has begun is none to be measured."""
        self._begin = None
        self._step = []

    def take(self) -> Latency | None:
        """What the phase that ends now has shown; None if it had no step beyond those to warm up."""
        if self._steps and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times = [sum(self._seconds(*batch) for batch in step) / len(step) for step in self._steps]
        self._steps.clear()
        self._count = self._left_out = 0
        self.discard()
        return Latency.of(times) if times else None

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self.device.type == "cuda" else end - begin


__all__ = ["StepTimes"]
