"""When drawing is allowed, by a clock that the test moves."""

import pytest

from lightning_compress.callbacks.overhead import Throttle


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(cost: float, per_step: float, steps: int, every: int = 10, share: float = 0.02) -> tuple[Throttle, list[int]]:
    """The steps at which something that costs so much is drawn, in a fit with such steps."""
    clock = Clock()
    throttle = Throttle(every, share, clock)
    throttle.begin(0)
    at = []
    for step in range(1, steps + 1):
        clock.now += per_step
        if throttle.due(step):
            with throttle.spending():
                clock.now += cost
            at.append(step)
    throttle.end()
    return throttle, at


def test_what_is_cheap_happens_at_every_interval() -> None:
    throttle, at = drawn(cost=0.01, per_step=1.0, steps=100)
    assert at == list(range(10, 101, 10))
    assert (throttle.every, throttle.lengthened) == (10, False)
    assert throttle.overhead == pytest.approx(0.1 / 100)


def test_what_is_dear_happens_as_often_as_its_share_allows() -> None:
    """One second in fifty: nothing is known of the cost before the first time, which is paid back then."""
    throttle, at = drawn(cost=1.0, per_step=1.0, steps=500)
    assert at == [10, *range(100, 501, 50)]
    assert (throttle.every, throttle.lengthened) == (50, True)
    assert throttle.seconds == 500
    assert throttle.overhead == pytest.approx(0.02)


def test_what_is_spent_otherwise_is_paid_back_first() -> None:
    clock = Clock()
    throttle = Throttle(1, 0.1, clock)
    throttle.begin(100)
    with throttle.spending():
        clock.now += 5.0  # the picture at the begin
    due = []
    for step in range(101, 301):
        clock.now += 1.0
        if throttle.due(step):
            due.append(step)
            break
    assert due == [200]  # 5 s, and as much again, in 100
    assert throttle.overhead == pytest.approx(5 / 100)


def test_after_the_end_no_time_of_training_passes() -> None:
    clock = Clock()
    throttle = Throttle(1, 0.1, clock)
    assert (throttle.seconds, throttle.overhead) == (0, 0)
    throttle.begin(0)
    clock.now += 10
    throttle.end()
    with throttle.spending():
        clock.now += 2
    throttle.end()
    assert (throttle.seconds, throttle.overhead) == (10, 0.2)


def test_a_clock_that_stands_still_puts_it_off() -> None:
    clock = Clock()
    throttle = Throttle(2, 0.1, clock)
    throttle.begin(0)
    with throttle.spending():
        clock.now += 1
    assert [step for step in range(1, 9) if throttle.due(step)] == []
    assert throttle.every == 2
