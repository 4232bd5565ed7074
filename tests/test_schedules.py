"""Schedules against sums and simulations written out step by step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.regularizers import group_lasso_factors
from lightning_compress.schedules import (
    SHAPES,
    constant,
    cosine,
    cubic,
    linear,
    ramp,
    remaining_learning_rate,
    strength_to_reach,
)

every_shape = pytest.mark.parametrize("shape", SHAPES)
fractions = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (linear, [0.0, 0.25, 0.5, 1.0]),
        (cubic, [0.0, 0.578125, 0.875, 1.0]),
        (cosine, [0.0, (1 - math.sqrt(0.5)) / 2, 0.5, 1.0]),
        (constant, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_shapes_by_hand(shape, expected: list[float]) -> None:
    assert [shape(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)
    assert SHAPES[shape.__name__] is shape


@every_shape
@given(first=fractions, second=fractions)
def test_shapes_stay_in_range_and_never_fall(shape, first, second) -> None:
    early, late = sorted((first, second))
    assert 0.0 <= SHAPES[shape](early) <= SHAPES[shape](late) <= 1.0


@every_shape
@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_the_run_is_refused(shape: str, progress: float) -> None:
    expected = r"Expected progress, the part of the run that is done, to be in \[0, 1\]"
    with pytest.raises(ValueError, match=expected):
        SHAPES[shape](progress)
    with pytest.raises(ValueError, match=expected):
        ramp(progress, shape=shape)


def test_ramp_by_hand() -> None:
    values = [ramp(p, start=0.25, end=0.75, begin_value=4.0, end_value=2.0) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == [4.0, 4.0, 3.0, 2.0, 2.0]


def test_ramp_is_the_cubic_schedule_of_gradual_pruning() -> None:
    """The published form: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3."""
    first, last, begin, steps = 0.1, 0.9, 20, 50
    for t in range(100):
        published = last + (first - last) * (1 - min(max(t - begin, 0), steps) / steps) ** 3
        value = ramp(t / 100, 0.2, 0.7, first, last, "cubic")
        assert value == pytest.approx(published)


@every_shape
@given(progress=fractions, start=fractions, width=fractions, values=st.tuples(st.floats(-10, 10), st.floats(-10, 10)))
def test_ramp_stays_between_its_values_and_is_exact_outside(shape, progress, start, width, values) -> None:
    end = min(1.0, start + width)
    value = ramp(progress, start, end, *values, shape)
    assert min(values) - 1e-9 <= value <= max(values) + 1e-9
    if progress < start:
        assert value == values[0]
    if progress >= end:
        assert value == values[1]


def test_a_constant_ramp_and_a_ramp_of_no_width_jump_at_the_start() -> None:
    for options in ({"end": 0.75, "shape": "constant"}, {"end": 0.5}):
        assert [ramp(p, start=0.5, **options) for p in (0.49, 0.5, 0.6)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_a_ramp_whose_ends_are_not_ordered_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=r"Expected 0 <= start <= end <= 1, but got start=.* and end="):
        ramp(0.5, start, end)


def test_an_unknown_shape_is_refused_with_the_names() -> None:
    expected = r"one of 'constant', 'cosine', 'cubic', 'linear', but got 'cubik'. Did you mean 'cubic'\?"
    with pytest.raises(ValueError, match=expected):
        ramp(0.5, shape="cubik")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"but got 'xyz'\.$"):
        ramp(0.0, shape="xyz")  # type: ignore[arg-type]


@given(current=st.floats(0.0, 1.0), steps=st.integers(0, 200), final=st.none() | st.floats(0.0, 1.0))
def test_remaining_learning_rate_equals_a_sum(current, steps, final) -> None:
    target = current if final is None else final
    expected = math.fsum(current + (target - current) * i / steps for i in range(steps))
    assert remaining_learning_rate(current, steps, final) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_remaining_learning_rate_follows_a_linear_scheduler() -> None:
    """Asked at every step, it gives what the scheduler then does."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 30)
    forecasts, rates = [], []
    for step in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        forecasts.append(remaining_learning_rate(rates[-1], 30 - step, final=0.0))
        optimizer.step()
        scheduler.step()
    assert forecasts == pytest.approx([math.fsum(rates[step:]) for step in range(30)])


@pytest.mark.parametrize("arguments", [(-0.1, 5), (math.nan, 5), (0.1, 5, -0.1), (0.1, 5, math.inf)])
def test_a_learning_rate_that_is_none_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"Expected the learning rate (current|final) to be finite and at least 0"):
        remaining_learning_rate(*arguments)


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer steps that are left, to be at least 0, but got -1"):
        remaining_learning_rate(0.1, -1)


@pytest.mark.parametrize("final", [None, 0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_strength_to_reach_hits_the_threshold(steps: int, final: float | None) -> None:
    """Proximal steps without gradients: exactly the groups below the threshold are zero, the others lost just that."""
    threshold, learning_rate = 0.8, 0.2
    norms = torch.tensor([0.0, 0.1, 0.5, 1.19, 1.21, 3.0, 0.79, 0.81, 0.4], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 2.0, 1.5, 1.5, 1.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    strength = strength_to_reach(threshold, remaining_learning_rate(learning_rate, steps, final))
    last = learning_rate if final is None else final
    current = norms.clone()
    for step in range(steps):
        rate = learning_rate + (last - learning_rate) * step / steps
        current = current * group_lasso_factors(current, rate * strength, weights)
    assert (current == 0).tolist() == (norms / weights <= threshold).tolist()
    torch.testing.assert_close(current, (norms - threshold * weights).clamp(min=0))


def test_a_strength_asked_again_under_way_stays_the_same() -> None:
    """Along the path the threshold falls by what was already taken off, and so does the sum that is left."""
    threshold, rates = 0.6, [0.1 * (1 - i / 20) for i in range(20)]
    planned = strength_to_reach(threshold, math.fsum(rates))
    for step in range(19):
        left = threshold - planned * math.fsum(rates[:step])
        assert strength_to_reach(left, math.fsum(rates[step:])) == pytest.approx(planned)


def test_strength_to_reach_refuses() -> None:
    for threshold in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="Expected threshold to be finite and at least 0"):
            strength_to_reach(threshold, 1.0)
    for total in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"Expected learning_rate_sum to be finite and above 0.*start earlier"):
            strength_to_reach(0.5, total)
    assert strength_to_reach(0.0, 1.0) == 0.0
