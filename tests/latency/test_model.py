"""The model of latency: what it makes of measurements that are known to come from a cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.latency.model import Curve, LatencyModel, Saving, build
from lightning_compress.polynomials import Polynomial

numbers = st.floats(-10, 10, allow_nan=False)


@given(st.lists(st.tuples(st.integers(0, 50), numbers), min_size=1, max_size=12))
def test_a_curve_does_not_fall(points: list[tuple[int, float]]) -> None:
    curve = Curve.through(points)
    values = [y for _, y in curve.points]
    assert values == sorted(values)
    assert [x for x, _ in curve.points] == sorted({x for x, _ in points})
    mean = sum(dict(points).values()) / len(dict(points))
    assert sum(values) / len(values) == pytest.approx(mean, abs=1e-9)  # least squares keeps the mean


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = Curve.through([(0, 0.0), (4, 2.0), (8, 2.0), (10, 3.0)])
    assert [curve(x) for x in (0, 2, 4, 6, 8, 9, 12)] == [0, 1, 2, 2, 2, 2.5, 4]
    assert [curve.inverse(y) for y in (-1, 0, 1, 2, 2.5, 4)] == [0, 0, 2, 8, 9, 12]  # the most that costs no more
    assert Curve(((3, 1.0),))(99) == 1.0


def saving(time: Polynomial, units: dict[str, int], name: str, counts: list[int], error: float = 0.0) -> Saving:
    """What the structure alone saves of a latency that is ``time``."""
    return Saving(
        units[name], tuple((n, time.evaluate(units) - time.evaluate({**units, name: n})) for n in counts), error
    )


def test_separate_structures_add_up() -> None:
    units = {"a": 8, "b": 16}
    macs = Polynomial({("a",): 10.0, ("b",): 10.0, (): 100.0})
    time = Polynomial({("a",): 0.05, ("b",): 0.01, (): 0.44})  # b is much faster than its MACs say
    model = build(macs, {n: saving(time, units, n, [6, 4, 1]) for n in units})
    for counts in (units, {"a": 4, "b": 16}, {"a": 2, "b": 3}, {"a": 1, "b": 1}):
        assert model.estimate(counts) == pytest.approx(time.evaluate(counts))


def test_shared_work_is_not_saved_twice() -> None:
    units = {"heads": 4, "dims": 8}
    macs = Polynomial({("dims", "heads"): 3.0})
    time = Polynomial({("dims", "heads"): 0.02, (): 0.36})
    model = build(macs, {n: saving(time, units, n, [2, 1]) for n in units})
    assert model.estimate({"heads": 2, "dims": 4}) == pytest.approx(time.evaluate({"heads": 2, "dims": 4}))


def test_a_square_is_a_square() -> None:
    macs = Polynomial({("c", "c"): 3.0})
    time = Polynomial({("c", "c"): 0.01, (): 0.0})
    model = build(macs, {"c": saving(time, {"c": 10}, "c", [8, 5, 2])})
    for count in (10, 8, 5, 2):
        assert model.estimate({"c": count}) == pytest.approx(time.evaluate({"c": count}), abs=2e-3)


def test_a_staircase_is_followed() -> None:
    macs = Polynomial({("a",): 1.0})
    model = build(macs, {"a": Saving(32, ((24, 0.0), (16, 0.2), (8, 0.2)))})
    assert [round(model.estimate({"a": n}), 6) for n in (32, 28, 24, 16, 12, 8)] == [1, 1, 1, 0.8, 0.8, 0.8]


def test_a_slower_narrow_width_is_not_believed() -> None:
    model = build(Polynomial({("a",): 1.0}), {"a": Saving(32, ((24, -0.1), (16, 0.2)))})
    values = [model.estimate({"a": n}) for n in range(1, 33)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1.0)


def test_noise_is_weighed_against_the_macs() -> None:
    macs = Polynomial({("large",): 99.0, ("small",): 1.0})
    together = [({"large": 50, "small": 50}, 0.6)]  # all of it takes 0.8, so the small one 0.008
    savings = {"large": Saving(100, ((50, 0.396),), 0.02), "small": Saving(100, ((50, -0.05),), 0.02)}
    model = build(macs, savings, together)
    assert 1 - model.added({"large": 100, "small": 50}) == pytest.approx(0.004, abs=0.003)
    assert 1 - model.added({"large": 50, "small": 100}) == pytest.approx(0.396, abs=0.003)


def test_what_was_not_measured_takes_its_part_of_the_macs() -> None:
    macs = Polynomial({("a",): 1.0, ("b",): 1.0})
    model = build(macs, {"a": Saving(10, ((5, 0.2),)), "b": Saving(10)})
    assert model.estimate({"a": 10, "b": 5}) == pytest.approx(0.8)


def test_a_structure_without_macs_counts_where_it_was_measured_clearly() -> None:
    savings = {
        "a": Saving(10, ((5, 0.2),)),
        "free": Saving(10, ((5, 0.1),), 0.01),
        "noise": Saving(10, ((5, 0.01),), 0.01),
    }
    model = build(Polynomial({("a",): 1.0}), savings)
    assert model.estimate({"a": 10, "free": 5, "noise": 10}) == pytest.approx(0.9)
    assert model.estimate({"a": 10, "free": 10, "noise": 1}) == pytest.approx(1.0)


def test_savings_that_sum_to_more_than_everything_are_scaled() -> None:
    macs = Polynomial({("a",): 1.0, ("b",): 1.0})
    model = build(macs, {n: Saving(10, ((5, 0.4),)) for n in "ab"})  # 0.8 each
    assert model.estimate({"a": 10, "b": 10}) == pytest.approx(1.0)
    assert 0 <= model.estimate({"a": 1, "b": 1}) < 0.2


def test_measurements_together_correct_the_sum() -> None:
    macs = Polynomial({("a",): 1.0, ("b",): 1.0})
    together = [({"a": 5, "b": 5}, 0.5), ({"a": 2, "b": 2}, 0.3)]
    model = build(macs, {n: Saving(10, ((5, 0.2),)) for n in "ab"}, together)
    for counts, latency in together:
        assert model.estimate(counts) == pytest.approx(latency)
        assert model.correction.inverse(latency) == pytest.approx(model.added(counts))
    assert model.estimate({"a": 10, "b": 10}) == pytest.approx(1.0)
    assert model.estimate({"a": 1, "b": 1}) < 0.3


def test_effective_counts_are_not_negative() -> None:
    model = LatencyModel(Polynomial({("a",): 0.1}), {"a": Curve(((5.0, 0.0), (10.0, 10.0)))})
    assert model.effective("a", 1) == 0.0
