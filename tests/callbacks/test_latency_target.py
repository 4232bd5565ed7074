"""A fit whose budget is a measured latency; the clock is arithmetic on the widths of the module."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import FinalizeCompression, StructuredSparsity
from lightning_compress.budget import BudgetWarning
from lightning_compress.timing import Latency
from tests.callbacks.modules import MLP, Classifier, fit
from tests.callbacks.test_resume import Crash


class Clock:
    """Seconds are the multiply-accumulates of an MLP and a constant; notes what was measured."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], tuple[int, ...], bool]] = []

    def time(self, model: nn.Module) -> float:
        return 0.1 + sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) / 1e3

    def __call__(self, models: Any, args: Any, kwargs: Any, **options: Any) -> dict[str, Latency]:
        self.calls.append((tuple(models), tuple(args[0].shape), torch.is_autocast_enabled("cpu")))
        with options["context"]:
            for model in models.values():
                model(*args, **kwargs)
        return {name: Latency(self.time(m), self.time(m), 9) for name, m in models.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr("lightning_compress.callbacks.latency_target.measure_latency", clock)
    return clock


def module() -> Classifier:
    torch.manual_seed(0)
    return Classifier(MLP(48, 40))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("sparsity", [False, True])
def test_the_latency_of_the_dense_module_is_what_counts(clock: Clock, rounds: int, sparsity: bool) -> None:
    small = module()
    dense = clock.time(small.model)
    finalize = FinalizeCompression(latency=0.4, at=0.6, rounds=rounds, report=False)
    fit(small, *([StructuredSparsity(kinds=("ffn",))] if sparsity else []), finalize)
    assert clock.time(small.model) / dense == pytest.approx(0.4, rel=0.05)
    assert finalize.plan is not None and len(finalize.surgery_reports) == rounds
    tables = [names for names, _, _ in clock.calls if "dense again" in names]
    assert len(tables) == 1  # one table for the fit, and for the next
    fit(module(), FinalizeCompression(latency=0.4, at=0.6, report=False))
    assert sum("dense again" in names for names, _, _ in clock.calls) == 1


@pytest.mark.parametrize(("arguments", "examples"), [({}, 8), ({"latency_batch": 1}, 1), ({"latency_batch": 8}, 8)])
def test_the_call_that_is_measured(clock: Clock, arguments: dict[str, Any], examples: int) -> None:
    fit(module(), FinalizeCompression(latency=0.5, report=False, latency_seconds=1.0, **arguments))
    assert {shape for _, shape, _ in clock.calls} == {(examples, 5)}


def test_the_precision_of_the_trainer(clock: Clock) -> None:
    seen = []

    class Seen(MLP):
        def forward(self, x: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    small = Classifier(Seen(48, 40))
    clock_call = Clock.__call__

    def measure(self: Clock, *args: Any, **options: Any) -> Any:
        del seen[:]
        times = clock_call(self, *args, **options)
        assert seen and all(seen)
        return times

    Clock.__call__ = measure  # type: ignore[method-assign]
    try:
        fit(small, FinalizeCompression(latency=0.5, report=False), precision="bf16-mixed")
    finally:
        Clock.__call__ = clock_call  # type: ignore[method-assign]
    assert len(clock.calls) >= 2


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_straight_equals_crash_and_resume(clock: Clock, epoch: int, rounds: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            StructuredSparsity(kinds=("ffn",), start=0.0),
            FinalizeCompression(latency=0.5, at=0.6, rounds=rounds, report=False),
        ]

    straight = module()
    fit(straight, *callbacks())
    path = tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="crash"):
        fit(module(), *callbacks(), Crash(path, epoch))
    resumed = module()
    from tests.callbacks.modules import loader, trainer

    tables = len(clock.calls)
    trainer(*callbacks()).fit(resumed, loader(), ckpt_path=str(path), weights_only=False)
    assert not any("dense again" in names for names, _, _ in clock.calls[tables:])
    assert clock.time(resumed.model) / clock.time(module().model) == pytest.approx(0.5, rel=0.05)
    shapes = [tuple(p.shape) for p in resumed.parameters()]
    assert shapes == [tuple(p.shape) for p in straight.parameters()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latency": 0.5, "macs": 0.5}, "macs, params, units and latency, but got macs=0.5, latency=0.5"),
        ({"latency": 50}, r"Expected latency, the fraction that is kept, to be in \(0, 1\], but got 50"),
        (
            {"macs": 0.5, "latency_batch": 1},
            r"Expected latency_batch together with latency, .* but got latency_batch=1 with macs\. Give latency=0\.5",
        ),
        ({"units": 0.5, "latency_seconds": 3}, "Expected latency_seconds together with latency"),
        ({"latency": 0.5, "latency_batch": 0}, "Expected latency_batch to be an integer of at least 1, but got 0"),
        ({"latency": 0.5, "latency_seconds": 0}, "Expected latency_seconds to be a positive number, but got 0"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinalizeCompression(**arguments)


def test_a_batch_that_is_too_small_is_said_before_anything_is_trained(clock: Clock) -> None:
    small = module()
    with pytest.raises(ValueError, match=r"at least latency_batch=9 examples, but it has 8 example\(s\)\. Lower"):
        fit(small, FinalizeCompression(latency=0.5, latency_batch=9))
    assert len(small.losses) <= 1


@pytest.mark.parametrize(("factor", "what"), [(0.9, "10% below"), (1.1, "10% above"), (1.01, None)])
def test_a_finished_module_that_misses_the_latency_is_said(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, factor: float, what: str | None
) -> None:
    def report(models: Any, *args: Any, **options: Any) -> dict[str, Latency]:
        return {"before": Latency(1.0, 1.0, 9), "after": Latency(0.5 * factor, 0.5 * factor, 9)}

    monkeypatch.setattr("lightning_compress.callbacks.removal.measure_latency", report)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(module(), FinalizeCompression(latency=0.5))
    (*messages,) = (str(w.message) for w in seen if issubclass(w.category, BudgetWarning))
    assert len(messages) == (what is not None)
    if what is not None:
        assert "Expected latency=0.5 of one call within 5%, as the plan measured before" in messages[0]
        assert f"1e+03 ms, {what} what was asked for" in messages[0] and "latency_seconds=..." in messages[0]


def test_a_plan_that_misses_the_latency_is_said_once(clock: Clock) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(module(), FinalizeCompression(latency=0.63, round_to=32))
    (message,) = (str(w.message) for w in seen if issubclass(w.category, BudgetWarning))
    assert "Expected latency=0.63 of one call within 5%, but the plan measures" in message


def test_a_latency_out_of_reach_is_said_with_the_first_batch(clock: Clock) -> None:
    small = module()
    with pytest.raises(ValueError, match=r"latency=0\.01 lies below latency=0\.\d+, the smallest possible"):
        fit(small, FinalizeCompression(latency=0.01))
    assert len(small.losses) <= 1
