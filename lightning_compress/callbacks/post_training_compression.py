"""PostTrainingCompression: makes a trained module smaller at the end of a ``trainer.validate``, without training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.budget import PerStructure
from lightning_compress.callbacks.bars import bars
from lightning_compress.callbacks.compiled import eager
from lightning_compress.callbacks.example import ExampleCall
from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.removal import make_report, remove_units
from lightning_compress.callbacks.session import CompressionSession
from lightning_compress.plan import PruningPlan
from lightning_compress.post_training.calibration import Calibration, check, parted, real_tokens
from lightning_compress.post_training.compress import Clock, PostTrainingResult, Settings, prepare
from lightning_compress.post_training.criteria import Criterion
from lightning_compress.post_training.repair import What
from lightning_compress.report import CompressionReport, count_parameters, file_size
from lightning_compress.saving import save_compressed
from lightning_compress.saving.save import check_target
from lightning_compress.structures import check_kinds

Seen = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a batch, and the call of the traced module that it led to


class PostTrainingCompression(Callback):
    """Removes units of a trained module at the end of ``trainer.validate(model, dataloader)``, without training.

    The batches of the loader are the calibration data: the first of them rank the units, choose which ones go together,
    and fit the weights that stay. The metrics that the loop logs are those of the module before. The LightningModule is
    the small model afterwards; a second ``trainer.validate`` measures it and compresses nothing more. The loss, where a
    criterion needs one, is that of ``training_step``, with logging switched off.

    Args:
        macs: kept fraction of the multiply-accumulates of the prunable part, in (0, 1); or
        params: of its parameters; or
        units: of the number of units; or
        latency: of the measured latency of the first batch on this device. Exactly one of the four.
        importance: "outputs", "fisher", "taylor", "norm", "low_rank", "low_rank_fisher", "obs" or "obs_loss"; see
            `CalibratedImportance`. "outputs", "norm", "low_rank" and "obs" need no labels.
        rearrange: with "outputs" and "fisher": rank units by what they cost together, by the full matrix of each
            structure, and choose again inside each. False ranks by the diagonal.
        repair: "weights" for least squares over the matrices that read units, "scales" for a factor per unit, None for
            nothing.
        kinds: kinds of structures to remove units of. Default: ("head", "ffn").
        batches: calibration batches to use, of those that the loop goes through; None for all.
        repair_batches: so many of them for the repair; None for all.
        per_sample: for "fisher": gradients of examples, or of batches.
        round_to: kept counts are multiples of this; a number, or numbers by kind or structure name.
        min_units: every structure keeps at least so many units; likewise.
        module: dotted name of the sub-module to compress. Default: found from the first step.
        folder: where to save the small model, for ``load_compressed``; absent or empty. Default: it is not saved.
        progress: whether to show bars where the Trainer shows one.

    Attributes:
        result: what was done; None before.

    Raises:
        ValueError: for contradicting arguments or values out of range; when the loop begins, for more than one process;
            at its end, as ``compress_after_training``.
        FileExistsError: when the loop begins, if the folder is occupied.
    """

    def __init__(
        self,
        macs: float | None = None,
        params: float | None = None,
        units: float | None = None,
        latency: float | None = None,
        importance: Criterion = "outputs",
        rearrange: bool = True,
        repair: What | None = "weights",
        kinds: Sequence[str] | None = None,
        batches: int | None = 64,
        repair_batches: int | None = 32,
        per_sample: bool = True,
        round_to: PerStructure | None = None,
        min_units: PerStructure = 1,
        module: str | None = None,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.settings = Settings(
            macs,
            params,
            units,
            latency,
            importance,
            rearrange,
            repair,
            batches,
            repair_batches,
            per_sample,
            round_to,
            min_units,
        )
        self.kinds = None if kinds is None else check_kinds(kinds)
        self.module = module
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self.result: PostTrainingResult | None = None
        self._session: CompressionSession | None = None
        self._seen: list[Seen] = []
        self._batch: Any = None
        self._call: ExampleCall | None = None
        self._hook: Any = None

    @property
    def report(self) -> CompressionReport | None:
        """The numbers; None before the removal."""
        return None if self.result is None else self.result.report

    @property
    def plan(self) -> PruningPlan | None:
        """What was removed; None before."""
        return None if self.result is None else self.result.plan

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look at the folder, and say where this callback does nothing."""
        if trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(
                "PostTrainingCompression compresses in trainer.validate(model, dataloader); in this fit it does "
                "nothing. FinalizeCompression removes units during a fit."
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look out for the first call."""
        if not self._wanted(trainer):
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"Expected one process for PostTrainingCompression, but got {trainer.world_size}: each would choose by "
                "its own batches. Use Trainer(devices=1)."
            )
        if self.folder is not None:
            check_target(self.folder)
        self._leave()
        self._session = CompressionSession.join(pl_module, self)
        self._session.processes = Processes.of(trainer)
        self._session.shows_progress = self.progress
        self._session.watch(pl_module)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch."""
        self._call = None
        if self._session is not None and self._wanting():
            copied = ExampleCall.copied((batch,), {})  # usable outside of inference mode
            self._batch = copied.args[0]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the call that the batch has led to."""
        session = self._session
        if session is None or not self._wanting() or not session.resolve(pl_module):
            return
        assert session.traced is not None and session.batch is not None
        if self._hook is None:
            self._hook = session.traced.register_forward_pre_hook(self._record, prepend=True, with_kwargs=True)
            self._call = session.batch
        if self._call is not None:
            self._seen.append((self._batch, self._call.args, self._call.kwargs))
        self._call = self._batch = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compress."""
        session = self._session
        if session is None or not self._wanted(trainer):
            return
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        check(tuple(self._seen))
        session.require_structures(trainer, pl_module)
        assert session.traced is not None
        # what the loop has put around a step is not for gradients and float64
        with torch.inference_mode(False), torch.autocast(pl_module.device.type, enabled=False), eager(session.traced):
            self.result = self._compressed(trainer, pl_module, session)
        pl_module.print(str(self.result))
        for logger in trainer.loggers:
            logger.log_metrics(self.result.report.metrics(), step=trainer.global_step)
        if self.folder is not None:
            save_compressed(session.traced, self.folder)
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._leave()

    # What happens in them

    def _wanted(self, trainer: pl.Trainer) -> bool:
        return self.result is None and trainer.state.fn == TrainerFn.VALIDATING

    def _wanting(self) -> bool:
        return self.settings.batches is None or len(self._seen) < self.settings.batches

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None and self._batch is not None:
            self._call = ExampleCall.copied(args, kwargs)

    def _leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._session is not None:
            self._session.close()
            self._session = None
        self._seen, self._batch, self._call = [], None, None

    def _calibration(self, pl_module: pl.LightningModule) -> Calibration:
        def call(model: nn.Module, seen: Seen) -> Any:
            return model(*seen[1], **seen[2])

        def loss(_: nn.Module, seen: Seen) -> Tensor:
            return training_loss(pl_module, seen[0])

        def real(seen: Seen) -> Tensor | None:
            mask = real_tokens(seen[2])
            return real_tokens(seen[0]) if mask is None else mask

        return Calibration(tuple(self._seen), call, loss, real, lambda seen: parted(seen[0])[2])

    def _compressed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, session: CompressionSession
    ) -> PostTrainingResult:
        model, structures, example = session.traced, session.structures, session.example
        assert model is not None and structures is not None and example is not None and session.batch is not None
        clock = Clock()
        whole = (session.batch.args, session.batch.kwargs)
        prepared = prepare(
            model,
            structures,
            self._calibration(pl_module),
            self.settings,
            (whole, None),
            bars(trainer, self.progress),
        )
        clock.lap("")
        dense = copy.deepcopy(model)
        before = (count_parameters(model), file_size(model))
        try:
            surgery = remove_units(session, trainer, pl_module, prepared.plan)
        except BaseException:
            prepared.restore()
            raise
        clock.lap("removal")
        session.removed(surgery.plan)
        error = max(surgery.error or 0.0, surgery.perturbed_error or 0.0)
        context = trainer.precision_plugin.forward_context()
        assert session.structures is not None
        report = make_report(session, model, session.structures, dense, before, error, context, trainer.global_step)
        return PostTrainingResult(
            report=report,
            plan=surgery.plan,
            surgery=surgery,
            repairs=prepared.repairs,
            notes=prepared.notes,
            judged=prepared.judged,
            seconds={**prepared.seconds, "removal": clock.seconds["removal"]},
        )


def training_loss(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    """Loss of ``training_step``, without logging.

    Raises:
        ValueError: if it returns none.
    """
    silent = {name: lambda *_, **__: None for name in ("log", "log_dict")}
    kept = {name: vars(pl_module)[name] for name in silent if name in vars(pl_module)}
    vars(pl_module).update(silent)
    try:
        loss = pl_module.training_step(batch, 0)
    finally:
        for name in silent:
            vars(pl_module).pop(name)
        vars(pl_module).update(kept)
    loss = loss.get("loss") if isinstance(loss, dict) else loss
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"Expected training_step of {type(pl_module).__name__} to return a loss for a calibration batch, because "
            f"gradients rank the units, but got {type(loss).__name__}. Use importance='obs' or 'low_rank', which need "
            "none. Nothing was changed."
        )
    return loss


__all__ = ["PostTrainingCompression"]
