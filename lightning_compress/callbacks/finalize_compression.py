"""FinalizeCompression: removes what the budget does not keep, in the middle of the fit, and reports what came out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.budget import (
    BudgetWarning,
    PerStructure,
    Target,
    kept_fraction,
    make_plan,
    plan_for_latency,
    select,
)
from lightning_compress.callbacks.averages import averaged_copies, take_integers_over
from lightning_compress.callbacks.checkpoint import before_load, check_shapes, plans_from_state, take_shape
from lightning_compress.callbacks.compiled import eager, recompile
from lightning_compress.callbacks.latency_target import LatencyTarget
from lightning_compress.callbacks.moments import FitLength, Moment
from lightning_compress.callbacks.monitors import begin_anew
from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.removal import check_finite, make_report, remove_units
from lightning_compress.callbacks.session import CompressionSession, log_progress, log_tokens, traced_module
from lightning_compress.callbacks.sharded import FOLDER, check_finalizer, is_sharded, remove_gathered
from lightning_compress.callbacks.shrinkage import unit_costs
from lightning_compress.callbacks.sparsity_settings import check_count, check_importance
from lightning_compress.callbacks.step_times import StepTimes
from lightning_compress.callbacks.strategies import check_strategy
from lightning_compress.importance import Importance, TaylorAccumulator, unit_norms, unit_scores
from lightning_compress.plan import PruningPlan
from lightning_compress.report import CompressionReport, Latency, Round, count_parameters, file_size
from lightning_compress.saving import save_compressed
from lightning_compress.saving.save import check_target
from lightning_compress.schedules import Shape, ramp
from lightning_compress.structures import check_kinds
from lightning_compress.surgery import SurgeryReport


class FinalizeCompression(Callback):
    """Removes units until a fraction of one cost is left, in the middle of a fit that then goes on.

    Removal happens right after an optimizer step. The Parameter objects, the optimizers with their state, and the
    schedulers stay: everything that has the shape of a parameter is cut with it. The smaller model is verified against
    the model with the removed units set to zero, and if anything does not fit, nothing is changed. After the fit the
    LightningModule *is* the small model.

    Beside a `StructuredSparsity` this removes the units that it has driven to zero; alone it prunes by importance.

    Args:
        macs: kept fraction of the multiply-accumulates of the prunable part, in (0, 1]; or
        params: kept fraction of its parameters; or
        units: kept fraction of the number of units; or
        latency: measured latency of the first batch on this device, as a fraction of that of the dense module, in
            (0, 1]: a table is measured when sparsifying begins (or found on disk), and at the last removal the smaller
            module is measured and corrected until it is met within 5 %. Exactly one of the four.
        at: moment of the removal as a fraction of the fit, in (0, 1]; or
        at_epoch: after so many epochs; or
        at_step: after so many optimizer steps. Default: ``at=0.6``.
        rounds: remove in so many rounds, evenly spaced from the start of sparsifying (or of the fit) to the moment
            above.
        schedule: shape of the budget's way over the rounds.
        importance: how units are ranked: "norm", "taylor" (first-order, averaged over training steps) or a function of
            (model, structure). Default: as the `StructuredSparsity` beside it ranks, else "norm".
        per_layer: keep the same fraction of units in every structure of a kind, instead of ranking over all of them.
        round_to: kept counts are multiples of this; a number, or numbers by kind or structure name.
        min_units: every structure keeps at least so many units; likewise.
        kinds: kinds of structures to remove, in addition to those of `StructuredSparsity`. Default without one:
            ("head", "ffn").
        report: whether to measure latency and file size, and to print the report.
        module: dotted name of the sub-module to compress. Default: found from the first step.
        latency_batch: with ``latency``, so many examples of the first batch make the measured call. Default: all.
        latency_seconds: with ``latency``, measure for about so long, when sparsifying begins and at the removal.
        folder: where to save the small model at the end of the fit, for ``load_compressed``; absent or empty. Default:
            it is not saved, except that of a sharded module: "compressed" in the log directory of the Trainer.

    Attributes:
        plan: what was removed, in the coordinates of the original model; None before.
        report: the numbers; None before the last removal, or with ``report=False``.
        surgery_reports: what each removal did.
        saved: the folder with the small model; None before the end of the fit, and if it is not saved.

    Raises:
        ValueError: for contradicting arguments or values out of range; at the start of the fit, if the moment does not
            come in it; when structures have been discovered, if there are none or the budget lies below the floors; at
            the removal, if the loss or a weight is not finite.
    """

    def __init__(
        self,
        macs: float | None = None,
        params: float | None = None,
        units: float | None = None,
        at: float | None = None,
        at_epoch: int | None = None,
        at_step: int | None = None,
        rounds: int = 1,
        schedule: Shape = "cubic",
        importance: Importance | None = None,
        per_layer: bool = False,
        round_to: PerStructure | None = None,
        min_units: PerStructure = 1,
        kinds: Sequence[str] | None = None,
        report: bool = True,
        module: str | None = None,
        latency: float | None = None,
        latency_batch: int | None = None,
        latency_seconds: float | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.metric, self.fraction = _one_target(macs, params, units, latency)
        self._latency = LatencyTarget.of(self.metric, latency_batch, latency_seconds)
        self.moment = Moment(0.6 if at is None and at_epoch is None and at_step is None else at, at_epoch, at_step)
        check_count("rounds", rounds)
        if importance is not None:
            check_importance(importance)
        ramp(0.0, shape=schedule)  # an unknown schedule is refused now, not at the first round
        self.rounds = rounds
        self.schedule: Shape = schedule
        self.importance = importance
        self.per_layer = per_layer
        self.round_to = round_to
        self.min_units = min_units
        self.kinds = None if kinds is None else check_kinds(kinds)
        self.wants_report = report
        self.module = module
        self.folder = None if folder is None else Path(folder)
        self.report: CompressionReport | None = None
        self.surgery_reports: list[SurgeryReport] = []
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self.report = None
        self.surgery_reports = []
        self.saved: Path | None = None
        self.skipped = False
        self._done = 0
        self._length: FitLength | None = None
        self._start = 0.0
        self._last_step = 0
        self._taylor: TaylorAccumulator | None = None
        if self._latency is not None:
            self._latency.forget()
        self._dense: nn.Module | None = None
        self._before: tuple[int, int] = (0, 0)
        self._errors: list[float] = []
        self._rounds: list[Round] = []
        self._times: StepTimes | None = None
        self._measured_step = 0
        self._undo: Callable[[], None] | None = None
        self._module: pl.LightningModule | None = None

    @property
    def state_key(self) -> str:
        """Tells instances apart by their target and moment."""
        return self._generate_state_key(**{self.metric: self.fraction}, moment=str(self.moment), rounds=self.rounds)

    @property
    def plan(self) -> PruningPlan | None:
        """What was removed, in the coordinates of the original model; None before the first removal."""
        return None if self._session is None else self._session.plan or self._session.exported

    @property
    def finished(self) -> bool:
        """Whether the last removal has happened."""
        return self._done >= self.rounds

    # What StructuredSparsity asks

    def options(self, fraction: float) -> dict[str, Any]:
        """Arguments of ``budget.select`` and ``make_plan``: a target and what else the plan must respect.

        Args:
            fraction: of the cost of the dense module; the target is one of what is left of it now.
        """
        session = self._joined()
        assert session.dense is not None and session.structures is not None
        target: dict[str, Any]
        if self._latency is not None:
            table = self._latency.table(session)
            target = {"latency": min(1.0, fraction / table.estimate(session.structures)), "table": table}
        else:
            counts = {**dict.fromkeys(session.dense.counts, 0), **session.structures.counts}  # 0: gone with its layer
            left = kept_fraction(session.dense, counts, self.metric)  # type: ignore[arg-type]
            target = {self.metric: min(1.0, fraction / left)}
        return {**target, **self._limits()}

    def _limits(self) -> dict[str, Any]:
        return {"round_to": self.round_to, "min_units": self.min_units, "per_layer": self.per_layer}

    def unit_costs(self) -> dict[str, float]:
        """What the removal of one unit of each structure saves of the cost that is budgeted."""
        session = self._joined()
        assert session.structures is not None
        if self._latency is not None:
            return self._latency.table(session).unit_seconds(session.structures)
        return unit_costs(session.structures, self.metric)

    def next_position(self, start: float) -> float:
        """Position of the next removal, from 0 (begin of the fit) to 1 (the last), if rounds begin at ``start``."""
        return start + (1 - start) * min(1.0, (self._done + 1) / self.rounds)

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage == "fit":
            self._reset()
        self._module = pl_module
        if stage != "fit":
            # a checkpoint of the small model may be tested with a module that is still dense
            self._undo = before_load(pl_module, lambda checkpoint: self._take_shape(trainer, pl_module, checkpoint))
            return
        session = self._session = CompressionSession.join(pl_module, self)
        session.max_epochs = trainer.max_epochs
        if session.finalizer is not None:
            raise ValueError(
                "Expected one FinalizeCompression in a Trainer, but got two. To remove in several rounds, use "
                "rounds=...: "
                f"FinalizeCompression({self.metric}={self.fraction:g}, {self.moment}, rounds=2)."
            )
        session.finalizer = self
        session.take_shape.append(lambda checkpoint: self._take_shape(trainer, pl_module, checkpoint))
        # steps and epochs that a development run does not reach; a fraction of it comes
        self.skipped = bool(trainer.fast_dev_run) and self.moment.at is None  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the moment of the removal comes in this fit."""
        session = self._joined()
        check_strategy(trainer, pl_module, "FinalizeCompression", removes=True)
        session.processes = Processes.of(trainer)
        session.sharded = is_sharded(pl_module)
        if session.sharded:
            check_finalizer(self, session)
        if self.folder is not None:
            folder = self.folder
            # an occupied folder is better found now than at the end
            session.processes.first("look at the folder for the small model", lambda: check_target(folder))
        session.watch(pl_module)
        take_integers_over(trainer, pl_module)
        if self._latency is not None:
            self._latency.context = trainer.precision_plugin.forward_context
            self._latency.progress = session.bars(trainer)
        self._length = FitLength.of(trainer, session.max_epochs)
        if self.skipped:
            rank_zero_warn(
                f"fast_dev_run: FinalizeCompression({self.moment}) skips the removal and its report, which come later "
                f"than the "
                "end of this run. FinalizeCompression(at=0.6) would remove in it."
            )
            return
        self.moment.check(self._length, "FinalizeCompression", session.processes.count)
        starts = [self.moment.position_of_fraction(c.start, self._length) for c in session.sparsities]
        self._start = min(starts, default=0.0)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discover the structures with the sanity-validation batch, if there was one, and check the budget."""
        if self._joined().ensure_structures(trainer, pl_module):
            self._check_budget(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the fit begins."""
        self._last_step = self._measured_step = trainer.global_step
        session, length = self._joined(), self._length
        if session.sharded and self.finished and length and self.moment.position(trainer, length) < 1 - 1e-9:
            # a longer fit is resumed from the end of another, whose module is as large as before
            self._done, session.exported, self.report = 0, None, None
        if self.wants_report and not self.skipped:
            self._times = StepTimes(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure a training step."""
        if self._times is not None:
            self._times.begin()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read gradients, if they rank the units."""
        session = self._joined()
        if (
            self.finished
            or self.skipped
            or not session.ensure_structures(trainer, pl_module)
            or self.importance != "taylor"
        ):
            return
        assert session.traced is not None and session.structures is not None
        if self._taylor is None:
            self._taylor = TaylorAccumulator(session.traced, session.structures, decay=0.99)
        self._taylor.update()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove, when the moment has come and the optimizer has stepped."""
        self._measure(trainer)
        session = self._joined()
        if self.finished or self.skipped:
            return
        first = session.structures is None or batch_idx == 0
        session.require_structures(trainer, pl_module)
        if first and self._done == 0:
            self._check_budget(trainer, pl_module)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        assert self._length is not None
        position = self.moment.position(trainer, self._length)
        # rounds that fall on the same step, in a very short fit, are one
        due = False
        while not self.finished and position >= self.next_position(self._start) - 1e-9:
            self._done += 1
            due = True
        if due:
            step = trainer.global_step
            session.processes.together("check loss and weights", lambda: check_finite(session, outputs, step))
            self._remove(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the small model, or say so if the fit ended before the removal; complete the report."""
        if self.finished and self.folder is not None and self.saved is None and not self._joined().sharded:
            self._save(self.folder)
        self._complete_report(trainer, pl_module)
        if not self.finished and not self.skipped:
            rank_zero_warn(
                f"The fit ended after {trainer.global_step} optimizer steps, before "
                f"FinalizeCompression({self.moment}) had made "
                f"{'its removal' if self.rounds == 1 else f'all of its {self.rounds} removals'}: the model is not as "
                f"small as asked. "
                "Train longer, remove earlier, or let early stopping begin after the removal."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind when the fit breaks off."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind after the fit."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What has been removed, and what it has been removed from."""
        return {
            "session": None if self._session is None else self._session.state_dict(),
            "done": self._done,
            "before": list(self._before),
            "errors": list(self._errors),
            "rounds": [asdict(r) for r in self._rounds],
            "report": None if self.report is None else self.report.to_json(),
            "latency": None if self._latency is None else self._latency.to_json(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the removals of a checkpoint."""
        if self._session is not None and self._module is not None and state_dict["session"] is not None:
            self._session.load_state_dict(state_dict["session"], self._module)
        self._done = state_dict["done"]
        self._before = tuple(state_dict["before"])
        self._errors = list(state_dict["errors"])
        self._rounds = [Round.from_dict(r) for r in state_dict.get("rounds", ())]
        if self._latency is not None:
            self._latency.load(state_dict.get("latency"))
        self.report = None if state_dict["report"] is None else CompressionReport.from_json(state_dict["report"])

    # What happens in them

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _take_shape(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Make the module, and averaged copies of it, as small as the one whose weights are about to be loaded."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        session = None if state is None else state["session"]
        plans = [] if session is None else plans_from_state(session)
        if session is not None and plans:
            copies = averaged_copies(trainer, pl_module, session["module"])
            for module in (traced_module(pl_module, session["module"]), *(copied.module for copied in copies)):
                take_shape(module, plans)
        check_shapes(pl_module, checkpoint)

    def _leave(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._module = None
        if self._session is not None:
            self._session.close()
        self._dense = None
        self._taylor = None

    def _check_budget(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise ValueError now, not after hours of training, if the target lies below the floors."""
        averaged_copies(trainer, pl_module, self._joined().traced_name)
        structures = self._joined().structures
        assert structures is not None
        if self._joined().version == 0:
            uniform = {s.name: torch.ones(s.units, dtype=torch.float64) for s in structures}
            select(structures, uniform, **self.options(self.fraction))

    def scores(self) -> dict[str, Tensor]:
        """Score of every unit, by which the removal chooses."""
        session = self._joined()
        assert session.traced is not None and session.structures is not None
        if self.importance is None and session.sparsities:
            return session.sparsities[0].sparsifier.scores()
        if self.importance != "taylor":
            scores = unit_scores(session.traced, session.structures, self.importance or "norm")
        elif self._taylor is not None:
            scores = self._taylor.scores()
        else:
            raise ValueError(
                "Expected gradients before the removal for importance='taylor', but there was no optimizer step after "
                "the structures were discovered. Remove later, or use importance='norm'."
            )
        # a unit that has been driven to zero goes first, whatever it was worth when it was not
        norms = unit_norms(session.traced, session.structures)
        return {name: score.masked_fill(norms[name] == 0, 0.0) for name, score in scores.items()}

    def _chosen(self) -> PruningPlan:
        """The plan of the next removal, as process 0 makes it."""
        session = self._joined()
        model, structures, processes = session.traced, session.structures, session.processes
        assert model is not None and structures is not None
        target = ramp(self._done / self.rounds, begin_value=1.0, end_value=self.fraction, shape=self.schedule)
        # functions of the user may communicate, and so they are called in every process
        scores = processes.agreed("score units", self.scores)
        options = self.options(target)

        def choose() -> PruningPlan:
            if self._latency is None or not self.finished:
                return make_plan(model, structures, scores=scores, **options)
            goal, table = self._latency.goal(session, target, self._dense), self._latency.table(session)
            plan, self._latency.met = plan_for_latency(model, structures, goal, table, scores, **self._limits())
            return plan

        with warnings.catch_warnings():
            if not self.finished:
                # nobody asked for the targets in between: how well they are met is no news
                warnings.simplefilter("ignore", BudgetWarning)
            return processes.first(
                "choose units to remove", choose, pack=PruningPlan.to_json, unpack=PruningPlan.from_json
            )

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        session = self._joined()
        assert session.traced is not None and session.example is not None and session.structures is not None
        taken = None if self._times is None else self._times.take()
        for sparsity in session.sparsities:
            sparsity.sparsifier.apply_pending()
        for prepare in session.before_removal:
            prepare()
        if session.version == 0 and not session.sharded:
            self._before = (count_parameters(session.traced), file_size(session.traced) if self.wants_report else 0)
            # process 0 measures for all of them
            if (self.wants_report or self._latency is not None) and self._dense is None and not session.processes.rank:
                with eager(session.traced):
                    self._dense = copy.deepcopy(session.traced)
        if session.sharded:
            done = self._remove_gathered(trainer)
        else:
            done = remove_units(session, trainer, pl_module, self._chosen())
            session.removed(done.plan)
            begin_anew(trainer)
            recompile(pl_module)
        self.surgery_reports.append(done)
        self._errors.append(_error(done))
        left = count_parameters(session.traced)
        self._end_phase(trainer, taken)
        self._rounds.append(
            Round(trainer.global_step, left, session.progress()["macs_kept"], done.seconds, before=taken)
        )
        log_progress(pl_module, session.progress())
        self._taylor = None
        if self.finished and self.wants_report and not session.sharded:
            context = trainer.precision_plugin.forward_context()
            self.report = session.processes.first(
                "report what was removed",
                lambda: self._made_report(session, context, trainer.global_step),
                pack=CompressionReport.to_json,
                unpack=CompressionReport.from_json,
            )
        if self.finished and self.report is not None:
            pl_module.print(str(self.report))
            if self._latency is not None:
                self._latency.check(session, self.report, self.fraction)
            for logger in trainer.loggers:
                logger.log_metrics(self.report.metrics(), step=trainer.global_step)
        if self.finished:
            self._dense = None
        if self._times is not None:
            self._times.discard()

    def _measure(self, trainer: pl.Trainer) -> None:
        """Note how long the training batch took that has just ended."""
        if self._times is None:
            return
        if trainer.fit_loop._skip_backward:  # statistics of batch norms are collected, nothing is trained
            self._times.discard()
        else:
            self._times.end(stepped=trainer.global_step != self._measured_step)
        self._measured_step = trainer.global_step

    def _end_phase(self, trainer: pl.Trainer, taken: Latency | None) -> None:
        """Note and log how long training steps took since the last removal."""
        if taken is None:
            return
        if self._rounds:
            self._rounds[-1] = replace(self._rounds[-1], after=taken)
        for logger in trainer.loggers:
            logger.log_metrics({"compression/seconds_per_step": taken.seconds}, step=trainer.global_step)

    def _complete_report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add to the report how long training steps took after the last removal, and which tokens stay."""
        if self._times is None or self.report is None:
            return
        self._end_phase(trainer, self._times.take())
        pruning = self._joined().token_pruning
        tokens = None if pruning is None else pruning.summary
        report = replace(self.report, rounds=tuple(self._rounds), tokens=tokens)
        # process 0 measures for all of them
        self.report = report = self._joined().processes.first(
            "complete the report",
            lambda: report,
            pack=CompressionReport.to_json,
            unpack=CompressionReport.from_json,
        )
        if text := report.rounds_text():
            pl_module.print(f"Training steps before and after each removal, medians:\n{text}")
        if report.training_speedup is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"compression/training_speedup": report.training_speedup}, step=trainer.global_step)
        if report.tokens is not None:
            log_tokens(trainer, pl_module, report.tokens)

    def _made_report(
        self, session: CompressionSession, context: AbstractContextManager[Any], step: int
    ) -> CompressionReport:
        assert session.traced is not None and session.structures is not None
        return make_report(
            session,
            session.traced,
            session.structures,
            self._dense,
            self._before,
            max(self._errors),
            context,
            step,
            self._rounds,
        )

    def _remove_gathered(self, trainer: pl.Trainer) -> SurgeryReport:
        """Remove from a copy with whole weights, and save it: a sharded module keeps its shape."""
        session = self._joined()
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
        explicit = self.folder is not None
        done = remove_gathered(session, trainer, self._chosen(), folder, explicit, self.wants_report)
        session.exported, self.report, self.saved = done.surgery.plan, done.report, Path(done.folder)
        rank_zero_info(
            f"FinalizeCompression has saved the small model in {done.folder!r}: load_compressed({done.folder!r})."
        )
        return done.surgery

    def _save(self, folder: Path) -> None:
        session = self._joined()
        model = session.traced
        assert model is not None
        session.processes.first("save the small model", lambda: save_compressed(model, folder), pack=lambda _: None)
        self.saved = folder


def _one_target(
    macs: float | None, params: float | None, units: float | None, latency: float | None
) -> tuple[Target, float]:
    given: dict[Target, float] = {}
    for metric, value in (("macs", macs), ("params", params), ("units", units), ("latency", latency)):
        if value is not None:
            given[metric] = value  # type: ignore[index]
    if len(given) != 1:
        raise ValueError(
            f"Expected exactly one target among macs, params, units and latency, but got "
            f"{', '.join(f'{k}={v}' for k, v in given.items()) or 'none'}. "
            "For example: FinalizeCompression(macs=0.4)."
        )
    ((metric, fraction),) = given.items()
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(
            f"Expected {metric}, the fraction that is kept, to be in (0, 1], but got {fraction!r}. To keep 40 %: "
            f"{metric}=0.4."
        )
    return metric, float(fraction)


def _error(report: SurgeryReport) -> float:
    """The larger of the errors on the true and on perturbed weights."""
    return max(report.error or 0.0, report.perturbed_error or 0.0)
