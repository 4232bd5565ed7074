"""Moments of a fit: when they come, and that those that never come are refused at its start."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks.moments import FitLength, Moment
from tests.callbacks.modules import Classifier, fit, loader


class Positions(pl.Callback):
    """Records the position of a moment at the end of each batch."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.seen: list[tuple[int, float]] = []
        self.length: FitLength | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.length = FitLength.of(trainer)
        self.moment.check(self.length, "Positions")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        assert self.length is not None
        self.seen.append((trainer.global_step, self.moment.position(trainer, self.length)))


def steps_at(moment: Moment, data: DataLoader | None = None, **options: Any) -> int:
    """Optimizer steps when the moment comes."""
    recorder = Positions(moment)
    fit(Classifier(), recorder, data=data, **options)
    assert [p for _, p in recorder.seen] == sorted(p for _, p in recorder.seen)
    return next(step for step, position in recorder.seen if position >= 1 - 1e-9)


class Stream(IterableDataset):
    """Eight batches of unknown number."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            yield torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


@pytest.mark.parametrize(
    ("moment", "options", "expected"),
    [
        (Moment(at=0.6), {}, 24),  # of 5 epochs of 8 batches
        (Moment(at=0.6), {"accumulate_grad_batches": 4}, 6),
        (Moment(at=0.6), {"max_steps": 20}, 12),
        (Moment(at=0.6), {"max_epochs": -1, "max_steps": 20}, 12),
        (Moment(at=0.5), {"limit_train_batches": 4}, 10),
        (Moment(at=1.0), {"max_epochs": 1}, 8),
        (Moment(at=0.1), {"max_epochs": 1, "limit_train_batches": 1}, 1),
        (Moment(at_epoch=2), {}, 16),
        (Moment(at_epoch=5), {}, 40),
        (Moment(at_step=7), {}, 7),
        (Moment(at_step=3), {"accumulate_grad_batches": 4}, 3),
    ],
    ids=str,
)
def test_the_moment_comes(moment: Moment, options: dict[str, Any], expected: int) -> None:
    assert steps_at(moment, **options) == expected


def test_the_moment_comes_with_a_loader_of_unknown_length() -> None:
    stream = DataLoader(Stream(), batch_size=None)
    assert steps_at(Moment(at_step=11), data=stream) == 11
    assert steps_at(Moment(at_epoch=2), data=stream) == 16
    assert steps_at(Moment(at=0.5), data=stream, max_epochs=-1, max_steps=10) == 5


@pytest.mark.parametrize(
    ("moment", "options", "message"),
    [
        (Moment(at_epoch=6), {}, r"Expected Positions\(at_epoch=6\) to come within the fit, but it has 5 epochs"),
        (Moment(at_step=41), {}, r"Expected Positions\(at_step=41\) .* but it has 40 optimizer steps"),
        (Moment(at_step=11), {"accumulate_grad_batches": 4}, "but it has 10 optimizer steps"),
        (Moment(at_step=21), {"max_steps": 20}, "but it has 20 optimizer steps"),
        (Moment(at_epoch=4), {"max_steps": 20}, "but max_steps=20 ends it before 4 epochs of 8 optimizer steps"),
        (Moment(at=0.5), {"max_epochs": -1, "max_time": "00:00:00:01"}, "fraction of a fit of unknown length"),
    ],
    ids=str,
)
def test_a_moment_that_never_comes_is_refused(moment: Moment, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Classifier(), Positions(moment), **options)


def test_a_fraction_of_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"or give the moment as Positions\(at_step="):
        fit(Classifier(), Positions(Moment(at=0.5)), data=DataLoader(Stream(), batch_size=None))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Expected exactly one of at .* but got none. For example: at=0.6"),
        ({"at": 0.5, "at_step": 3}, ValueError, "but got at=0.5, at_step=3"),
        ({"at": 0.0}, ValueError, r"to be in \(0, 1\], but got 0.0"),
        ({"at": 6.0}, ValueError, "Did you mean at_epoch=6 or at_step=6"),
        ({"at_epoch": 0}, ValueError, "Expected at_epoch to be at least 1, but got 0"),
        ({"at_step": 2.5}, TypeError, "Expected at_step to be an integer, but got 2.5"),
    ],
)
def test_malformed_moments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Moment(**arguments)


def test_the_loader_is_finite() -> None:
    assert len(loader()) == 8
