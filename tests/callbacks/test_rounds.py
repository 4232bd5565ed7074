"""Removal in rounds: everything beside the weights survives each of them, and the report says how steps get faster."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_compress import FinalizeCompression
from lightning_compress.callbacks.step_times import KEEP, StepTimes
from lightning_compress.report import CompressionReport, Latency, Round
from tests.callbacks.modules import MLP, Classifier, fit, loader, trainer
from tests.callbacks.test_beside_other_callbacks import HalfZero, kept_slices


def test_three_rounds_equal_the_dense_fit_with_the_units_at_zero() -> None:
    """AdamW, a schedule by step, accumulated gradients and an average, in float64; units go that are zero anyway."""

    def run(*more: pl.Callback) -> tuple[HalfZero, pl.Trainer, EMAWeightAveraging]:
        torch.manual_seed(0)
        module, average = HalfZero(), EMAWeightAveraging(decay=0.9)
        fitting = trainer(average, *more, accumulate_grad_batches=2, max_epochs=6)
        fitting.fit(module, loader(), loader())
        return module, fitting, average

    finalize = FinalizeCompression(units=15 / 22, at_step=18, rounds=3, schedule="linear", report=False)
    small, fitting, average = run(finalize)
    dense, reference, other = run()
    assert len({r.parameters_after for r in finalize.surgery_reports}) == 3
    assert fitting.global_step == reference.global_step == 24
    assert finalize.plan is not None and finalize.plan.counts == {"layers.ffn": 8, "layers.ffn_2": 7}

    def same(name: str, one: Tensor, two: Tensor) -> None:
        torch.testing.assert_close(one, kept_slices(name, finalize, two), rtol=1e-10, atol=1e-12, msg=name)

    states = [fit.optimizers[0].state for fit in (fitting, reference)]
    parameters = [dict(module.named_parameters()) for module in (small, dense)]
    for name, parameter in parameters[0].items():
        same(name, parameter, parameters[1][name])
        mine, theirs = states[0][parameter], states[1][parameters[1][name]]
        for moment in ("exp_avg", "exp_avg_sq"):
            same(name, mine[moment], theirs[moment])
        assert float(mine["step"]) == float(theirs["step"]) == 24
    averages = [dict(a._average_model.module.named_parameters()) for a in (average, other)]  # type: ignore[union-attr]
    for name, value in averages[0].items():
        same(name, value, averages[1][name])
    rates = [fit.optimizers[0].param_groups[0]["lr"] for fit in (fitting, reference)]
    assert rates[0] == rates[1] < 1e-2
    torch.testing.assert_close(small.losses, dense.losses, rtol=1e-10, atol=1e-12)  # those of the average, validated


def test_the_report_says_how_long_steps_take_around_each_round(tmp_path: Any) -> None:
    module = Classifier(MLP(24, 20))
    logger = CSVLogger(tmp_path)
    finalize = FinalizeCompression(units=0.5, at=0.75, rounds=3)
    fit(module, finalize, logger=logger, log_every_n_steps=1)
    report = finalize.report
    assert report is not None
    assert [r.step for r in report.rounds] == [10, 20, 30]
    kept = [r.macs_kept for r in report.rounds]
    assert kept == sorted(kept, reverse=True) and kept[-1] == pytest.approx(report.macs_kept)
    assert report.rounds[-1].params == report.params[1]
    # ten steps in each phase, three of them to warm up
    assert [r.before.runs for r in report.rounds if r.before] == [7, 7, 7]
    assert [r.after for r in report.rounds[:-1]] == [r.before for r in report.rounds[1:]]
    first, last = report.rounds[0].before, report.rounds[-1].after
    assert first is not None and last is not None
    assert report.training_speedup == first.seconds / last.seconds
    text = str(report)
    assert "s/step before" in text and f"{last.seconds:.5f}" in text
    assert CompressionReport.from_json(report.to_json()) == report
    assert report.to_dict()["rounds"][2]["after"]["seconds"] == last.seconds
    assert report.metrics()["compression/training_speedup"] == report.training_speedup
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "compression/seconds_per_step" in logged and "compression/training_speedup" in logged


def test_too_few_steps_say_nothing() -> None:
    finalize = FinalizeCompression(units=0.5, at_step=2)
    fit(Classifier(), finalize, max_steps=4, max_epochs=-1)
    assert finalize.report is not None
    assert [(r.before, r.after) for r in finalize.report.rounds] == [(None, None)]
    assert finalize.report.training_speedup is None and finalize.report.rounds_text() == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("lightning_compress.callbacks.step_times.time.perf_counter", lambda: now[0])
    return now


def test_what_is_measured(clock: list[float]) -> None:
    times = StepTimes(torch.device("cpu"))

    def step(*batches: float) -> None:
        for number, seconds in enumerate(batches, 1):
            clock[0] += 100.0  # loading, validation
            times.begin()
            clock[0] += seconds
            times.end(stepped=number == len(batches))

    times.end(stepped=True)  # the middle of a batch is none
    for seconds in (9.0, 9.0, 9.0):  # to warm up
        step(seconds)
    assert times.take() is None
    for seconds in (9.0, 9.0, 9.0, 1.0, 3.0, 2.0):
        step(seconds)
    assert times.take() == Latency(2.0, 1.0, 3, 0.25)
    for _ in range(4):
        step(1.0, 3.0)  # two batches make a step
    times.begin()
    times.discard()
    found = times.take()
    assert found is not None and (found.seconds, found.runs) == (2.0, 1)
    for number in range(KEEP + 10):
        step(float(number))
    found = times.take()
    assert found is not None and found.runs == KEEP


def test_events_are_read_when_a_phase_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device, of which this is only the shape: no synchronisation but one at the end."""
    calls: list[str] = []

    class Event:
        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            Event.count += 1
            self.moment = Event.count

        def elapsed_time(self, other: Any) -> float:
            assert calls == ["synchronize"]
            return (other.moment - self.moment) * 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    times = StepTimes(torch.device("cuda"))
    for _ in range(5):
        times.begin()
        times.end(stepped=True)
    found = times.take()
    assert found is not None and (found.seconds, found.runs) == (0.005, 2)


def test_times_survive_a_resumed_fit() -> None:
    known = Round(10, 99, 0.5, 0.1, Latency(0.2, 0.1, 7), None)
    finalize = FinalizeCompression(units=0.5, rounds=2)
    finalize._rounds = [known]
    again = FinalizeCompression(units=0.5, rounds=2)
    again.load_state_dict(finalize.state_dict())
    assert again._rounds == [known]
    assert isinstance(finalize.state_dict()["rounds"][0], dict)  # plain containers: no unpickling
