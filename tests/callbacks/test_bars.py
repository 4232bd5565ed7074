"""Bars between the steps of a loop: where the Trainer shows one, in its way, and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_compress import FinalizeCompression, PostTrainingCompression, QuantizationAwareTraining
from lightning_compress.callbacks.bars import bars
from lightning_compress.progress import quiet
from tests.callbacks.modules import Classifier, Transformer, fit, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
PROOF = ("operations traced", "ways of removal", "removal of all together")


def no_bar(*printed: str) -> bool:
    """Whether there are only the lines that Lightning logs."""
    return not any(sign in text for text in printed for sign in ("\r", "it/s", "%|", *PROOF))


def module() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Transformer(blocks=1))


def fitted(*callbacks: pl.Callback, **options: Any) -> tuple[Classifier, FinalizeCompression]:
    small, finalize = module(), FinalizeCompression(macs=0.6, at=0.5, report=False)
    fit(small, finalize, *callbacks, data=loader(sequences=True, examples=16), max_epochs=2, **options)
    return small, finalize


def test_nothing_is_shown_where_the_trainer_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    fitted()
    assert no_bar(*capfd.readouterr())


def test_a_fit_shows_its_proof_and_its_removal(capfd: pytest.CaptureFixture[str]) -> None:
    small, finalize = fitted(TQDMProgressBar(), enable_progress_bar=True)
    _, shown = capfd.readouterr()
    assert all(what in shown for what in PROOF)
    # the first batch: operations, weights, ways, all, all; the removal: weights, ways known, all, weights, weights
    assert shown.count("removal of all together:   0%") == 3
    silent, other = fitted()
    assert other.plan == finalize.plan
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), silent.parameters(), strict=True))


def test_in_the_display_of_rich(capfd: pytest.CaptureFixture[str]) -> None:
    rich = pytest.importorskip("rich")
    screen = io.StringIO()
    display = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 150})
    try:
        fitted(display, enable_progress_bar=True)
    finally:
        rich.reconfigure()
    assert all(what in screen.getvalue() for what in PROOF)
    assert no_bar(*capfd.readouterr())  # of tqdm, beside it
    assert display.progress is not None
    tasks = display.progress.tasks
    assert {task.description.strip() for task in tasks if task.visible} == {"Epoch 1/1"}
    assert display.train_progress_bar.description.strip() == "Epoch 1/1"  # found by its place among the tasks
    (known,) = {task.total for task in tasks if task.description == "ways of removal"}
    assert known == 2


def failing(items: Iterable[int]) -> None:
    for item in items:
        if item == 1:
            raise RuntimeError("anything")


def test_in_the_display_of_rich_a_bar_that_breaks_off_is_hidden() -> None:
    rich = pytest.importorskip("rich")
    display = RichProgressBar(console_kwargs={"file": io.StringIO(), "force_terminal": True})
    t = trainer(display, enable_progress_bar=True)
    try:
        display._init_progress(t)
        bar = bars(t)
        with pytest.raises(RuntimeError, match="anything"):
            failing(bar(iter(range(3)), "of unknown length"))
        assert display.progress is not None
        (task,) = display.progress.tasks
        assert not task.visible and task.completed == 1 and task.total == float("inf")
        display._stop_progress()
        (item,) = bar([1], "after the display has gone")
        assert item == 1 and len(display.progress.tasks) == 1
    finally:
        display._stop_progress()
        rich.reconfigure()


def test_only_in_the_first_process_and_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(TQDMProgressBar(), enable_progress_bar=True)
    assert bars(t) is not quiet
    assert bars(t, wanted=False) is quiet
    monkeypatch.setattr(type(t), "is_global_zero", False)
    assert bars(t) is quiet
    monkeypatch.undo()
    off = trainer(TQDMProgressBar(refresh_rate=0), enable_progress_bar=True)
    assert bars(off) is quiet
    assert bars(trainer()) is quiet


@pytest.mark.parametrize("progress", [True, False])
def test_compression_after_training(progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    t = trainer(
        PostTrainingCompression(macs=0.7, importance="norm", repair=None, progress=progress),
        TQDMProgressBar(),
        enable_progress_bar=True,
    )
    t.validate(module(), loader(sequences=True, examples=16), verbose=False)
    out, shown = capfd.readouterr()
    assert "Validation" in out
    assert all((what in shown) == progress for what in PROOF)


def test_conversion_after_a_fit(capfd: pytest.CaptureFixture[str]) -> None:
    quantize = QuantizationAwareTraining("int8", backend="unpacked")
    data = loader(sequences=True, examples=16)
    fit(module(), quantize, TQDMProgressBar(), data=data, max_epochs=1, enable_progress_bar=True)
    shown = capfd.readouterr().err
    assert "operations traced" in shown and "integers of weights" in shown and "backends compared" in shown
