"""When something is due: moments of a fit, in the three spellings that users think in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_compress.callbacks.processes import Processes


@dataclass(frozen=True)
class FitLength:
    """How long a fit is going to be.

    Args:
        batches: training batches of the whole fit; inf where no number of epochs, or no length of the loader, limits
            it.
        batches_per_epoch: training batches of one epoch; inf for a loader of unknown length.
        steps_per_epoch: optimizer steps of one epoch; 0 where they are not known, or where epochs differ in it.
        epochs: ``max_epochs``; inf if there is none.
        steps: optimizer steps of the whole fit as far as they are known; inf if unknown.
        max_steps: the Trainer's own limit in optimizer steps; inf if there is none.
    """

    batches: float
    batches_per_epoch: float
    steps_per_epoch: float
    epochs: float
    steps: float
    max_steps: float

    @classmethod
    def of(cls, trainer: pl.Trainer, max_epochs: int | None = None) -> FitLength:
        """The length of the fit that ``trainer`` is about to run; sets up the training loader if need be.

        Args:
            trainer: the trainer.
            max_epochs: its ``max_epochs`` as they were set up: StochasticWeightAveraging adds an epoch without steps
                when the fit starts. Default: as they are.

        Raises:
            ValueError: if processes have different numbers of training batches.
        """
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        per_epoch = float(trainer.num_training_batches)
        limit = trainer.max_epochs if max_epochs is None else max_epochs
        epochs = float(limit) if limit is not None and limit >= 0 else math.inf
        max_steps = float(trainer.max_steps) if trainer.max_steps >= 0 else math.inf
        per_epoch_steps: float = 0
        steps = max_steps
        if math.isfinite(per_epoch):
            counts = _steps_of_epochs(trainer, per_epoch)
            per_epoch_steps = counts[0][1] if len(counts) == 1 else 0
            if math.isfinite(epochs):
                # each number of steps holds until the next one begins
                ends = [*(min(epochs, begin) for begin, _ in counts[1:]), epochs]
                spans = (end - min(epochs, begin) for (begin, _), end in zip(counts, ends, strict=True))
                steps = min(max_steps, sum(span * n for span, (_, n) in zip(spans, counts, strict=True)))
        if not trainer.lightning_module.automatic_optimization:
            # a manual step may step several optimizers, or none: only max_steps says how many there will be
            steps, per_epoch_steps = max_steps, 0
        every = Processes.of(trainer).gather("measure the length of the fit", per_epoch)
        if len(set(every)) > 1:
            raise ValueError(
                f"Expected all processes to have the same number of training batches, but they have {every}: those "
                "with more would wait for gradients of the others for ever. Let every process draw its share, as "
                f"Trainer(use_distributed_sampler=True) does, or cut it: limit_train_batches={min(every):g}."
            )
        return cls(per_epoch * epochs, per_epoch, per_epoch_steps, epochs, steps, max_steps)

    def progress(self, trainer: pl.Trainer) -> float:
        """Part of the fit that is done when a training batch ends, in [0, 1]; nan if its length is not known."""
        parts = [
            done / limit
            for done, limit in ((batches_done(trainer), self.batches), (trainer.global_step, self.max_steps))
            if math.isfinite(limit) and limit > 0
        ]
        return min(1.0, max(parts)) if parts else math.nan


def _steps_of_epochs(trainer: pl.Trainer, batches: float) -> list[tuple[int, int]]:
    """Optimizer steps of an epoch of so many batches, with the epoch from which on that holds, beginning with 0."""
    factors = {0: trainer.accumulate_grad_batches}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            factors = {**factors, **callback.scheduling}
    return [(epoch, math.ceil(batches / factor)) for epoch, factor in sorted(factors.items())]


def batches_done(trainer: pl.Trainer) -> int:
    """Training batches since the beginning of the fit, the one that is just ending included."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


@dataclass(frozen=True)
class Moment:
    """A moment of a fit: a fraction of it, a number of epochs, or a number of optimizer steps; exactly one.

    Args:
        at: fraction of the fit, in (0, 1].
        at_epoch: after so many whole epochs, at least 1.
        at_step: after so many optimizer steps, at least 1.

    Raises:
        ValueError: if not exactly one is given, or it is out of its range.
        TypeError: if an epoch or a step is not an integer.
    """

    at: float | None = None
    at_epoch: int | None = None
    at_step: int | None = None

    def __post_init__(self) -> None:
        given = {
            k: v for k, v in (("at", self.at), ("at_epoch", self.at_epoch), ("at_step", self.at_step)) if v is not None
        }
        if len(given) != 1:
            raise ValueError(
                "Expected exactly one of at (fraction of the fit), at_epoch and at_step, but got "
                f"{', '.join(f'{k}={v}' for k, v in given.items()) or 'none'}. For example: at=0.6, at_epoch=6 or "
                f"at_step=600."
            )
        if self.at is not None and not 0 < self.at <= 1:
            hint = f" Did you mean at_epoch={self.at:g} or at_step={self.at:g}?" if self.at > 1 else ""
            raise ValueError(f"Expected at, a fraction of the fit, to be in (0, 1], but got {self.at}.{hint}")
        for name, value in (("at_epoch", self.at_epoch), ("at_step", self.at_step)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected {name} to be an integer, but got {value!r}.")
            if value < 1:
                raise ValueError(f"Expected {name} to be at least 1, but got {value}.")

    def __str__(self) -> str:
        if self.at is not None:
            return f"at={self.at:g}"
        return f"at_epoch={self.at_epoch}" if self.at_epoch is not None else f"at_step={self.at_step}"

    def check(self, length: FitLength, owner: str, processes: int = 1) -> None:
        """Raise ValueError if the moment never comes in a fit of this length, or cannot be told beforehand."""
        if processes > 1 and self.at_epoch is not None and not math.isfinite(length.batches_per_epoch):
            raise ValueError(
                f"Expected {owner}({self}) in a fit of {processes} processes to have a loader of known length: their "
                f"epochs need not end together. Give the moment as {owner}(at_step=...)."
            )
        if self.at is not None and not (math.isfinite(length.batches) or math.isfinite(length.max_steps)):
            raise ValueError(
                f"Expected the Trainer of {owner}({self}) to have max_steps, or max_epochs and a loader of known "
                f"length: a "
                "fraction of a fit of unknown length (max_time alone, or a loader without a length) is not known "
                "beforehand. "
                f"Set Trainer(max_steps=...), or give the moment as {owner}(at_step=...)."
            )
        if self.at_epoch is not None and self.at_epoch > length.epochs:
            raise ValueError(
                f"Expected {owner}({self}) to come within the fit, but it has {length.epochs:g} epochs. "
                f"Set at_epoch to at most {length.epochs:g}, or leave epochs to fine-tune after the removal: at=0.6."
            )
        if self.at_epoch is not None and self.at_epoch * length.steps_per_epoch > length.max_steps:
            raise ValueError(
                f"Expected {owner}({self}) to come within the fit, but max_steps={length.max_steps:g} ends it before "
                f"{self.at_epoch} epochs of {length.steps_per_epoch:g} optimizer steps. Use a fraction of the fit: "
                f"at=0.6."
            )
        if self.at_step is not None and self.at_step > length.steps:
            raise ValueError(
                f"Expected {owner}({self}) to come within the fit, but it has {length.steps:g} optimizer steps. "
                f"Set at_step to at most {length.steps:g}, or use a fraction of the fit: at=0.6."
            )

    def position(self, trainer: pl.Trainer, length: FitLength) -> float:
        """How far the fit is on its way when a training batch ends: 0 at its beginning, 1 at this moment."""
        if self.at is not None:
            return length.progress(trainer) / self.at
        if self.at_step is not None:
            return trainer.global_step / self.at_step
        assert self.at_epoch is not None
        if math.isfinite(length.batches_per_epoch):
            return batches_done(trainer) / (self.at_epoch * length.batches_per_epoch)
        # without a known length the last batch of an epoch is known when it comes
        epochs = trainer.current_epoch + int(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        return epochs / self.at_epoch

    def position_of_fraction(self, fraction: float, length: FitLength) -> float:
        """The position, on the way to this moment, of a fraction of the whole fit; nan if the length is not known."""
        if fraction == 0:
            return 0.0
        if self.at is not None:
            return fraction / self.at
        if self.at_step is not None:
            return fraction * length.steps / self.at_step if math.isfinite(length.steps) else math.nan
        assert self.at_epoch is not None
        return fraction * length.epochs / self.at_epoch if math.isfinite(length.epochs) else math.nan
