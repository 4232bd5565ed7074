"""The search meets its target from below, on smooth functions and on steps."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_compress.tokens.calibration import bisect_shift


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("target", [0.35, 0.5, 0.7])
def test_smooth_functions_are_met_within_the_tolerance(rising, target):
    def measure(number: float) -> float:
        value = 1 / (1 + math.exp(number if not rising else -number))
        return 0.2 + 0.8 * value

    number, achieved = bisect_shift(measure, target, -10, 10)
    assert achieved == measure(number)
    assert target - 0.005 <= achieved <= target


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.floats(0, 1),
    st.booleans(),
)
def test_steps_are_met_from_below(places, heights, target, rising):
    steps = list(zip(places, heights, strict=False))
    total = sum(height for _, height in steps) + 0.1

    def measure(number: float) -> float:
        number = number if rising else 1 - number
        return (0.1 + sum(height for place, height in steps if place <= number)) / total

    calls: list[float] = []

    def counted(number: float) -> float:
        calls.append(number)
        return measure(number)

    assume(min(measure(0.0), measure(1.0)) <= target)
    number, achieved = bisect_shift(counted, target, 0.0, 1.0, tolerance=0.01)
    assert achieved == measure(number) <= target + 1e-9
    assert len(calls) == len(set(calls)) <= 32
    # nothing between it and the target can be had a little further on
    further = number + 1e-6 if rising else number - 1e-6
    assert target - achieved <= 0.01 or not 0 <= further <= 1 or measure(further) > target


def test_an_interval_below_the_target_gives_its_dearest_end():
    assert bisect_shift(lambda x: 0.1 + x / 10, 0.9, 0.0, 1.0) == (1.0, 0.2)
    assert bisect_shift(lambda x: 0.2 - x / 10, 0.9, 0.0, 1.0) == (0.0, 0.2)


def test_a_constant_that_meets_the_target_is_accepted():
    assert bisect_shift(lambda x: 0.5, 0.5, 0.0, 1.0)[1] == 0.5


def test_small_deviations_from_monotony_do_no_harm():
    def measure(number: float) -> float:
        return 1 - number + 0.02 * math.sin(40 * number)

    number, achieved = bisect_shift(measure, 0.5, 0.0, 1.0)
    assert 0.495 <= achieved == measure(number) <= 0.5


def test_no_more_is_measured_than_needed():
    calls: list[float] = []

    def measure(number: float) -> float:
        calls.append(number)
        return 1 - number

    bisect_shift(measure, 0.5, 0.0, 1.0)
    assert calls == [0.0, 1.0, 0.5]
    calls.clear()
    bisect_shift(measure, 0.3, 0.0, 1.0, tolerance=0.0, steps=5)
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": 0.05},
            r"between 0 and 1 the smallest possible value is 0.1000, and the target 0.0500: .*protected",
        ),
        ({"measure": lambda x: math.nan}, "Expected a finite measured value, but got nan with 0"),
        ({"low": 1.0}, "low < high, both finite, but got low=1.0, high=1.0"),
        ({"high": math.inf}, "but got low=0.0, high=inf"),
        ({"tolerance": -0.1}, "a tolerance of at least 0 .* tolerance=-0.1"),
        ({"steps": 0}, "at least one step, .* steps=0"),
        ({"target": math.nan}, "Expected a finite target, .* target=nan"),
    ],
)
def test_bad_input(changes, message):
    given_ = {"measure": lambda x: 1 - 0.9 * x, "target": 0.5, "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match=message):
        bisect_shift(**{**given_, **changes})
