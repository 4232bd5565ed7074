"""QuantizationAwareTraining: a fit in which the model computes with the weights that it will have as integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.callbacks.checkpoint import before_load
from lightning_compress.callbacks.compiled import is_compiled
from lightning_compress.callbacks.moments import FitLength, Moment, batches_done
from lightning_compress.callbacks.plain_copy import is_sharded
from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.quantizer_record import attach_all, inputs_state, quantizers_state
from lightning_compress.callbacks.quantizer_steps import StepLearner
from lightning_compress.callbacks.session import CompressionSession, plainly, traced_module
from lightning_compress.callbacks.strategies import check_strategy
from lightning_compress.quantization import (
    BACKENDS,
    ActivationQuantizer,
    ConversionReport,
    InputQuantizer,
    WeightQuantizer,
    activation_named,
    attach_input_quantizers,
    attach_quantizers,
    convert,
    detach_input_quantizers,
    detach_quantizers,
    input_quantizers,
    select_inputs,
    select_weights,
    weight_kinds,
    weight_quantizers,
)
from lightning_compress.quantization.selection import Modules
from lightning_compress.quantizers import Quantizer, quantizer_named


class QuantizationAwareTraining(Callback):
    r"""Trains a LightningModule that computes with quantized weights, which stay floating point for the optimizer.

    From ``start`` on every forward pass reads :math:`\hat w = Q(w)` in the place of the chosen weights, and gradients
    pass straight through to :math:`w`. In training a part of the elements, drawn at random and growing from ``start``
    to ``full_at``, is quantized and the others are not; stochastic quantizers round at random, until ``nearest_at``.
    Evaluation is always whole and deterministic, as the integers will be that are stored in the end.

    Parameters, their names and the optimizer's groups stay what they are, so that checkpoints, removals by
    `FinalizeCompression`, before or after ``start``, averaged weights and DistributedDataParallel go on as without it.
    Reading ``module.weight`` of a chosen weight gives the quantized tensor; the parameter is in ``named_parameters()``.

    Args:
        weights: quantizer of the weights: a name ("int8" to "int2", "lsq8" to "lsq2", "ternary", "binary") or a
            quantizer, such as ``Stochastic(bits=4, norm="max", scope="row")``.
        modules: which weights: kinds ("attention", "ffn", "channel", "embedding", "head", "other") or patterns of names
            ("encoder.*.query"), or a mapping from them to quantizers. Default: everything that is multiplied with
            activations, so all but tables of embeddings.
        start: fraction of the fit after which weights are quantized, in [0, 1); before, they are trained as they are.
        full_at: fraction of the fit at which all elements are quantized in training. Default: ``start``.
        activations: quantizer of what modules with quantized weights are called with: "int8" to "int2" for the range
            of every call, "lsq8" to "lsq2" for learned steps, or ``ObservedRange(...)``; None leaves activations alone.
        backend: what the module computes with after the fit: "auto", "native", "packed" or "unpacked", see ``convert``,
            which then replaces the weights by their integers. None leaves the floating point weights with their
            quantizers, for a further fit.
        learning_rate: of learned step sizes, relative to them.
        seed: of everything random.
        module: dotted name of the sub-module that is quantized. Default: found from the first step.
        nearest_at: fraction of the fit, at least ``start`` and below 1, from which on stochastic quantizers round in
            training as they do in evaluation, to the nearest level: weights that were trained for the mean of many
            roundings adapt to the one that stays. Default: at random to the end, as in QSGD. Other quantizers do not
            notice.

    Attributes:
        quantizers: what is attached, by names of parameters; empty before ``start``.
        inputs: what is attached to inputs, by paths of modules.
        report: what ``convert`` has returned after the fit; None without a backend.

    Logs ``quantization/mix``, the part of the elements that is quantized, in every step.

    Raises:
        ValueError: for values out of range; at the start of the fit if a moment does not come in it, or for sharded or
            compiled modules; when weights are chosen (``QuantizationError``) if a kind or pattern fits nothing, or a
            weight cannot be quantized, with its name and the reason.

    References: Alistarh et al. 2017, "QSGD"; Esser et al. 2020, "Learned Step Size Quantization"; Stock et al. 2021,
    "Training with Quantization Noise for Extreme Model Compression".
    """

    kinds = None

    def __init__(
        self,
        weights: str | Quantizer | None = "int8",
        modules: Modules = None,
        start: float = 0.0,
        full_at: float | None = None,
        activations: str | ActivationQuantizer | None = None,
        backend: str | None = None,
        learning_rate: float = 2e-3,
        seed: int = 0,
        module: str | None = None,
        nearest_at: float | None = None,
    ) -> None:
        for quantizer in (weights, *(modules.values() if isinstance(modules, Mapping) else ())):
            if quantizer is not None:
                quantizer_named(quantizer)
        if not 0 <= start < 1:
            raise ValueError(f"Expected start, a fraction of the fit, to be in [0, 1), but got {start}.")
        if full_at is not None and not start <= full_at <= 1:
            raise ValueError(
                f"Expected full_at, a fraction of the fit, to be from start={start:g} to 1, but got {full_at}."
            )
        if nearest_at is not None and not start <= nearest_at < 1:
            raise ValueError(
                f"Expected nearest_at, a fraction of the fit, to be from start={start:g} to below 1, but got "
                f"{nearest_at}."
            )
        self.activations = None if activations is None else activation_named(activations)
        if backend not in (None, "auto", *BACKENDS):
            raise ValueError(f"Expected backend to be None or one of {['auto', *BACKENDS]}, but got {backend!r}.")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"Expected learning_rate of step sizes to be above 0, but got {learning_rate}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"Expected seed to be an integer of at least 0, but got {seed!r}.")
        self.weights = weights
        self.modules = modules
        self.start = start
        self.full_at = start if full_at is None else full_at
        self.nearest_at = nearest_at
        self.backend = backend
        self.learning_rate = learning_rate
        self.seed = seed
        self.module = module
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self.quantizers: dict[str, WeightQuantizer] = {}
        self.inputs: dict[str, InputQuantizer] = {}
        self.report: ConversionReport | None = None
        self._learner: StepLearner | None = None
        self._length: FitLength | None = None
        self._at = 0.0
        self._steps = 0
        self._last_step = 0
        self._state: dict[str, Any] | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def state_key(self) -> str:
        """Tells instances apart by their module."""
        return self._generate_state_key(module=self.module)

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage != "fit":
            # a checkpoint of a quantized model may be tested with a module that quantizes nothing yet
            self._undo.append(before_load(pl_module, lambda checkpoint: self._take_state(pl_module, checkpoint)))
            return
        self._reset()
        self._session = CompressionSession.join(pl_module, self)
        if self._session.quantization is not None:
            raise ValueError(
                "Expected one QuantizationAwareTraining in a Trainer, but got two. Give one of them all modules: "
                "modules={'attention': 'int4', 'ffn': 'int8'}."
            )
        self._session.quantization = self

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the moments come in this fit; go on where a checkpoint was written."""
        session = self._joined()
        check_strategy(trainer, pl_module, "QuantizationAwareTraining", removes=False)
        if is_sharded(pl_module):
            raise ValueError(
                "Expected whole parameters for QuantizationAwareTraining, but those of this module are sharded: the "
                "scale of a row is not known where only a part of it is. Use strategy='ddp'."
            )
        if is_compiled(pl_module):
            raise ValueError(
                "Expected a module that is not compiled for QuantizationAwareTraining, because what is compiled keeps "
                f"reading the weights as they are, but {type(pl_module).__name__} is, or a part of it. Compile after "
                "the fit."
            )
        session.processes = Processes.of(trainer)
        session.watch(pl_module)
        self._length = FitLength.of(trainer, session.max_epochs)
        for at in (self.full_at, self.nearest_at):
            if at:
                Moment(at=at).check(self._length, "QuantizationAwareTraining", session.processes.count)
        if self._state is not None:
            self._restore(pl_module, self._state)
            self._state = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the fit stands."""
        session = self._joined()
        session.steps.attach(trainer.optimizers)
        self._steps, self._last_step, self._at = session.steps.count, trainer.global_step, self._progress(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to quantize, when the moment has come; set what holds for this step."""
        session = self._joined()
        session.steps.attach(trainer.optimizers)
        if not self.quantizers and self._at >= self.start - 1e-9:
            self._begin(pl_module)
        mix = self._mix()
        nearest = self.nearest_at is not None and self._at >= self.nearest_at - 1e-9
        for quantizing in self.quantizers.values():
            quantizing.draw, quantizing.mix, quantizing.nearest = batches_done(trainer), mix, nearest
        if self.quantizers:
            pl_module.log("quantization/mix", torch.tensor(mix), on_step=True, on_epoch=False, batch_size=1)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Average the gradients of learned steps over the processes."""
        if self._learner is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._learner.collect(self._joined().processes, scaler.get_scale() if scaler is not None else 1.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move learned steps if the optimizer has stepped."""
        session = self._joined()
        session.ensure_example(pl_module)
        if self._learner is not None:
            if session.steps.count > self._steps:
                self._learner.step(self.learning_rate)
            elif trainer.global_step != self._last_step:
                self._learner.skip()
        self._steps, self._last_step, self._at = session.steps.count, trainer.global_step, self._progress(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if weights were not quantized, or never read."""
        nearest_at = self.nearest_at or 0.0
        if not self.quantizers or self._at < max(self.full_at, nearest_at) - 1e-9:
            nearest = f", to the nearest from {nearest_at:.0%}" if nearest_at else ""
            rank_zero_warn(
                f"The fit ended at {self._at:.0%}, before QuantizationAwareTraining had come to its end (weights "
                f"quantized from {self.start:.0%}, all of them from {self.full_at:.0%}{nearest}). Train longer, or let "
                "early stopping begin after that."
            )
        unread = [name for name, quantizing in self.quantizers.items() if not quantizing.calls]
        if unread:
            rank_zero_warn(
                f"Expected the model to read every quantized weight by its name, but {unread[0]!r} never was "
                f"({len(unread)} such weights): the model computed with it as it is, or not at all. Leave it out of "
                "modules."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module when the fit breaks off."""
        if self.quantizers and self._session is not None and self._session.traced is not None:
            detach_quantizers(self._session.traced)
            detach_input_quantizers(self._session.traced)
        self._leave()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace weights by their integers, if a backend was asked for: checkpoints are written by now."""
        session = self._joined()
        if self.backend is None or not self.quantizers or session.traced is None:
            return
        traced, backend, example = session.traced, self.backend, session.example
        call = None if example is None else (example.args, example.kwargs)
        own: list[ConversionReport] = []

        def first() -> str:
            own.append(convert(traced, backend, call, progress=session.bars(trainer)))
            return own[0].backend

        with plainly(pl_module):
            # one process measures, or they might choose differently
            chosen = session.processes.first("convert quantized weights", first)
            self.report = own[0] if own else convert(traced, chosen)
        rank_zero_info(str(self.report))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module after the fit but the quantizers."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What is attached, and how far it is."""
        session = self._session
        traced = None if session is None else session.traced
        return {
            "module": None if session is None or traced is None else session.traced_name,
            "quantizers": None if traced is None or not self.quantizers else quantizers_state(traced),
            "inputs": None if traced is None or not self.inputs else inputs_state(traced),
            "learner": None if self._learner is None else self._learner.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint was written."""
        self._state = dict(state_dict)

    # What happens in them

    def _begin(self, pl_module: pl.LightningModule) -> None:
        session = self._joined()
        if not session.ensure_example(pl_module):
            return  # the first step shows what is called
        traced, example = session.traced, session.example
        assert traced is not None and example is not None

        def found() -> dict[str, str]:
            progress = session.bars(pl_module.trainer)
            return weight_kinds(traced, example.args, example.kwargs, progress=progress)

        with plainly(pl_module):
            kinds = session.processes.first("find out what weights do", found)
        chosen = select_weights(kinds, self.weights, self.modules)
        existing = weight_quantizers(traced)
        if {name: quantizing.quantizer for name, quantizing in existing.items()} == chosen:
            self.quantizers = existing  # of a fit before
        else:
            self.quantizers = attach_quantizers(traced, chosen, self.seed)
        if self.activations is not None:
            wanted = select_inputs(traced, kinds, chosen, self.activations)
            before = input_quantizers(traced)
            again = {path: quantizing.quantizer for path, quantizing in before.items()} == wanted
            self.inputs = before if again else attach_input_quantizers(traced, wanted)
        self._learner = self._new_learner()
        rank_zero_info(f"QuantizationAwareTraining: {_in_words(chosen)}.")

    def _new_learner(self) -> StepLearner:
        return StepLearner([*self.quantizers.values(), *self.inputs.values()])

    def _mix(self) -> float:
        if self._at >= self.full_at - 1e-9:
            return 1.0
        return max(0.0, self._at - self.start) / max(1e-9, self.full_at - self.start)

    def _progress(self, trainer: pl.Trainer) -> float:
        assert self._length is not None
        return self._length.progress(trainer)

    def _restore(self, pl_module: pl.LightningModule, state: Mapping[str, Any]) -> None:
        session = self._joined()
        if state["quantizers"] is None:
            return
        session.traced_name, session.traced = state["module"], traced_module(pl_module, state["module"])
        self.quantizers, self.inputs = attach_all(session.traced, state)
        self._learner = self._new_learner()
        if state["learner"] is not None:
            self._learner.load_state_dict(state["learner"])

    def _take_state(self, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Outside a fit: attach what the checkpoint tells of."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and state["quantizers"] is not None:
            self.quantizers, self.inputs = attach_all(traced_module(pl_module, state["module"]), state)

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        for quantizing in self.quantizers.values():
            quantizing.mix = 1.0
        if self._session is not None:
            self._session.close()


def _in_words(chosen: Mapping[str, Quantizer]) -> str:
    counts: dict[str, int] = {}
    for quantizer in chosen.values():
        counts[str(quantizer)] = counts.get(str(quantizer), 0) + 1
    return ", ".join(f"{number} weights by {quantizer}" for quantizer, number in counts.items())


__all__ = ["QuantizationAwareTraining"]
