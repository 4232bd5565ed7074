"""How much of a fit something else than training may take, and when it may take it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]


class Throttle:
    """Lets something happen every so many steps, more rarely if it would take too much of the time of the fit.

    With c the seconds that it took last, S those that were spent on it so far and T those of the fit without them, it
    is allowed when S + c <= max_overhead * T.

    Args:
        every: steps from one time to the next.
        max_overhead: seconds that may be spent for each second of the fit.
        clock: seconds that pass.

    Attributes:
        every: the interval as it is now.
        spent: seconds that were spent, those before the fit begins and after it ends included.
        lengthened: whether the interval has grown.
    """

    def __init__(self, every: int, max_overhead: float, clock: Clock = time.perf_counter) -> None:
        self.every = every
        self.max_overhead = max_overhead
        self.clock = clock
        self.spent = 0.0
        self.lengthened = False
        self._last = 0.0
        self._began: float | None = None
        self._ended: float | None = None
        self._spent_in_fit = 0.0
        self._first_step = 0
        self._next = 0

    def begin(self, step: int) -> None:
        """The fit begins, at this step."""
        self._began, self._ended = self.clock(), None
        self._first_step, self._next = step, step + self.every

    def end(self) -> None:
        """The fit ends."""
        if self._ended is None and self._began is not None:
            self._ended = self.clock()
            self._spent_in_fit = self.spent

    @contextmanager
    def spending(self) -> Iterator[None]:
        """What happens under it counts as spent."""
        before = self.clock()
        try:
            yield
        finally:
            self._last = self.clock() - before
            self.spent += self._last

    @property
    def seconds(self) -> float:
        """Seconds of the fit, what was spent left out."""
        if self._began is None:
            return 0.0
        if self._ended is not None:
            return max(0.0, self._ended - self._began - self._spent_in_fit)
        return max(0.0, self.clock() - self._began - self.spent)

    @property
    def overhead(self) -> float:
        """Seconds that were spent for each second of the fit; 0 before it begins."""
        seconds = self.seconds
        return self.spent / seconds if seconds else 0.0

    def due(self, step: int) -> bool:
        """Whether it may happen at this step; if it may not, the next time is put off and the interval grows."""
        if step < self._next:
            return False
        allowed = self.max_overhead * self.seconds
        if self.spent + self._last <= allowed:
            self._next = step + self.every
            return True
        per_step = self.seconds / max(1, step - self._first_step)
        if not per_step:
            self._next = step + self.every
            return False
        wait = (self.spent + self._last - allowed) / (self.max_overhead * per_step)
        self._next = step + max(1, math.ceil(wait))
        needed = math.ceil(self._last / (self.max_overhead * per_step))
        if needed > self.every:
            self.every, self.lengthened = needed, True
        return False


__all__ = ["Clock", "Throttle"]
