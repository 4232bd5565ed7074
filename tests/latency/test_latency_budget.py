"""A budget in measured latency: met by planning, measuring and correcting, or said to be missed and why."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import BudgetWarning, LatencyTable, apply_plan, discover, make_plan, select
from lightning_compress.budget import plan_for_latency
from lightning_compress.latency import LatencyGoal, measure_latency_table
from lightning_compress.latency.loop import ROUNDS, next_estimate
from lightning_compress.progress import quiet
from tests.latency.fake import CALL, Clock, Stack, linear, proven, steps_of_8

EXAMPLE = (CALL, {})


@pytest.fixture(autouse=True)
def no_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a test must not measure time")

    monkeypatch.setattr("lightning_compress.timing.time", SimpleNamespace(perf_counter=refuse))


def plan(model: nn.Module, fraction: float, table_clock: Clock, clock: Clock, **options: Any) -> tuple[Any, Any]:
    structures = proven(model)
    table = measure_latency_table(model, structures, CALL, cache=False, measure=table_clock)
    scores = {s.name: torch.rand(s.units) for s in structures}
    goal = LatencyGoal(fraction, args=CALL, measure=clock)
    return plan_for_latency(model, structures, goal, table, scores, **options)


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("pace", [linear, steps_of_8])
def test_a_true_table_meets_the_latency_at_once(pace: Any, fraction: float) -> None:
    model, clock = Stack(512, 512, 256), Clock(pace)
    made, met = plan(model, fraction, clock, clock)
    assert met.met and met.rounds == 1
    dense = clock.time(model)
    apply_plan(model, made, unverified=True)
    assert clock.time(model) / dense == pytest.approx(fraction, rel=0.025)
    if pace is steps_of_8:
        assert all(n % 8 == 0 for n in clock.widths(model))


@pytest.mark.parametrize("fraction", [0.7, 0.4])
def test_a_wrong_table_is_corrected_by_measuring(fraction: float) -> None:
    # the table was measured where the rest took nothing; now it takes as long as all units
    model = Stack(512, 256)
    late = Clock(rest=768.0 * (fraction / (1 - fraction)) / 2)
    _, met = plan(model, fraction, Clock(rest=0.0), late)
    assert met.met and 1 < met.rounds <= ROUNDS
    assert len(late.calls) == met.rounds
    assert all(set(call) == {"dense", "small"} for call in late.calls)
    assert sum(late.seconds) <= 30.0 + 1e-9


def test_a_few_percent_of_noise_do_no_harm() -> None:
    model = Stack(512, 256)
    _, met = plan(model, 0.5, Clock(rest=300.0), Clock(noise=lambda number: 0.03 * (number % 3 - 1)))
    assert met.met


def test_plateaus_are_filled_up_for_free() -> None:
    model = Stack(64, 64)
    made, _ = plan(model, 0.6, Clock(steps_of_8), Clock(steps_of_8), round_to=1)
    assert all(n % 8 == 0 for n in made.counts.values() if n > 48)


def test_the_multiples_of_the_table_are_the_default() -> None:
    clock = Clock(steps_of_8)
    for options, multiple in (({}, 8), ({"round_to": 24}, 24)):
        made, _ = plan(Stack(512, 256), 0.5, clock, clock, **options)
        assert all(n % multiple == 0 or n in (512, 256) for n in made.counts.values())


def test_floors_and_per_layer_are_respected() -> None:
    made, met = plan(Stack(512, 256), 0.5, Clock(), Clock(), min_units=120, per_layer=True)
    large, small = made.counts.values()
    assert met.met and large == pytest.approx(2 * small, abs=2) and small >= 120


# What cannot be met


def test_a_latency_below_the_floors_is_an_error_with_what_is_possible() -> None:
    clock = Clock(rest=100.0)
    with pytest.raises(ValueError, match=r"latency=0\.3 lies below latency=0\.5[0-9]*, the smallest possible"):
        plan(Stack(100), 0.3, clock, clock)


def test_a_missed_latency_is_said_with_the_reason() -> None:
    # the table promises what this machine does not keep
    with pytest.warns(
        BudgetWarning, match=r"Expected latency=0\.2 of one call within 5%, .* above what was asked for: "
    ):
        _, met = plan(Stack(512), 0.2, Clock(rest=0.0), Clock(rest=512.0))
    assert not met.met and "nothing smaller is within reach" in met.stuck
    with pytest.warns(BudgetWarning, match="measured already: a smaller round_to would allow smaller steps"):
        plan(Stack(4), 0.6, Clock(rest=0.1), Clock(rest=0.1))
    with pytest.warns(BudgetWarning, match=r"Equal runs differ by 20% here: measure for longer \(seconds=\.\.\.\)"):
        plan(Stack(512), 0.2, Clock(rest=0.0), Clock(rest=512.0, spread=0.2))


def test_an_uncertain_plan_is_measured_a_second_time() -> None:
    model = Stack(512, 256)
    clock = Clock(noise=lambda number: 0.08 * (number > 2), spread=0.2)
    _, met = plan(model, 0.5, Clock(), clock)
    first, second = clock.calls
    assert met.met and met.rounds == 2 and first == second
    clock = Clock(noise=lambda number: 0.2 * (number == 4), spread=0.2)  # the second time it is 20 % slower
    _, met = plan(model, 0.5, Clock(), clock)
    assert met.rounds > 2 and clock.calls[0] == clock.calls[1] != clock.calls[2]


def test_rounds_are_bounded() -> None:
    clock = Clock(noise=lambda number: 0.9 * (number % 3 - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        plan(Stack(512), 0.5, Clock(), clock)
    assert len(clock.calls) <= ROUNDS


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(0.5, 1.25)], 0.4),  # too slow: in proportion
        ([(0.5, 0.8)], 0.625),
        ([(0.4, 0.8), (0.6, 1.2)], 0.5),  # between both sides
        ([(0.4, 0.999), (0.6, 1.5)], 0.42),  # away from the ends of a bracket
        ([(0.5, 1.5), (0.3, 1.3)], 0.0),  # a constant that the table does not know: the line through both
        ([(0.5, 1.3), (0.3, 1.5)], 0.2),  # noise: no line
        ([(0.6, 0.8), (0.4, 1.25)], 0.32),  # noise: no bracket
    ],
)
def test_the_next_estimate(seen: list[tuple[float, float]], expected: float) -> None:
    assert next_estimate(seen) == pytest.approx(expected)


# References, milliseconds, tables alone


def test_a_latency_is_relative_to_the_reference() -> None:
    dense, clock = Stack(256, 256), Clock(rest=0.0)
    structures = proven(dense)
    table = measure_latency_table(dense, structures, CALL, cache=False, measure=clock)
    scores = {s.name: torch.rand(s.units) for s in structures}
    model = Stack(256, 256)
    first = make_plan(model, structures, latency=0.5, table=table, scores=scores)
    apply_plan(model, first, unverified=True)
    left = first.shrunk(structures)
    now = {s.name: torch.rand(s.units) for s in left}
    for reference, expected in ((dense, 0.25 * 512), (None, 0.25 * 256)):
        goal = LatencyGoal(0.25, args=CALL, measure=clock, reference=reference)
        second, met = plan_for_latency(model, left, goal, table, now)
        assert met.met
        assert sum(second.counts.values()) == pytest.approx(expected, rel=0.03)
    assert sum(len(m.nonzero()) for m in select(left, now, latency=0.5, table=table).values()) == pytest.approx(
        128, rel=0.03
    )


def test_milliseconds() -> None:
    model, clock = Stack(256, 256), Clock(rest=88.0)
    structures = proven(model)
    table = measure_latency_table(model, structures, CALL, cache=False, measure=clock)
    by_table = make_plan(model, structures, latency_ms=300, table=table)
    assert sum(by_table.counts.values()) == pytest.approx(212, rel=0.02)
    scores = {s.name: torch.rand(s.units) for s in structures}
    goal = LatencyGoal(seconds=0.3, args=CALL, measure=Clock(rest=188.0))  # the machine is slower now
    made, met = plan_for_latency(model, structures, goal, table, scores)
    assert met.met and sum(made.counts.values()) == pytest.approx(112, abs=8)
    with pytest.warns(BudgetWarning, match=r"Expected latency_ms=200 of one call within 5%"):
        plan_for_latency(
            model, structures, LatencyGoal(seconds=0.2, args=CALL, measure=Clock(rest=400.0)), table, scores
        )


def test_make_plan_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(), Stack(256, 256)
    table_clock: list[Any] = []

    def table(*args: Any, **kwargs: Any) -> LatencyTable:
        table_clock.append(kwargs)
        return measure_latency_table(*args, cache=False, measure=clock)

    monkeypatch.setattr("lightning_compress.budget.measure_latency_table", table)
    monkeypatch.setattr("lightning_compress.budget.measure_latency", clock)
    made = make_plan(model, proven(model), latency=0.5, example=EXAMPLE, seconds=7.0)
    assert (20 + sum(made.counts.values())) / 532 == pytest.approx(0.5, rel=0.025)
    assert table_clock == [{"seconds": 7.0, "progress": quiet}]
    assert make_plan(model, proven(model), latency=1.0, example=EXAMPLE).is_empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency": 0.5, "macs": 0.5}, r"exactly one target among params, macs, units and latency, but got macs=0\.5"),
        ({"latency": 0.5, "latency_ms": 3.0}, r"but got latency=0\.5, latency_ms=3\.0"),
        (
            {"latency": 0.5},
            r"Expected example=\(args, kwargs\), the call whose latency counts, or table=\.\.\., but got",
        ),
        ({"latency": 1.5}, r"Expected latency to be a kept fraction in \(0, 1\], but got 1\.5"),
        ({"latency": 50}, r"Did you mean latency=0\.5\?"),
        ({"latency_ms": -1.0}, r"Expected latency_ms to be a positive number of milliseconds, but got -1\.0"),
        ({"macs": 0.5, "example": EXAMPLE}, r"Expected example together with latency=\.\.\. or latency_ms=\.\.\."),
        ({"macs": 0.5, "table": 1}, "Expected table together with latency"),
        ({"example": EXAMPLE}, "Expected example together with latency"),
    ],
    ids=str,
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = Stack(16)
    with pytest.raises(ValueError, match=message):
        make_plan(model, proven(model), **arguments)


def test_malformed_examples_and_missing_tables_are_refused() -> None:
    model = Stack(16)
    with pytest.raises(TypeError, match=r"Expected example to be \(args, kwargs\), .* pass example=\(\(x,\), \{\}\)"):
        make_plan(model, proven(model), latency=0.5, example=CALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected table=\.\.\. for a latency, what measure_latency_table"):
        select(proven(model), {"blocks.0.ffn": torch.ones(16)}, latency=0.5)
    with pytest.raises(ValueError, match="Expected structures that are proven removable"):
        make_plan(model, discover(model, CALL), latency=0.5, example=EXAMPLE)
