"""TokenPruning: tokens that receive little attention leave the computation, at thresholds learned in the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.checkpoint import before_load
from lightning_compress.callbacks.moments import FitLength, Moment
from lightning_compress.callbacks.plain_copy import is_sharded
from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.session import (
    CompressionSession,
    is_redirected_step,
    log_tokens,
    plainly,
    traced_module,
)
from lightning_compress.callbacks.strategies import check_strategy, unwrapped
from lightning_compress.callbacks.token_budget import Method, TokenMeter
from lightning_compress.callbacks.token_calls import KEPT, RecentCalls, TokenCall
from lightning_compress.callbacks.token_record import TokenSetup, install_state, runtime_state
from lightning_compress.callbacks.token_schedule import PAPER_STRENGTH, WHOLE, Mode, SoftSchedule
from lightning_compress.callbacks.token_settings import check_settings
from lightning_compress.callbacks.token_thresholds import ThresholdLearner
from lightning_compress.callbacks.training_step import with_loss, wrap_training_step
from lightning_compress.report import TokenSummary
from lightning_compress.token_policies import KeepAll, Thresholds, TokenPolicy
from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.distribution import TokenDistribution
from lightning_compress.tokens.forward import SoftPruning, TokenCounts
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.runtime import Fill, TokenRuntime
from lightning_compress.tokens.stack_costs import stack_costs

Stage = Literal["before", "soft", "hard"]
LATE = 0.9  # part of the hard stage after which the budget is looked at once more, before the end


class TokenPruning(Callback):
    r"""Takes tokens out of the computation, layer by layer: those that receive too little attention.

    After the attention of a layer every token has a score, the attention that it received, relative to the tokens that
    may leave (`scores_among_rest`; as published relative to all that are there); those below the threshold of the layer
    skip the rest of it and do not enter the next one. The thresholds are learned beside the weights in the *soft* stage
    of the fit, in which tokens are masked in part,

    .. math:: M_l = M_{l-1}\,\sigma\bigl((s_l - \theta_l)/T\bigr), \quad
        \theta_l = \theta_l^0 + c_l (p_l + q)

    with an annealed temperature T in units of the spread :math:`c_l` of the scores of the layer. The loss moves
    :math:`p`; a controller moves the common shift q, so that the expected relative multiply-accumulates of the layers
    at real lengths come down to the target. At ``hard_at`` the thresholds are shifted together so that hard
    decisions meet the target, and the *hard* stage begins: thresholds are fixed, tokens leave, and the weights recover.
    Evaluation is always hard. After the fit the LightningModule computes with the tokens that stay.

    Args:
        macs: multiply-accumulates of the layers at real lengths, relative to all tokens, in (0, 1]; or
        strength: fixed weight :math:`\lambda` of :math:`\lambda \sum_l \operatorname{mean}(M_l)` in the loss, as
            published. One of both; as published they go together: trained with ``strength`` (0.1 unless given),
            calibrated to ``macs``.
        method: "learned"; or, hard from ``start`` and calibrated to ``macs``: "top_k", shares of the tokens that fall
            from layer to layer; "linear", thresholds that grow linearly with the layer.
        mode: "recommended", as above; or "faithful", the published schedule: one temperature, masks that are not
            cumulative and multiply the output of their layer, thresholds that begin as a ramp, learning rate decaying.
        start: fraction of the fit after which tokens are pruned. Default: after the last removal of a
            `FinalizeCompression` beside it, else 0.
        hard_at: fraction of the fit at which the hard stage begins, in (start, 1]. Default: two thirds of what is left
            after ``start``.
        learning_rate: of the thresholds, in units of the spread of their layer's scores. Default: 0.002, or more
            without ``macs``; "faithful": 2e-5 of scores that sum to one over 128 tokens.
        temperature: first and last temperature, in the same units. Default: (1, 0.1); "faithful": 0.128 of the mean
            score.
        protected: positions of tokens that always stay. Default: the first, and single ones that are read behind the
            layers.
        protected_mask: key under which batches, mappings then, have a bool mask (batch, tokens) of tokens that always
            stay.
        min_keep: so many tokens of an example stay at least.
        fill: what tokens that left have behind the layers: "state", that with which they left; "mean", the mean of the
            tokens that are left. Default: "mean" where nothing but the mean over all tokens is read, as in models of
            sentence embeddings, else "state".
        module: dotted name of the sub-module whose tokens are pruned. Default: found from the first step.

    Attributes:
        policy: which tokens stay; None before ``start``.
        relative_macs: what hard decisions left when it was last measured, on the last batches of training.
        kept_per_layer: fraction of the tokens that entered each layer then.
        distribution: the same for every example; None before it is measured.
        summary: the same as a record for reports and pictures, together with structures that were removed in the fit.
            It is printed when the fit ends, with the report of a `FinalizeCompression` if there is one.

    Logs ``token_pruning/macs``, ``token_pruning/temperature`` and ``token_pruning/threshold_l`` in every step, and the
    headline numbers of the summary when the fit ends.

    Raises:
        ValueError: for contradicting arguments or values out of range; at the start of the fit if a moment does not
            come in it, tokens would be pruned before the last removal of structures, or under manual optimization; at
            the first batch (``TokenPruningError``) if tokens cannot leave the module, with the layer and the reason.

    References: Kim et al. 2022, "Learned Token Pruning for Transformers"; Wang et al. 2021, "SpAtten".
    """

    kinds = None

    def __init__(
        self,
        macs: float | None = None,
        strength: float | None = None,
        method: Method = "learned",
        mode: Mode = "recommended",
        start: float | None = None,
        hard_at: float | None = None,
        learning_rate: float | None = None,
        temperature: tuple[float, float] | None = None,
        protected: Sequence[int] | None = None,
        protected_mask: str | None = None,
        min_keep: int = 1,
        fill: Fill | None = None,
        module: str | None = None,
    ) -> None:
        check_settings(macs, strength, method, mode, start, hard_at, learning_rate, temperature, min_keep, fill)
        self.macs = macs
        self.strength = PAPER_STRENGTH if strength is None and mode == "faithful" else strength
        self.method = method
        self.mode: Mode = mode
        self.start = start
        self.hard_at = hard_at
        self.protected = None if protected is None else tuple(protected)
        self.protected_mask = protected_mask
        self.min_keep = min_keep
        self.fill = fill
        self.module = module
        self.schedule = SoftSchedule(mode, temperature, learning_rate)
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self.distribution: TokenDistribution | None = None
        self._stage: Stage = "before"
        self._setup: TokenSetup | None = None
        self._proven_at = -1
        self._dense: LayerCosts | None = None
        self._runtime: TokenRuntime | None = None
        self._learner: ThresholdLearner | None = None
        self._calls = RecentCalls()
        self._checks = 0
        self._length: FitLength | None = None
        self._start = 0.0
        self._hard_at = 1.0
        self._at = 0.0
        self._last_step = 0
        self._steps = 0
        self._state: dict[str, Any] | None = None
        self._module: pl.LightningModule | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def stage(self) -> Stage:
        """Where the fit stands: "before", "soft" or "hard"."""
        return self._stage

    @property
    def policy(self) -> TokenPolicy | None:
        """Which tokens stay; None before any is pruned."""
        return None if self._runtime is None else self._runtime.policy

    @property
    def relative_macs(self) -> float | None:
        """Relative multiply-accumulates of the layers, as last measured; None before."""
        return None if self.distribution is None else self.distribution.relative_macs

    @property
    def kept_per_layer(self) -> tuple[float, ...] | None:
        """Fraction of the tokens that entered each layer, as last measured; None before."""
        return None if self.distribution is None else self.distribution.kept_per_layer

    @property
    def summary(self) -> TokenSummary | None:
        """What hard decisions left when it was last measured, as a record for reports; None before."""
        if self.distribution is None or self.policy is None:
            return None
        dense = None if self._dense == self.distribution.costs else self._dense
        return TokenSummary.of(self.distribution, self.policy, dense)

    @property
    def state_key(self) -> str:
        """Tells instances apart by their target and method."""
        return self._generate_state_key(
            macs=self.macs, strength=self.strength, method=self.method, mode=self.mode, module=self.module
        )

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage != "fit":
            # a checkpoint of a pruned model may be tested with a module that prunes nothing yet
            self._undo.append(before_load(pl_module, lambda checkpoint: self._take_runtime(pl_module, checkpoint)))
            return
        self._reset()
        self._module = pl_module
        self._session = CompressionSession.join(pl_module, self)
        if self._session.token_pruning is not None:
            raise ValueError(
                "Expected one TokenPruning in a Trainer, but got two: tokens leave a module by one policy. Leave one "
                "of them out."
            )
        self._session.token_pruning = self

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the stages come in this fit, after every removal of structures."""
        session = self._joined()
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"Expected automatic optimization for TokenPruning, but {type(pl_module).__name__} optimizes manually: "
                "its step calls backward itself, so that nothing can be added to its loss from outside."
            )
        check_strategy(trainer, pl_module, "TokenPruning", removes=False)
        if is_sharded(pl_module):
            raise ValueError(
                "Expected whole parameters for TokenPruning, but those of this module are sharded: process 0 alone "
                "proves that tokens can leave. Use strategy='ddp'."
            )
        session.processes = Processes.of(trainer)
        session.watch(pl_module)
        self._length = FitLength.of(trainer, session.max_epochs)
        self._plan_stages(trainer)
        if self._state is not None:
            self._restore(pl_module, self._state)
            self._state = None

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prove with the sanity-validation batch, if there was one, that tokens can leave."""
        self._prove(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the wrapper around ``training_step``."""
        session = self._joined()
        session.steps.attach(trainer.optimizers)
        self._steps, self._last_step, self._at = session.steps.count, trainer.global_step, self._progress(trainer)
        self._undo.append(wrap_training_step(pl_module, "TokenPruning", partial(self._step, pl_module)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to prune, when the moment has come; set what holds for this step."""
        self._joined().steps.attach(trainer.optimizers)
        if self._stage == "before" and self._due(self._start) and self._removed():
            self._prove(pl_module)  # in a resumed fit; otherwise it is known
            if self._setup is not None:
                self._begin(trainer, pl_module)
        if self._runtime is not None and self._learner is not None and self._stage == "soft":
            position = self._position()
            self._runtime.soft = SoftPruning(
                self._learner.thresholds,
                self.schedule.temperature_at(position) * self._learner.scales,
                self.schedule.straight_through_at(position),
                cumulative=self.mode == "recommended",
                among_rest=self.schedule.among_rest,
            )
        self._protect(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Average the gradients of the thresholds over the processes."""
        if self._stage == "soft" and self._learner is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._learner.collect(self._joined().processes, scaler.get_scale() if scaler is not None else 1.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the thresholds if the optimizer has stepped, and go on to the next stage when its moment has come."""
        session = self._joined()
        self._unprotect()
        if self._setup is None:
            self._prove(pl_module)
            if self._setup is None:
                raise ValueError(self._no_call(pl_module))
        if self._stage == "soft" and self._learner is not None and self._runtime is not None:
            if session.steps.count > self._steps:
                rate = self.schedule.learning_rate_at(self._position(), self._soft_steps(), self.strength is None)
                self._learner.step(rate)
                self._runtime.policy = Thresholds(self._learner.values, self.schedule.among_rest)
            elif trainer.global_step != self._last_step:
                self._learner.skip()
        self._steps = session.steps.count
        at = self._progress(trainer)
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if not stepped and at < 1:
            return
        self._at = at
        if self._stage == "soft" and self._due(self._hard_at):
            self._harden(trainer, pl_module)
        elif self._stage == "hard" and self._checks < len(self._moments()) and self._due(self._moments()[self._checks]):
            self._check_budget(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the fit ended before its stages, and what tokens stay, unless a report says it."""
        if self._stage != "hard" or self._checks < len(self._moments()):
            rank_zero_warn(
                f"The fit ended at {self._at:.0%}, before TokenPruning had come to the end of its stages "
                f"(tokens from {self._start:.0%}, thresholds fixed at {self._hard_at:.0%}): "
                + (
                    "thresholds are not calibrated to the budget."
                    if self._stage != "hard"
                    else f"the budget was last looked at before that, at {self.relative_macs or math.nan:.3f}."
                )
                + " Train longer, or let early stopping begin after hard_at."
            )
        finalizer, summary = self._joined().finalizer, self.summary
        reported = finalizer is not None and finalizer.wants_report and finalizer.report is not None
        if summary is not None and not reported:
            log_tokens(trainer, pl_module, summary)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell which tokens of the batch are protected."""
        self._protect(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module when the fit breaks off."""
        if self._stage == "soft" and self._session is not None and self._session.traced is not None:
            remove_tokens(self._session.traced)
            self._runtime = None
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module after the fit but the runtime."""
        self._unprotect()
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Where the stages stand."""
        session, learner = self._session, self._learner
        traced = None if session is None else session.traced
        soon = self._length is not None and self._window(2 * KEPT)
        return {
            "module": None if session is None or traced is None else session.traced_name,
            "stage": self._stage,
            "runtime": runtime_state(traced, self._setup) if self._runtime and traced and self._setup else None,
            "learner": None if learner is None else learner.state_dict(),
            "calls": self._calls.state() if soon else [],
            "checks": self._checks,
            "distribution": None if self.distribution is None else self.distribution.state(),
            "dense": None if self._dense is None else asdict(self._dense),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint was written."""
        self._state = dict(state_dict)

    # Stages

    def _plan_stages(self, trainer: pl.Trainer) -> None:
        session, length = self._joined(), self._length
        assert length is not None
        finalizer = session.finalizer
        removal = 0.0
        if finalizer is not None and not finalizer.skipped:
            whole = finalizer.moment.position_of_fraction(1.0, length)
            removal = 1 / whole if whole > 0 else 0.0  # nan if the length is not known
            if self.start is not None and self.start < removal - 1e-9:
                raise ValueError(
                    f"Expected tokens to be pruned after the last removal of structures, but got "
                    f"TokenPruning(start={self.start:g}) and FinalizeCompression({finalizer.moment}), which is at "
                    f"{removal:.2f} of the fit. Set start to at least that, or leave it out."
                )
        self._start = removal if self.start is None else self.start
        self._hard_at = self._start + 2 / 3 * (1 - self._start) if self.hard_at is None else self.hard_at
        if math.isnan(self._start) or self._hard_at > 0:
            Moment(at=1.0 if math.isnan(self._hard_at) else self._hard_at).check(
                length, "TokenPruning", session.processes.count
            )
        if self._hard_at <= self._start:
            raise ValueError(
                f"Expected the thresholds to be fixed after tokens begin to be pruned, but got hard_at="
                f"{self._hard_at:g} and a start at {self._start:g} of the fit. Set hard_at between {self._start:g} and "
                "1, or leave it out."
            )

    def _moments(self) -> tuple[float, ...]:
        """When the budget is looked at in the hard stage."""
        first = () if self.method == "learned" else (self._hard_at,)
        return (*first, *((self._hard_at + LATE * (1 - self._hard_at), 1.0) if self._hard_at < 1 else ()))

    def _next_moment(self) -> float:
        """When calls are needed next, as a fraction of the fit."""
        if self._stage == "hard":
            moments = self._moments()
            return moments[self._checks] if self._checks < len(moments) else math.inf
        return self._start if self._stage == "before" else self._hard_at

    def _window(self, batches: int) -> bool:
        """Whether the next moment lies within so many batches."""
        assert self._length is not None
        length = self._length
        total = min(
            length.batches, length.max_steps * max(1.0, length.batches_per_epoch / (length.steps_per_epoch or 1))
        )
        return (self._next_moment() - self._at) * total <= batches + 0.5

    def _progress(self, trainer: pl.Trainer) -> float:
        assert self._length is not None
        return self._length.progress(trainer)

    def _due(self, moment: float) -> bool:
        return self._at >= moment - 1e-9

    def _removed(self) -> bool:
        finalizer = self._joined().finalizer
        return finalizer is None or finalizer.skipped or finalizer.finished

    def _position(self) -> float:
        """Position in the soft stage."""
        return (self._at - self._start) / (self._hard_at - self._start)

    def _soft_steps(self) -> float:
        assert self._length is not None
        return (self._hard_at - self._start) * self._length.steps

    def _prove(self, pl_module: pl.LightningModule) -> None:
        """Find the layers, and prove that tokens can leave them, as soon as a call has been seen."""
        session = self._joined()
        if self._setup is not None or not session.ensure_example(pl_module):
            return
        traced, example = session.traced, session.example
        assert traced is not None and example is not None

        def proven() -> TokenSetup:
            progress = session.bars(pl_module.trainer)
            found = prove_tokens(traced, example.args, example.kwargs, self.protected, progress=progress)
            protected = self.protected
            if protected is None:
                protected = tuple(sorted({0, *(found.read or ())}))
            costs = stack_costs(traced, example.args, example.kwargs, found.stack)
            return TokenSetup(found.stack, protected, found.scatter, costs, self.fill or found.fill)

        # the proof holds the weights in float64 for a while, after which a reducer no longer hears of their gradients
        with plainly(pl_module), unwrapped(pl_module.trainer, pl_module):
            self._setup = session.processes.first("prove that tokens can leave", proven)
        self._proven_at = session.version
        if session.version == 0:
            self._dense = self._setup.costs

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        session = self._joined()
        if self._proven_at != session.version:  # structures have gone, and perhaps whole layers
            self._setup = None
            self._prove(pl_module)
        assert self._setup is not None and session.traced is not None
        decisions = len(self._setup.stack.layers) - 1
        setup = self._setup
        self._runtime = install_tokens(
            session.traced,
            TokenRuntime(setup.stack, KeepAll(), setup.protected, self.min_keep, setup.scatter, fill=setup.fill),
        )
        if self.method == "learned":
            values, scales = self._meter(trainer).first_thresholds(self.schedule, decisions, self.macs)
            self._learner = ThresholdLearner(values, pl_module.device, scales)
            self._runtime.policy = Thresholds(self._learner.values, self.schedule.among_rest)
        self._stage = "soft" if self.method == "learned" else "hard"
        self._runtime.train_mode = "soft" if self._stage == "soft" else "gather"
        if self._stage == "hard":
            self._calibrate(trainer, pl_module)

    def _measured_calls(self) -> list[TokenCall]:
        session = self._joined()
        return list(self._calls) or ([TokenCall(session.batch)] if session.batch is not None else [])

    def _harden(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate the thresholds and fix them; from now on tokens leave in training, too."""
        runtime, learner = self._runtime, self._learner
        assert runtime is not None and learner is not None
        runtime.policy = Thresholds(learner.values, self.schedule.among_rest)
        self._stage = "hard"
        runtime.train_mode, runtime.soft = "gather", None
        self._calibrate(trainer, pl_module)

    def _check_budget(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure again; weights have moved, and the decisions with them."""
        while self._checks < len(self._moments()) and self._due(self._moments()[self._checks]):
            self._checks += 1
        self._calibrate(trainer, pl_module)

    def _meter(self, trainer: pl.Trainer) -> TokenMeter:
        session, runtime, setup = self._joined(), self._runtime, self._setup
        assert runtime is not None and session.traced is not None and setup is not None
        context = trainer.precision_plugin.forward_context
        return TokenMeter(session.traced, runtime, self._measured_calls(), setup.costs, session.processes, context)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the policy, and meet the budget if it is missed by more than 1 %."""
        meter, runtime = self._meter(trainer), self._runtime
        if not self._window(2 * KEPT):
            self._calls.clear()
        if not meter.calls:
            return
        assert runtime is not None
        scales = None if self._learner is None else self._learner.scales.tolist()
        self.distribution = meter.calibrated(runtime.policy, self.method, self.macs, scales)

    # Steps

    def _step(self, pl_module: pl.LightningModule, call: Callable[[], Any]) -> Any:
        """A training step, with the budget in its loss."""
        runtime = self._runtime
        session = self._joined()
        if session.traced is None:
            return call()
        with self._listening(pl_module, session.traced) as seen:
            result = call()
        if runtime is None or not seen or result is None:
            return result
        costs = self._setup.costs if self._setup is not None else None
        assert costs is not None
        soft = self._stage == "soft"
        cost = _relative_macs(costs, seen)
        values = {"token_pruning/macs": cost.detach()}
        if soft:
            position = self._position()
            result = with_loss(result, lambda loss: loss + self._term(cost, seen, position))
            values["token_pruning/temperature"] = torch.tensor(self.schedule.temperature_at(position))
        policy = runtime.policy
        if isinstance(policy, Thresholds):
            values.update(
                (f"token_pruning/threshold_{n}", torch.tensor(v)) for n, v in enumerate(policy.values) if v > WHOLE / 2
            )
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        return result

    def _term(self, cost: Tensor, seen: Sequence[TokenCounts], position: float) -> Tensor:
        learner = self._learner
        assert learner is not None
        if self.strength is None:
            assert self.macs is not None
            learner.budget(cost, self.schedule.target_at(position, self.macs))
            return cost.new_zeros(())
        terms = []
        for counts in seen:
            real = counts.present[0][1]
            if self.mode == "faithful":
                # padding counts, as published; the first mask is constant
                terms.append(sum((mask.mean() for mask in counts.masks[1:]), torch.zeros(())))
            else:
                weight = torch.ones_like(counts.masks[0]) if real is None else real.to(counts.masks[0].dtype)
                terms.append(torch.stack([(mask * weight).sum() / weight.sum() for mask in counts.masks]).sum())
        return self.strength * torch.stack(terms).mean()

    @contextmanager
    def _listening(self, pl_module: pl.LightningModule, traced: nn.Module) -> Iterator[list[TokenCounts]]:
        """Collect what each call of the traced module in a training step did, and its arguments if they are needed."""
        seen: list[TokenCounts] = []
        keep = self._window(KEPT)

        def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if keep and torch.is_grad_enabled() and not is_redirected_step(module, pl_module):
                mask = None if self._runtime is None else self._runtime.protected_mask
                self._calls.add(args, kwargs, mask)

        def counts(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found = None if self._runtime is None else self._runtime.counts
            if found is not None and torch.is_grad_enabled() and not is_redirected_step(module, pl_module):
                seen.append(found)

        handles = [
            traced.register_forward_pre_hook(arguments, with_kwargs=True),
            traced.register_forward_hook(counts),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _protect(self, batch: Any) -> None:
        """Hand the mask of protected tokens to the runtime."""
        if self._runtime is None or self.protected_mask is None:
            return
        if not isinstance(batch, Mapping) or not isinstance(batch.get(self.protected_mask), Tensor):
            keys = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"Expected batches with a tensor under {self.protected_mask!r}, the protected_mask of TokenPruning, "
                f"but got {keys}. Add a bool mask (batch, tokens) to the batch, or leave protected_mask out."
            )
        self._runtime.protected_mask = batch[self.protected_mask]

    def _unprotect(self) -> None:
        if self._runtime is not None:
            self._runtime.protected_mask = None

    # Checkpoints

    def _restore(self, pl_module: pl.LightningModule, state: Mapping[str, Any]) -> None:
        session = self._joined()
        self._stage, self._checks = state["stage"], state["checks"]
        if state.get("dense") is not None:
            self._dense = LayerCosts(**{name: tuple(values) for name, values in state["dense"].items()})
        if state["module"] is None:
            return
        self._calls.load(state["calls"], pl_module.device)
        if state["runtime"] is None:
            for kept in self._calls:  # tokens may have to leave in the next step: what that needs is found out with one
                session.take_call(pl_module, state["module"], kept.call)
            return
        session.traced_name, session.traced = state["module"], traced_module(pl_module, state["module"])
        self._runtime, self._setup = install_state(session.traced, state["runtime"])
        self._proven_at = session.version
        if state["learner"] is not None:
            self._learner = ThresholdLearner.from_state(state["learner"], pl_module.device)
        self._runtime.train_mode = "soft" if self._stage == "soft" else "gather"
        if state["distribution"] is not None:
            self.distribution = TokenDistribution(**state["distribution"], costs=self._setup.costs)

    def _take_runtime(self, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Outside a fit: install what the checkpoint tells of."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and state["runtime"] is not None:
            self._runtime, self._setup = install_state(traced_module(pl_module, state["module"]), state["runtime"])

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._calls.clear()
        if self._runtime is not None:
            self._runtime.soft = None
            if self._stage == "soft":
                self._runtime.train_mode = "gather"
        if self._session is not None:
            self._session.close()
        self._module = None

    def _no_call(self, pl_module: pl.LightningModule) -> str:
        names = [n for n, m in pl_module.named_children() if any(True for _ in m.parameters())]
        return (
            f"Expected a step of {type(pl_module).__name__} to call "
            f"{self._joined().traced_name or 'itself or one of its sub-modules'} (module(inputs), not "
            f"module.forward(inputs)), but no call was seen. Name the module that is called, for example "
            f"module={names[0] if names else 'model'!r}; its sub-modules are {names}."
        )


def _relative_macs(costs: LayerCosts, seen: Sequence[TokenCounts]) -> Tensor:
    return costs.relative(torch.cat([c.entering for c in seen], 1), torch.cat([c.real for c in seen]))


__all__ = ["TokenPruning"]
