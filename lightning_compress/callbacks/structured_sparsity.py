"""StructuredSparsity: drives whole structures to zero while the model trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_compress.callbacks.compiled import is_compiled
from lightning_compress.callbacks.groups import Groups
from lightning_compress.callbacks.moments import FitLength, Moment
from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.session import CompressionSession, log_progress
from lightning_compress.callbacks.sharded import check_sparsity, is_sharded
from lightning_compress.callbacks.sparsifier import Sparsifier
from lightning_compress.callbacks.sparsity_settings import SparsitySettings, check_count
from lightning_compress.callbacks.strategies import check_strategy
from lightning_compress.importance import Importance
from lightning_compress.schedules import Shape


class StructuredSparsity(Callback):
    r"""Drives whole structures (heads, FFN units, channels, ...) to zero during training, so that they can be removed.

    After each real optimizer step the proximal map of a regularizer shrinks every unit by one factor,

    .. math:: w_u \leftarrow w_u \max\bigl(0,\ 1 - \eta_t \lambda v_u / \lVert w_u \rVert\bigr)

    with the learning rate :math:`\eta_t` of that step, the strength :math:`\lambda`, and weights :math:`v_u` that grow
    with the square root of a unit's size and of the cost that its removal saves. Units reach exact zero, whatever the
    optimizer.

    With ``strength="auto"`` the budget of the `FinalizeCompression` beside it decides: every few steps the units are
    ranked, the ramped budget says which of them stay, and the strength becomes the one that brings all others to zero
    when removal comes.

    Args:
        regularizer: "group_lasso" (SSL), "hoyer_square" (SHS) or "block_group_lasso" (BSSL).
        kinds: kinds of structures, see ``KINDS``.
        mode: "proximal", the decoupled step above; or "loss", the literal penalty: its gradient, times the strength, is
            added to the gradients before each optimizer step (after unscaling, before clipping), which is exactly the
            penalty inside the loss. With an adaptive optimizer that form never reaches exact zero and its strength has
            no portable meaning.
        strength: "auto", or a number, which is then kept.
        importance: how units are ranked: "norm", "taylor" (first-order, averaged over training steps) or a function of
            (model, structure); see ``importance.unit_scores``.
        trimmed: whether units that the budget keeps are exempt. Default: only with ``strength="auto"``; a number means
            the plain form of the literature. Without a budget nothing is exempt.
        groups: "coupled" (the slices of a unit together), or "rows", "columns" or "blocks" of single matrices: rows and
            columns in the sense of a ``torch.nn.Linear`` weight, (out_features, in_features).
        block_shape: for blocks, the (out, in) size of a block; or
        block_grid: the (out, in) number of blocks. Neither: one block is a whole matrix.
        modules: for rows, columns and blocks, shell patterns of the modules whose weights are regularized, such as
            ``("encoder.*.attention.*",)``. Default: the matrices in which the structures of ``kinds`` live.
        strategy: "fine", "coarse" or "naive": TPrune's choice of lines, in place of ``groups`` and ``kinds``.
        decoder: for the strategy, dotted names of the modules that are its decoder.
        start: fraction of the fit after which sparsifying begins. What was learned until then is what `Distillation`
            teaches.
        schedule: shape of the budget's ramp from ``start`` to the removal.
        every_n_steps: apply the proximal map once in so many optimizer steps, with the sum of their learning rates.
        module: dotted name of the sub-module to compress. Default: found from the first step.

    Logs ``sparsity`` (units that are zero or removed), ``macs_kept`` (what removing them leaves of the prunable
    multiply-accumulates) and ``strength``, also to the progress bar.

    Raises:
        ValueError: for unknown names and contradicting arguments; at the start of the fit if ``strength="auto"`` has no
            budget or no time; when structures have been discovered, if there are none (with what was pinned, and why).

    References: Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks"; Yang, Wen & Li 2020,
    "DeepHoyer"; Mao et al. 2021, "TPrune"; Yun et al. 2019, "Trimming the l1 Regularizer".
    """

    def __init__(
        self,
        regularizer: str = "group_lasso",
        kinds: Sequence[str] = ("head", "ffn"),
        mode: Literal["proximal", "loss"] = "proximal",
        strength: float | Literal["auto"] = "auto",
        importance: Importance = "norm",
        trimmed: bool | None = None,
        groups: Groups = "coupled",
        block_shape: tuple[int, int] | None = None,
        block_grid: tuple[int, int] | None = None,
        modules: Sequence[str] | None = None,
        strategy: Literal["fine", "coarse", "naive"] | None = None,
        decoder: str | Sequence[str] = (),
        start: float = 0.2,
        schedule: Shape = "cubic",
        every_n_steps: int = 1,
        module: str | None = None,
    ) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"Expected start, a fraction of the fit, to be in [0, 1), but got {start}.")
        check_count("every_n_steps", every_n_steps)
        self.settings = SparsitySettings.of(
            regularizer,
            kinds,
            mode,
            strength,
            importance,
            trimmed,
            groups,
            block_shape,
            block_grid,
            modules,
            strategy,
            decoder,
            schedule,
        )
        self.start = start
        self.every_n_steps = every_n_steps
        self.module = module
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self._length: FitLength | None = None
        self._moment: Moment | None = None
        self._start = 0.0
        self._sparsifier: Sparsifier | None = None
        self._state: dict[str, Any] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of structures that are driven to zero."""
        return self.settings.kinds

    @property
    def strength(self) -> float:
        """The strength as it is now; with "auto", 0 before sparsifying begins."""
        return (self.settings.strength or 0.0) if self._sparsifier is None else self._sparsifier.strength

    @property
    def sparsifier(self) -> Sparsifier:
        """What does the work during a fit."""
        assert self._sparsifier is not None, "the fit has not started"
        return self._sparsifier

    @property
    def state_key(self) -> str:
        """Tells instances apart by what they regularize."""
        return self._generate_state_key(
            regularizer=self.settings.regularizer.name,
            kinds=self.kinds,
            groups=self.settings.groups,
            modules=self.settings.modules,
            module=self.module,
        )

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage != "fit":
            return
        self._reset()
        self._session = CompressionSession.join(pl_module, self)
        self._session.max_epochs = trainer.max_epochs
        self._session.sparsities.append(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the budget and the time for it exist, before anything is trained."""
        session = self._joined()
        check_strategy(trainer, pl_module, "StructuredSparsity", removes=False)
        session.processes = Processes.of(trainer)
        session.sharded = is_sharded(pl_module)
        if session.sharded:
            check_sparsity(self, session)
        if "hidden" in self.kinds and is_compiled(pl_module):
            raise ValueError(
                "Expected a model that is not compiled for StructuredSparsity(kinds=('hidden', ...)): its norms leave "
                "out units as they reach zero, which compiled code does not notice. Train without torch.compile, or "
                "choose other kinds."
            )
        session.watch(pl_module)
        self._length = FitLength.of(trainer, session.max_epochs)
        finalizer = session.finalizer
        if finalizer is None and self.settings.automatic:
            raise ValueError(
                "Expected a FinalizeCompression beside StructuredSparsity(strength='auto'), whose budget sets the "
                "strength, but "
                "the Trainer has none. Add FinalizeCompression(macs=0.4, at=0.6), or give a number: strength=1e-4."
            )
        if self.settings.strategy == "naive" and self.settings.automatic:
            rank_zero_warn(
                "StructuredSparsity(strategy='naive', strength='auto') shrinks the inputs of all matrices, too, with "
                "the strength that the removal of other units needs: a small translation model was destroyed before "
                "anything was removed. Choose strategy='coarse', or give a number: strength=1e-4."
            )
        self._moment = Moment(at=1.0) if finalizer is None else finalizer.moment
        if finalizer is None or not finalizer.skipped:
            owner = "StructuredSparsity" if finalizer is None else "FinalizeCompression"
            self._moment.check(self._length, owner, session.processes.count)
        self._start = self._moment.position_of_fraction(self.start, self._length)
        if math.isnan(self._start):
            raise ValueError(
                f"Expected start=0.0 in a fit of unknown length, but got start={self.start:g}, a fraction of it. "
                "Set Trainer(max_steps=...), or start=0.0."
            )
        if self._start >= 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"Expected sparsifying to start before the removal, but got start={self.start:g} and "
                f"FinalizeCompression"
                f"({self._moment}), {self._start:.2f} times as far. Lower start, or remove later."
            )
        low_precision = sorted(
            {str(p.dtype) for p in pl_module.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        )
        if low_precision and self.settings.mode == "proximal":
            rank_zero_warn(
                f"StructuredSparsity shrinks weights by less than {', '.join(low_precision)} can represent in one "
                f"step, so that units may "
                "not shrink at all. Train with full-precision weights: Trainer(precision='bf16-mixed')."
            )

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discover the structures with the sanity-validation batch, if there was one."""
        self._joined().ensure_structures(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch the optimizers."""
        session = self._joined()
        session.steps.attach(trainer.optimizers)
        self._sparsifier = Sparsifier(self.settings, session, self._start, self._position(trainer))
        if self._state is not None:
            self._sparsifier.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch optimizers that were replaced meanwhile, too."""
        self._joined().steps.attach(trainer.optimizers)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read gradients for the importance; in mode "loss" add the gradient of the penalty."""
        if self._joined().ensure_structures(trainer, pl_module) and self._is_active(trainer):
            self.sparsifier.follow()
            self.sparsifier.read_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shrink the units, if the optimizer has stepped."""
        sparsifier = self.sparsifier
        self._joined().require_structures(trainer, pl_module)
        if not self._is_active(trainer):
            sparsifier.skip_pending()
            return
        sparsifier.follow()
        if not sparsifier.waiting:
            return
        position = self._position(trainer)
        if first := sparsifier.unasked:
            self._refresh(trainer, pl_module, position)
        if sparsifier.waiting >= self.every_n_steps:
            sparsifier.apply_pending()
            # dead units are counted right after a shrinkage, before momentum moves them again
            if not first and sparsifier.due(position):
                self._refresh(trainer, pl_module, position)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module when the fit breaks off."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module after the fit."""
        if stage == "fit":
            self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Where sparsifying stands; see `Sparsifier`."""
        if self._sparsifier is not None:
            return self._sparsifier.state_dict()
        return dict(self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint was written."""
        self._state = dict(state_dict) or None

    # What happens in them

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._sparsifier is not None:
            self._sparsifier.close()

    def _position(self, trainer: pl.Trainer) -> float:
        assert self._moment is not None and self._length is not None
        return self._moment.position(trainer, self._length)

    def _is_active(self, trainer: pl.Trainer) -> bool:
        """Between the start and the last removal."""
        finalizer = self._joined().finalizer
        if finalizer is not None and (finalizer.finished or finalizer.skipped):
            return False
        return self._position(trainer) >= self._start

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule, position: float) -> None:
        session = self._joined()
        self.sparsifier.refresh(position, trainer.optimizers)
        number = session.sparsities.index(self)
        log_progress(pl_module, {f"strength/{number}" if number else "strength": self.strength, **session.progress()})
