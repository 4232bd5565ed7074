"""Measuring the table: which widths, what is shared, what is found; with a clock that is arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import Structures, discover, measure_latency, measure_latency_table
from lightning_compress.latency import narrowed_copy
from lightning_compress.latency.measuring import MOST_VARIANTS
from tests.latency.fake import CALL, Clock, Stack, linear, proven, steps_of_8


def measured(model: nn.Module, clock: Clock, **options: Any) -> Any:
    return measure_latency_table(model, proven(model), CALL, cache=False, measure=clock, **options)


def test_a_table_predicts_what_the_clock_says() -> None:
    model = Stack(64, 64, 32)
    table = measured(model, Clock())
    structures = proven(model)
    names = list(structures.counts)
    assert table.dense_seconds == pytest.approx(0.180)
    assert [(row.structures, row.units) for row in table.rows] == [((names[0], names[1]), 64), ((names[2],), 32)]
    for counts in ((64, 64, 32), (64, 10, 32), (24, 48, 8), (1, 1, 1)):
        kept = dict(zip(names, counts, strict=True))
        assert table.estimate(structures, kept) == pytest.approx((20 + sum(counts)) / 180, rel=1e-3)
    assert table.unit_seconds(structures) == pytest.approx(dict.fromkeys(names, 1e-3))
    assert "on" in str(table) and "180.00 ms" in str(table) and "and 1 like it" in str(table)


def test_look_alikes_are_measured_together_and_share_a_row() -> None:
    clock = Clock()
    measured(Stack(64, 64, 64, 64), clock)
    (call,) = clock.calls
    # the dense model twice, four widths together, four of the family (the same), two just below a multiple of 8
    assert len(call) == 2 + 4 + 4 + 2
    assert set(call.values()) <= {(n,) * 4 for n in range(65)}
    assert clock.seconds == [30.0]


@pytest.mark.parametrize(("pace", "multiple"), [(linear, 1), (steps_of_8, 8)])
def test_the_multiple_that_runs_at_full_speed_is_found(pace: Any, multiple: int) -> None:
    table = measured(Stack(512, 512), Clock(pace))
    assert set(table.multiples.values()) == {multiple}


def test_where_every_odd_width_seems_slow_the_multiple_is_coarse() -> None:
    table = measured(Stack(512), Clock(noise=lambda number: 0.3 * (number > 10)))
    assert set(table.multiples.values()) == {32}


def test_few_units_are_measured_one_by_one() -> None:
    clock = Clock()
    table = measured(Stack(6), clock)
    assert [count for count, _ in table.rows[0].points] == [4, 3, 2, 1]
    assert set(table.multiples.values()) == {1}


def test_work_that_look_alikes_share_is_told_apart() -> None:
    # the second layer reads what the first makes: halving both leaves a quarter of the product
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    batch = torch.randn(3, 16)
    structures = discover(model, (batch,), kinds=("ffn",), prove=True)

    def clock(models: Any, *_: Any, **__: Any) -> Any:
        from lightning_compress.timing import Latency

        return {
            n: Latency(s := sum(p.numel() for p in m.parameters() if p.dim() == 2) / 1e6, s, 9)
            for n, m in models.items()
        }

    table = measure_latency_table(model, structures, (batch,), cache=False, measure=clock)
    a, b = structures.counts
    for counts in ({a: 8, b: 16}, {a: 16, b: 8}, {a: 8, b: 8}, {a: 4, b: 12}):
        expected = structures.macs.evaluate({**structures.counts, **counts}) / structures.macs.evaluate(
            structures.counts
        )
        assert table.estimate(structures, counts) == pytest.approx(expected, rel=0.02)


def test_many_structures_are_bounded() -> None:
    clock = Clock()
    model = Stack(*range(16, 40))
    table = measured(model, clock)
    assert len(clock.calls[0]) <= MOST_VARIANTS + 2
    empty = [row for row in table.rows if not row.points]
    assert empty and all(row.units < 39 for row in empty)  # the smallest are left out, and estimated by their MACs
    structures = proven(model)
    assert table.estimate(structures, {row.structures[0]: 8 for row in empty}) < 1


def test_the_model_is_left_alone_and_whole_weights_are_shared() -> None:
    model = Stack(64, 32).train()
    before = {n: (p, p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    structures = proven(model)
    name = next(iter(structures.counts))
    small = narrowed_copy(model, structures, {name: 16})
    assert small(*CALL).shape == model(*CALL).shape
    assert small.get_parameter("blocks.0.up.weight").shape == (16, 8)
    shared = [n for n, p in small.named_parameters() if p.data_ptr() == before[n][1]]
    assert set(shared) == {n for n in before if not n.startswith("blocks.0.") or n == "blocks.0.down.bias"}
    measured(model, Clock())
    for n, p in model.named_parameters():
        assert p is before[n][0] and p.data_ptr() == before[n][1] and torch.equal(p, before[n][2])
    assert all(module.training for module in model.modules())


def test_tied_weights_stay_tied_in_a_copy() -> None:
    model = Stack(16, 16)
    model.blocks[1] = model.blocks[0]
    structures = proven(model)
    small = narrowed_copy(model, structures, dict.fromkeys(structures.counts, 4))
    assert small.get_parameter("blocks.0.up.weight") is small.get_parameter("blocks.1.up.weight")


def test_what_is_refused() -> None:
    model = Stack(16)
    with pytest.raises(ValueError, match="Expected structures to measure the latency of, but there are none"):
        measure_latency_table(model, Structures(), CALL, cache=False)
    with pytest.raises(
        ValueError, match=r"proven removable, .* is not \(1 of 1\)\. Use discover\(\.\.\., prove=True\)"
    ):
        measure_latency_table(model, discover(model, CALL), CALL, cache=False)
    table = measured(model, Clock())
    with pytest.raises(ValueError, match="has 32 units, and in the table there is 16 units: measure the table with"):
        table.model(proven(Stack(32)))
    with pytest.raises(ValueError, match="in the table there is no such structure"):
        table.model(proven(Stack(16, 16)))


def test_fewer_structures_than_were_measured() -> None:
    model = Stack(64, 32)
    table = measured(model, Clock())
    structures = proven(model)
    first = structures.rebuilt([structures[0]])
    assert table.estimate(first, {structures[0].name: 32}) == pytest.approx(1 - 32 / 116, rel=1e-3)


def test_real_times_make_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path))
    model = Stack(16)
    table = measure_latency_table(model, proven(model), CALL, seconds=0.05)
    assert table.dense_seconds > 0 and len(table.rows[0].points) >= 3
    times = measure_latency({"a": model}, CALL, repeats=5)
    assert times["a"].spread >= 0 and times["a"].runs == 5
