"""SparsityMaps: what of the model is alive, dead or gone, drawn while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.analysis import discover
from lightning_compress.callbacks.compiled import eager, is_compiled
from lightning_compress.callbacks.example import smallest_example, undisturbed
from lightning_compress.callbacks.map_sinks import PREFIX, Sink, sinks_for
from lightning_compress.callbacks.overhead import Throttle
from lightning_compress.callbacks.plain_copy import is_sharded
from lightning_compress.callbacks.processes import check_silent
from lightning_compress.callbacks.session import CompressionSession, plainly
from lightning_compress.callbacks.sparsity_settings import check_count
from lightning_compress.callbacks.strategies import check_strategy
from lightning_compress.report.environment import environment
from lightning_compress.report.history import FitHistory
from lightning_compress.report.html import check_html, write_html
from lightning_compress.report.map_pictures import check_matplotlib, draw_maps, pixels
from lightning_compress.report.maps import ModelMaps, model_maps
from lightning_compress.report.matrix_maps import matrix_map
from lightning_compress.structures import EXACT_KINDS, Structures

MOMENTS = 20  # pictures of a fit by default
UNKNOWN = 500  # optimizer steps between pictures of a fit whose length nobody knows
REPORT = "report.html"


class SparsityMaps(Callback):
    r"""Draws what of the model is alive, dead or gone, at the begin, around removals, at the end, and in between.

    Six kinds of pictures: the *blocks* of every matrix, in the shape that it had before removals; the norms of the
    *heads* by layer; histograms of the *norms* of feed-forward units and channels; sparsity by *layers*; *bits* of the
    weights; the *tokens* that stay. They go to Weights & Biases (one panel for each kind, with a table, histograms and
    a summary) and to TensorBoard, whichever loggers the Trainer has; to PNG files and one JSON file where it has
    neither. At the end of the fit everything is put into one HTML file. Only process 0 draws, and training is left as
    it is.

    With c the seconds that the last pictures took, S those that were spent so far and T those of the fit without
    them, pictures in between are drawn when :math:`S + c \le \text{max\_overhead} \cdot T`. Those at the begin, around
    removals and at the end are always drawn, and count.

    Args:
        every: draw every so many optimizer steps. Default: twenty times in the fit, or every 500 steps where its length
            is not known. The interval grows where pictures would take too long; the callback says so once.
        module: dotted name of the sub-module that is shown. Default: the one that the compression callbacks compress;
            without any the one that is called in the first step, or the largest of several.
        parameters: shell patterns of the parameters whose blocks are shown, relative to it. Default: all with two dims
            or more.
        block_shape: ``(out, in)`` size of a block; or
        block_grid: ``(out, in)`` number of blocks. Default: at most 32 a side.
        threshold: elements and lines count as dead up to this root mean square; 0 for exact zeros.
        folder: for files. Default: "sparsity_maps" in the Trainer's ``default_root_dir``; pictures are then written
            only if no logger takes them, and the HTML report always. Files of an earlier fit there are replaced.
        html: whether to write ``report.html`` into the folder at the end of the fit.
        discover: whether heads and feed-forward units are looked for, with one traced call, where no other callback
            does.
        max_overhead: seconds of drawing for each second of the fit.

    Attributes:
        history: what was seen: maps of the moments that matter, sparsity and logged metrics over training.
        overhead: seconds of drawing for each second of the fit, until now.
        report_path: of the HTML report; None before it is written.

    Raises:
        ImportError: at the start of the fit, without matplotlib or jinja2, with the extra that brings them.
        ValueError, TypeError: for values out of range and blocks that are none; at the start of the fit, for a module
            that is not there, whose parameters are sharded or that has no matrices, and for patterns that match none.
    """

    kinds = None

    def __init__(
        self,
        every: int | None = None,
        module: str | None = None,
        parameters: Sequence[str] | None = None,
        block_shape: tuple[int, int] | None = None,
        block_grid: tuple[int, int] | None = None,
        threshold: float = 0.0,
        folder: str | Path | None = None,
        html: bool = True,
        discover: bool = True,
        max_overhead: float = 0.02,
    ) -> None:
        if every is not None:
            check_count("every", every)
        if not max_overhead > 0:
            raise ValueError(
                f"Expected max_overhead, seconds of drawing for each second of the fit, to be above 0, but got "
                f"{max_overhead}. Two percent: max_overhead=0.02."
            )
        block_shape = None if block_shape is None else _pair(block_shape)
        block_grid = None if block_grid is None else _pair(block_grid)
        # what is wrong with blocks and threshold is better said now than in the fit
        matrix_map(torch.zeros(1, 1), block_shape=block_shape, block_grid=block_grid, threshold=threshold)
        self.every = every
        self.module = module
        self.parameters = None if parameters is None else tuple(parameters)
        self.block_shape = block_shape
        self.block_grid = block_grid
        self.threshold = threshold
        self.folder = None if folder is None else Path(folder)
        self.html = html
        self.discover = discover
        self.max_overhead = max_overhead
        self._clock = time.perf_counter
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self.history = FitHistory()
        self.report_path: Path | None = None
        self._throttle = Throttle(self.every or UNKNOWN, self.max_overhead, self._clock)
        self._sinks: list[Sink] = []
        self._found: Structures | None = None
        self._shown: nn.Module | None = None
        self._began = self._said = False
        self._resumed = False
        self._version = 0
        self._last_step = 0
        self._device = torch.device("cpu")
        self._seen: dict[str, Tensor] = {}

    @property
    def overhead(self) -> float:
        """Seconds of drawing for each second of the fit, until now."""
        return self._throttle.overhead

    @property
    def state_key(self) -> str:
        """Tells instances apart by what they show and where."""
        folder = None if self.folder is None else str(self.folder)
        return self._generate_state_key(module=self.module, parameters=self.parameters, folder=folder)

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage != "fit":
            return
        (check_html if self.html else check_matplotlib)()
        self._reset()
        self._session = CompressionSession.join(pl_module, self)
        self._session.before_removal.append(lambda: self._before_removal(trainer, pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there are whole parameters; look out for the first call if nobody else does."""
        check_strategy(trainer, pl_module, "SparsityMaps", removes=False)
        if is_sharded(pl_module):
            raise ValueError(
                "Expected whole parameters for SparsityMaps, but those of this module are sharded: process 0, which "
                "draws, has only a part of each. Draw the small model after the fit: model_maps(load_compressed(...))."
            )
        if self._looks(trainer, pl_module):
            self._joined().watch(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the model as it is before the first step, if it is known what is called."""
        session = self._joined()
        self._last_step, self._device = trainer.global_step, pl_module.device
        self._version = session.version
        self._throttle = Throttle(self.every or _default_interval(trainer), self.max_overhead, self._clock)
        self._throttle.begin(trainer.global_step)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._sinks = sinks_for(
                trainer.loggers, self._folder(trainer), self.folder is not None, len(self.history.steps)
            )
        if session.structures is not None or session.resolve(pl_module) or not session.watching:
            self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw after a removal by a callback behind this one."""
        self._after_removal(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Before the first step, when it is known what is called, draw the model as it is."""
        if not self._began:
            self._begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw after a removal, and when it is time to."""
        if not self._began:
            self._begin(trainer, pl_module)
        self._after_removal(trainer, pl_module)
        step = trainer.global_step
        if step == self._last_step or not trainer.is_global_zero:
            return
        self._last_step = step
        before = self._throttle.every
        if self._throttle.due(step):
            self._draw(trainer, pl_module)
        elif self._throttle.lengthened and not self._said:
            self._said = True
            rank_zero_info(
                f"SparsityMaps draws every {self._throttle.every} optimizer steps now, not every {before}: more often "
                f"it would take more than {self.max_overhead:.1%} of the time of the fit."
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what was logged in training."""
        self._note_metrics(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what was logged in validation."""
        if not trainer.sanity_checking:
            self._note_metrics(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training is over: what is drawn from here on takes none of its time."""
        self._after_removal(trainer, pl_module)
        self._throttle.end()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the model as the fit leaves it, and write the report."""
        if not trainer.is_global_zero or not self._began:
            return
        maps = self._draw(trainer, pl_module, "end of the fit")
        if self.html and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer)
        summary = {**maps.metrics(), f"{PREFIX}/overhead": self.overhead}
        report = self._report()
        if report is not None:
            summary.update(report.metrics())
        for sink in self._sinks:
            sink.finish(summary, self.report_path, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module when the fit breaks off."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module after the fit."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, for the report of a fit that is resumed."""
        return {"history": self.history.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self.history = FitHistory.from_dict(state_dict["history"])
        self._resumed = True

    # What happens in them

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
        self._shown, self._sinks, self._seen = None, [], {}

    def _others_discover(self) -> bool:
        """Whether another callback discovers structures in the first step."""
        session = self._joined()
        return bool(session.sparsities) or (session.finalizer is not None and not session.finalizer.skipped)

    def _looks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether this callback has to find structures by itself."""
        return (
            self.discover
            and trainer.is_global_zero
            and not self._others_discover()
            # looking for a call would make compiled code run as it is written for a while, with other last bits
            and not is_compiled(pl_module)
            and not any(isinstance(m, torch.jit.ScriptModule) for m in pl_module.modules())
        )

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle what is shown, and draw it for the first time."""
        session = self._joined()
        if self._others_discover():
            if not session.ensure_structures(trainer, pl_module):  # all processes together, as the others do
                return
        elif session.watching:
            session.resolve(pl_module)
        self._began = True
        if not trainer.is_global_zero:
            return
        self._shown = pl_module if session.traced is None else session.traced
        with self._throttle.spending():
            if self._looks(trainer, pl_module) and session.dense is None and session.batch is not None:
                self._found = self._discovered(trainer, pl_module)
        self._draw(trainer, pl_module, "fit resumed" if self._resumed else "begin of the fit")

    def _discovered(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Structures | None:
        """The structures of the module; None, with a warning, where they cannot be found."""
        session = self._joined()
        traced, batch = session.traced, session.batch
        assert traced is not None and batch is not None
        try:
            with plainly(pl_module), eager(traced), undisturbed(traced):
                if trainer.world_size > 1:
                    check_silent(traced, batch.args, batch.kwargs)  # this process calls it alone
                example = smallest_example(traced, batch)
                progress = session.bars(trainer)
                return discover(traced, example.args, example.kwargs, kinds=EXACT_KINDS, progress=progress)
        except Exception as error:  # whatever the user's forward raises ends no fit that only wants pictures
            rank_zero_warn(
                f"SparsityMaps could not discover the structures of {session.traced_name or type(traced).__name__!r} "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): it shows matrices "
                "alone. SparsityMaps(discover=False) does not try."
            )
            return None

    def _maps(self, step: int) -> ModelMaps:
        session = self._joined()
        assert self._shown is not None
        pruning = session.token_pruning
        dense = session.dense if session.dense is not None else self._found
        return model_maps(
            self._shown,
            dense,
            session.plan if session.dense is not None else None,
            parameters=self.parameters,
            block_shape=self.block_shape,
            block_grid=self.block_grid,
            threshold=self.threshold,
            tokens=None if pruning is None else pruning.summary,
            step=step,
            order=tuple(self.history.sparsity),
        )

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, moment: str | None = None) -> ModelMaps:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # what is waited for is training, not drawing
        with self._throttle.spending():
            maps = self._maps(trainer.global_step)
            self.history.add(maps, moment)
            drawn = {kind: pixels(figure) for kind, figure in draw_maps(maps).items()}
            for sink in list(self._sinks):
                try:
                    sink.show(maps, drawn, moment)
                except OSError as error:  # a disk that is full ends no fit
                    self._sinks.remove(sink)
                    rank_zero_warn(f"SparsityMaps could not write its pictures, and goes on without: {error}")
        return maps

    def _before_removal(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._began:
            self._begin(trainer, pl_module)
        if trainer.is_global_zero:
            self._draw(trainer, pl_module, "before removal")

    def _after_removal(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        version = self._joined().version
        if version == self._version:
            return
        self._version = version
        if trainer.is_global_zero:
            self.history.removals.append(trainer.global_step)
            self._draw(trainer, pl_module, "after removal")

    def _note_metrics(self, trainer: pl.Trainer) -> None:
        """Note the metrics that are new; in all processes, because computing them may communicate."""
        metrics = trainer.callback_metrics
        for name, value in metrics.items():
            if value is self._seen.get(name):
                continue
            self._seen[name] = value
            if trainer.is_global_zero and isinstance(value, Tensor) and value.numel() == 1:
                self.history.add_metric(name, trainer.global_step, float(value))

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / PREFIX if self.folder is None else self.folder

    def _report(self) -> Any:
        finalizer = self._joined().finalizer
        return None if finalizer is None else finalizer.report

    def _write(self, trainer: pl.Trainer) -> None:
        folder = self._folder(trainer)
        with self._throttle.spending():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                about = environment(self._device)
                self.report_path = write_html(self._report(), folder / REPORT, self.history, environment=about)
            except OSError as error:
                rank_zero_warn(f"SparsityMaps could not write its report: {error}")
                return
        rank_zero_info(f"SparsityMaps has written its report: {str(self.report_path)!r}.")


def _default_interval(trainer: pl.Trainer) -> int:
    """Optimizer steps from picture to picture."""
    epochs, batches, limit = trainer.max_epochs, float(trainer.num_training_batches), trainer.max_steps
    steps = math.inf if limit < 0 else float(limit)
    if epochs is not None and epochs >= 0:
        steps = min(steps, batches * epochs / trainer.accumulate_grad_batches)
    return max(1, math.ceil(steps / MOMENTS)) if math.isfinite(steps) else UNKNOWN


def _pair(block: Sequence[int]) -> tuple[int, int]:
    """A list of two numbers, as configuration files have it, as a tuple; anything else is refused where it is used."""
    return tuple(block) if isinstance(block, list) else block  # type: ignore[return-value]


__all__ = ["SparsityMaps"]
