"""StructuredSparsity: drives whole structures to zero while the model trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.budget import select
from lightning_compress.callbacks.groups import Groups, chosen_groups, regularizer_for
from lightning_compress.callbacks.moments import FitLength, Moment
from lightning_compress.callbacks.optimizer_steps import GroupKey
from lightning_compress.callbacks.session import CompressionSession, log_progress
from lightning_compress.callbacks.shrinkage import CoupledShrinkage, MatrixShrinkage, unit_costs
from lightning_compress.importance import Importance, TaylorAccumulator, unit_norms, unit_scores
from lightning_compress.regularizers import tprune_strategy
from lightning_compress.schedules import Shape, ramp
from lightning_compress.structures import Structure, check_kinds

# The controller looks again after each of so many equal parts of the sparsifying phase.
REFRESHES = 50
# First-order scores are noisy but cheap to average: one update in so many optimizer steps.
TAYLOR_EVERY = 4


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
        self.regularizer, self.groups = regularizer_for(regularizer, groups, strategy)
        if strategy is not None:
            tprune_strategy(strategy)
            kinds = ("qk_dim", "vo_dim", "ffn")
        self.kinds: tuple[str, ...] = check_kinds(kinds)
        if mode not in ("proximal", "loss"):
            raise ValueError(f"Expected mode to be 'proximal' or 'loss', but got {mode!r}.")
        automatic = strength == "auto"
        if not automatic and (
            isinstance(strength, bool | str) or not isinstance(strength, int | float) or not 0 <= strength < math.inf
        ):
            raise ValueError(f"Expected strength to be 'auto' or a number of at least 0, but got {strength!r}.")
        if automatic and mode == "loss":
            raise ValueError(
                "Expected a number for the strength of mode='loss', but got 'auto': a penalty in the loss reaches no "
                "exact zero, "
                f"so no strength meets a budget. Call StructuredSparsity({regularizer!r}, mode='loss', strength=1e-4)."
            )
        if not isinstance(importance, str):
            if not callable(importance):
                raise ValueError(f"Expected importance to be 'norm', 'taylor' or a function, but got {importance!r}.")
        elif importance not in ("norm", "taylor"):
            raise ValueError(f"Expected importance to be 'norm', 'taylor' or a function, but got {importance!r}.")
        if not 0 <= start < 1:
            raise ValueError(f"Expected start, a fraction of the fit, to be in [0, 1), but got {start}.")
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"Expected every_n_steps to be an integer of at least 1, but got {every_n_steps!r}.")
        if (block_shape or block_grid) and self.groups != "blocks":
            raise ValueError(
                f"Expected block_shape and block_grid with groups='blocks' only, but got groups={self.groups!r}. "
                "Call StructuredSparsity('block_group_lasso', block_grid=(2, 2))."
            )
        if modules is not None and self.groups == "coupled":
            raise ValueError(
                "Expected modules with groups='rows', 'columns' or 'blocks' only: coupled units span several modules. "
                "Choose kinds=..., or one part of the model with module=...."
            )
        ramp(0.0, shape=schedule)  # an unknown schedule is refused now, not when the ramp begins
        self.mode = mode
        self.strength: float = 0.0 if automatic else float(strength)
        self.automatic = automatic
        self.importance = importance
        self.trimmed = automatic if trimmed is None else trimmed
        self.block_shape = None if block_shape is None else (block_shape[0], block_shape[1])
        self.block_grid = None if block_grid is None else (block_grid[0], block_grid[1])
        self.modules = None if modules is None else ((modules,) if isinstance(modules, str) else tuple(modules))
        self.strategy = strategy
        self.decoder = (decoder,) if isinstance(decoder, str) else tuple(decoder)
        self.start = start
        self.schedule: Shape = schedule
        self.every_n_steps = every_n_steps
        self.module = module
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self._length: FitLength | None = None
        self._moment: Moment | None = None
        self._start = 0.0
        self._origin = 0.0
        self._steps_at_origin = 0
        self._shrinkage: CoupledShrinkage | MatrixShrinkage | None = None
        self._version = -1
        self._applied_at = 0
        self._applied: dict[GroupKey, float] = {}
        self._refreshed_at = -math.inf
        self._protected: dict[str, Tensor] | None = None
        self._taylor: TaylorAccumulator | None = None
        self._resumed: dict[str, Any] | None = None
        self._dead: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Tells instances apart by what they regularize."""
        return self._generate_state_key(
            regularizer=self.regularizer.name,
            kinds=self.kinds,
            groups=self.groups,
            modules=self.modules,
            module=self.module,
        )

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage != "fit":
            return
        self._reset()
        self._session = CompressionSession.join(pl_module, self)
        self._session.sparsities.append(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the budget and the time for it exist, before anything is trained."""
        session = self._joined()
        session.watch(pl_module)
        self._length = FitLength.of(trainer)
        finalizer = session.finalizer
        if finalizer is None and self.automatic:
            raise ValueError(
                "Expected a FinalizeCompression beside StructuredSparsity(strength='auto'), whose budget sets the "
                "strength, but "
                "the Trainer has none. Add FinalizeCompression(macs=0.4, at=0.6), or give a number: strength=1e-4."
            )
        self._moment = Moment(at=1.0) if finalizer is None else finalizer.moment
        if finalizer is None or not finalizer.skipped:
            self._moment.check(self._length, "StructuredSparsity" if finalizer is None else "FinalizeCompression")
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
        if low_precision and self.mode == "proximal":
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
        assert self._moment is not None and self._length is not None
        self._origin = self._moment.position(trainer, self._length)
        self._steps_at_origin = session.steps.count
        self._skip_pending()
        if self._resumed is not None:
            self._origin = self._resumed["origin"]
            self._steps_at_origin -= self._resumed["steps"]
            self._applied_at -= self._resumed["pending_steps"]
            # what was not acted on yet when the checkpoint was written
            self._applied = {(key[0], key[1]): -value for key, value in self._resumed["pending"]}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch optimizers that were replaced meanwhile, too."""
        self._joined().steps.attach(trainer.optimizers)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read gradients for the importance; in mode "loss" add the gradient of the penalty."""
        session = self._joined()
        if not session.ensure_structures(trainer, pl_module) or not self._is_active(trainer):
            return
        self._follow()
        if self._taylor is not None and (session.steps.count - self._steps_at_origin) % TAYLOR_EVERY == 0:
            self._taylor.update()
        if self.mode == "loss" and self._shrinkage is not None and self.strength > 0:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            gradients = {n: p.grad for n, p in session.parameters().items() if p.grad is not None and id(p) in own}
            self._shrinkage.add_gradient(self.strength, gradients)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shrink the units, if the optimizer has stepped."""
        session = self._joined()
        session.require_structures(trainer, pl_module)
        if not self._is_active(trainer):
            self._skip_pending()
            return
        self._follow()
        if session.steps.count == self._applied_at:
            return
        position = self._position(trainer)
        if first := self._refreshed_at == -math.inf:
            self._refresh(trainer, pl_module, position)
        if session.steps.count - self._applied_at < self.every_n_steps:
            return
        self.apply_pending()
        if not first and position >= self._refreshed_at + (1 - self._start) / REFRESHES:
            self._refresh(trainer, pl_module, position)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module when the fit breaks off."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module after the fit."""
        if stage == "fit":
            self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Strength, scores, what is protected and what is dead, and how far the steps have been acted on."""
        if self._resumed is not None or self._session is None:
            return dict(self._resumed or {"strength": self.strength})
        steps = self._session.steps
        return {
            "strength": self.strength,
            "version": self._version,
            "origin": self._origin,
            "steps": steps.count - self._steps_at_origin,
            "pending_steps": steps.count - self._applied_at,
            "pending": [(list(key), total - self._applied.get(key, 0.0)) for key, total in steps.sums().items()],
            "refreshed_at": self._refreshed_at,
            "protected": self._protected,
            "alive": self._shrinkage.alive.cpu() if isinstance(self._shrinkage, CoupledShrinkage) else None,
            "taylor": None if self._taylor is None else self._taylor.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint was written."""
        self.strength = state_dict["strength"]
        self._resumed = dict(state_dict) if "steps" in state_dict else None

    # What happens in them

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
        self._shrinkage = None
        self._taylor = None

    def _position(self, trainer: pl.Trainer) -> float:
        assert self._moment is not None and self._length is not None
        return self._moment.position(trainer, self._length)

    def _is_active(self, trainer: pl.Trainer) -> bool:
        """Between the start and the last removal."""
        finalizer = self._joined().finalizer
        if finalizer is not None and (finalizer.finished or finalizer.skipped):
            return False
        return self._position(trainer) >= self._start

    def _skip_pending(self) -> None:
        self._applied_at = self._joined().steps.count
        self._applied = self._joined().steps.sums()

    def _follow(self) -> None:
        """Make the groups those of the structures as they are now."""
        session = self._joined()
        if self._version == session.version:
            return
        assert session.structures is not None and session.traced is not None
        session.steps.forget_owners()
        parameters = session.parameters()
        own = self._own_structures()
        if self.groups == "coupled":
            metric = session.finalizer.metric if session.finalizer is not None else "macs"
            costs = unit_costs(session.structures, metric)
            self._shrinkage = CoupledShrinkage(parameters, own, self.regularizer, session.steps, costs)
        else:
            lines = chosen_groups(parameters, own, self.groups, self.modules, self.strategy, self.decoder)
            self._shrinkage = MatrixShrinkage(
                parameters, lines, self.regularizer, session.steps, self.block_shape, self.block_grid
            )
        if not self._shrinkage.rates.keys:
            raise ValueError(
                f"Expected the parameters of {[s.name for s in own]} to be trained, but no optimizer of the Trainer "
                f"holds one that "
                "requires a gradient. Unfreeze them, or choose other kinds or another module."
            )
        if self.importance == "taylor":
            self._taylor = TaylorAccumulator(session.traced, session.structures, decay=0.95)
        self._version = session.version
        self._refreshed_at = -math.inf
        self._dead = {}
        if self._resumed is not None and self._resumed["version"] == session.version:
            self._refreshed_at = self._resumed["refreshed_at"]
            if self._taylor is not None and self._resumed["taylor"] is not None:
                self._taylor.load_state_dict(self._resumed["taylor"])
            if self._resumed["protected"] is not None:
                self._protect(self._resumed["protected"])
            if isinstance(self._shrinkage, CoupledShrinkage) and self._resumed["alive"] is not None:
                self._shrinkage.alive = self._resumed["alive"].to(self._shrinkage.alive)
        self._resumed = None

    def _protect(self, protected: Mapping[str, Tensor]) -> None:
        assert self._shrinkage is not None
        self._protected = dict(protected)
        self._shrinkage.protect(protected)

    def _own_structures(self) -> list[Structure]:
        structures = self._joined().structures
        assert structures is not None
        own = [s for s in structures if s.kind in self.kinds]
        if not own:
            raise ValueError(
                f"Expected structures of kinds {self.kinds} for StructuredSparsity, but only "
                f"{sorted({s.kind for s in structures})} can be removed. Choose among these."
            )
        return own

    def scores(self) -> dict[str, Tensor]:
        """Score of every unit by structure name, now: the larger, the more is lost without it."""
        if self._shrinkage is not None:
            self._shrinkage.observe()
        return self._observed_scores()

    def _observed_scores(self) -> dict[str, Tensor]:
        session = self._joined()
        assert session.traced is not None and session.structures is not None
        if self._taylor is not None:
            try:
                return self._taylor.scores()
            except ValueError:  # no gradient has been seen yet: begin with the norms
                return {n: v.square() for n, v in unit_norms(session.traced, session.structures).items()}
        importance = "norm" if self.importance == "taylor" else self.importance
        own = self._shrinkage
        if (
            importance == "norm"
            and isinstance(own, CoupledShrinkage)
            and own.complete
            and len(own.structures) == len(session.structures)
        ):
            return own.scores()
        return unit_scores(session.traced, session.structures, importance)

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule, position: float) -> None:
        """Ask the budget anew which units stay, adapt the strength, and look at what is dead."""
        session = self._joined()
        assert self._shrinkage is not None and session.structures is not None
        finalizer = session.finalizer
        self._refreshed_at = position
        self._shrinkage.observe()
        if finalizer is not None:
            done = min(1.0, max(0.0, (position - self._start) / (1 - self._start)))
            target = ramp(done, begin_value=1.0, end_value=finalizer.fraction, shape=self.schedule)
            target = session.fraction_of_now(max(target, finalizer.fraction), finalizer.metric)
            if self.trimmed or self.automatic:
                protected = select(
                    session.structures, self._observed_scores(), **finalizer.options({finalizer.metric: target})
                )
                self._protect(protected)
            if self.automatic:
                self.strength = self._shrinkage.strength(
                    self._steps_left(position, finalizer.next_position(self._start))
                )
                if not self.trimmed:
                    self._protect({s.name: torch.zeros(s.units, dtype=torch.bool) for s in session.structures})
        self._bury(trainer)
        self._log(pl_module)

    def _steps_left(self, position: float, until: float) -> float:
        """Optimizer steps until a position, at the pace of this fit so far."""
        session = self._joined()
        steps: float = session.steps.count - self._steps_at_origin
        # several optimizers step in turn: the pace of one of them is what counts
        steps /= max(1, len(session.steps.optimizers))
        way = position - self._origin
        # nine tenths of them: gradients pull back, and what is to go should be gone when removal comes
        return max(1.0, 0.9 * steps / way * (until - position)) if way > 0 else 1.0

    def apply_pending(self) -> None:
        """Apply the proximal map for all optimizer steps since the last time."""
        session = self._joined()
        if self._shrinkage is None or session.steps.count == self._applied_at:
            return
        sums = session.steps.sums()
        pending = {key: total - self._applied.get(key, 0.0) for key, total in sums.items()}
        self._skip_pending()
        if self.mode == "proximal" and self.strength > 0:
            self._shrinkage.apply(self.strength, pending)

    def _bury(self, trainer: pl.Trainer) -> None:
        """Forget the momentum of units that are zero, or it would bring them back."""
        if not isinstance(self._shrinkage, CoupledShrinkage) or self.mode == "loss":
            return
        self._dead = self._shrinkage.dead()
        flat = torch.cat([self._dead[s.name] for s in self._shrinkage.structures])
        if bool(flat.any()):
            moments: dict[str, list[Tensor]] = {}
            for name in self._shrinkage.rates.keys:
                parameter = self._joined().parameters()[name]
                for optimizer in trainer.optimizers:
                    state = optimizer.state.get(parameter, {})
                    tensors = [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
                    moments.setdefault(name, []).extend(tensors)
            self._shrinkage.groups.zero_(flat, moments)

    def _log(self, pl_module: pl.LightningModule) -> None:
        session = self._joined()
        number = session.sparsities.index(self)
        log_progress(pl_module, {f"strength/{number}" if number else "strength": self.strength, **session.progress()})

    def alive(self) -> dict[str, int]:
        """Structure name -> units that are not zero, of the structures that this instance has looked at."""
        if self._version != self._joined().version:
            return {}  # counted before a removal
        return {name: int((~dead).sum()) for name, dead in self._dead.items()}
