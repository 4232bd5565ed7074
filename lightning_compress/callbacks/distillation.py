"""Distillation: the model as it was teaches the model that it becomes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.compiled import eager, is_compiled
from lightning_compress.callbacks.moments import FitLength
from lightning_compress.callbacks.plain_copy import is_sharded
from lightning_compress.callbacks.session import CompressionSession, is_redirected_step, traced_module
from lightning_compress.callbacks.training_step import with_loss, wrap_training_step
from lightning_compress.distillation_losses import logits_kl, output_mse
from lightning_compress.quantization import detach_input_quantizers, detach_quantizers
from lightning_compress.tokens.install import remove_tokens, token_runtime


@dataclass
class _Recording:
    """Calls of modules during a step: (arguments, keyword arguments, output) per call; outputs of blocks by name."""

    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = field(default_factory=dict)
    blocks: dict[str, list[Tensor]] = field(default_factory=dict)


class Distillation(Callback):
    r"""Adds a teacher's answers to the loss of the LightningModule, which stays as it is.

    .. math:: L = (1 - \alpha) L_{\text{task}} + \alpha\, T^2\, \mathrm{KL}(\text{teacher} \Vert \text{student})
        + \beta \, \frac1B \sum_{b} \mathrm{mean}\,(h_b - h_b^{\text{teacher}})^2

    The teacher is a copy of the traced module, made when `StructuredSparsity` begins (or, without one, before the first
    removal), in evaluation mode. In every training step it is called with exactly the arguments with which the step
    called the traced module. It is no part of the LightningModule: not of its parameters, its checkpoints or its
    optimizers. ``training_step`` is wrapped for the time of the fit, and given back after it.

    Args:
        alpha: weight of the teacher's outputs, in [0, 1].
        temperature: T > 0, for ``loss="kl"``.
        hidden: weight :math:`\beta \ge 0` of hidden states: outputs of the repeated blocks, the members of every
            outermost ``torch.nn.ModuleList`` of the traced module, as far as they have one shape in student and teacher
            (the residual stream).
        loss: "kl" for logits, with the classes in the last dim; "mse" for regression.
        outputs: function from what the traced module returns to the tensor to compare. Default: the tensor itself, or
            ``logits`` of a mapping or object.
        teacher: a module to use instead of the copy, called with the same arguments.
        module: dotted name of the sub-module whose outputs are distilled, as for the other callbacks.

    Logs ``distillation_loss``, the sum of all terms but the task's.

    Raises:
        ValueError: for numbers out of range; at the start of the fit under manual optimization, or if nothing says when
            to copy a teacher; in a step, if the outputs cannot be compared.

    References: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network"; Romero et al. 2015,
    "FitNets".
    """

    kinds = None

    def __init__(
        self,
        alpha: float = 0.5,
        temperature: float = 2.0,
        hidden: float = 0.0,
        loss: Literal["kl", "mse"] = "kl",
        outputs: Callable[[Any], Tensor] | None = None,
        teacher: nn.Module | None = None,
        module: str | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"Expected alpha, the weight of the teacher's outputs, to be in [0, 1], but got {alpha}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"Expected temperature to be above 0, but got {temperature}.")
        if not 0 <= hidden < math.inf:
            raise ValueError(f"Expected hidden, the weight of hidden states, to be at least 0, but got {hidden}.")
        if loss not in ("kl", "mse"):
            raise ValueError(f"Expected loss to be 'kl' or 'mse', but got {loss!r}.")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"Expected teacher to be a torch.nn.Module, but got {type(teacher).__name__}.")
        self.alpha = alpha
        self.temperature = temperature
        self.hidden = hidden
        self.loss: Literal["kl", "mse"] = loss
        self.outputs = outputs
        self.module = module
        self._given = teacher
        self._session: CompressionSession | None = None
        self._reset()

    def _reset(self) -> None:
        self._teacher: nn.Module | None = None
        self._length: FitLength | None = None
        self._start: float | None = None
        self._due = False
        self._unwrap: Callable[[], None] | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher during a fit; None before it is copied and after the fit."""
        return self._teacher

    @property
    def state_key(self) -> str:
        """Tells instances apart by the module and the loss."""
        return self._generate_state_key(loss=self.loss, module=self.module)

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the other compression callbacks of this fit."""
        if stage != "fit":
            return
        self._reset()
        self._session = CompressionSession.join(pl_module, self)
        self._session.max_epochs = trainer.max_epochs
        self._session.before_removal.append(self._take_teacher)
        self._session.before_shape.append(lambda checkpoint: self._restore(pl_module, checkpoint))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there will be a teacher, and a loss to add it to."""
        session = self._joined()
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"Expected automatic optimization for Distillation, but {type(pl_module).__name__} optimizes "
                f"manually: its step calls "
                "backward itself, so that nothing can be added to its loss from outside. Add the term in "
                "training_step: "
                "loss + alpha * lightning_compress.logits_kl(logits, teacher_logits)."
            )
        if self._given is None and is_sharded(pl_module):
            raise ValueError(
                "Expected a teacher for Distillation beside a sharded module, which cannot be copied as it is, but got "
                "none. Pass a trained module, whole or sharded by yourself: Distillation(teacher=...)."
            )
        inside = [n for n, m in session.candidates(pl_module).items() if vars(m).get("_compiled_call_impl") is not None]
        if getattr(pl_module, "_compiler_ctx", None) is not None or inside:
            what = f"{inside[0]}.compile()" if inside else f"torch.compile({type(pl_module).__name__})"
            raise ValueError(
                f"Expected the call of the student not to be inside of what is compiled for Distillation, but got "
                f"{what}, where it cannot be seen. Compile the model inside the LightningModule by self.model = "
                "torch.compile(self.model), whose calls can."
            )
        if self.hidden and is_compiled(pl_module):
            raise ValueError(
                f"Expected Distillation(hidden={self.hidden:g}) of a model that is not compiled: hidden states inside "
                "of what is compiled cannot be seen. Set hidden=0.0, or train without torch.compile."
            )
        session.watch(pl_module)
        self._length = FitLength.of(trainer, session.max_epochs)
        if self._given is not None:
            self._start = 0.0
        elif session.sparsities:
            self._start = min(c.start for c in session.sparsities)
        elif session.finalizer is None and session.quantization is not None:
            self._start = session.quantization.start
        elif session.finalizer is None:
            raise ValueError(
                "Expected a StructuredSparsity, FinalizeCompression or QuantizationAwareTraining beside Distillation, "
                "which says when the teacher is copied, but "
                "the Trainer has none. Add one, or pass a trained module: Distillation(teacher=...)."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the wrapper around ``training_step``."""
        if self._given is not None:
            self._teacher = self._given.to(pl_module.device).eval()
        elif self._teacher is not None:
            self._teacher.to(pl_module.device)  # from a checkpoint
        self._unwrap = wrap_training_step(pl_module, "Distillation", partial(self._step, pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the teacher, before the first step that is going to be followed by a shrinkage."""
        if self._teacher is None and self._start is not None:
            assert self._length is not None
            # with a fit of unknown length only a start of 0 gets here
            self._due = self._start == 0 or self._length.progress(trainer) >= self._start
            if self._due and self._joined().traced is not None:
                self._take_teacher()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module when the fit breaks off."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module after the fit."""
        if stage == "fit":
            self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Weights of a teacher that was copied; a given one is for the user to keep."""
        copied = self._teacher is not None and self._given is None
        return {
            "module": None if self._session is None else self._session.traced_name,
            "teacher": self._teacher.state_dict() if copied and self._teacher is not None else None,
        }

    # What happens in them

    def _joined(self) -> CompressionSession:
        assert self._session is not None, "setup has not been called"
        return self._session

    def _leave(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None
        self._teacher = None
        if self._session is not None:
            self._session.close()

    def _restore(self, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Copy the module, dense as it still is, and give the copy the teacher's weights."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and state["teacher"] is not None:
            self._teacher = _copied(traced_module(pl_module, state["module"]))
            self._teacher.load_state_dict(state["teacher"])

    def _take_teacher(self) -> None:
        """Copy the traced module as it is now, unless there is a teacher already."""
        traced = self._joined().traced
        if self._teacher is None and traced is not None:
            self._teacher = _copied(traced)

    def _step(self, pl_module: pl.LightningModule, call: Callable[[], Any]) -> Any:
        """A training step, with the teacher's terms in its loss."""
        if self._teacher is None and not self._due:
            return call()
        with self._recording(pl_module) as recording:
            result = call()
        # after the very first step, and not before, it is known which module is called; its weights have not moved yet
        self._joined().resolve(pl_module)
        self._take_teacher()
        if result is None or self._teacher is None:
            return result
        return self._mixed(pl_module, result, recording)

    @contextmanager
    def _recording(self, pl_module: pl.LightningModule) -> Iterator[_Recording]:
        """Record the calls of the module to be traced and, for hidden states, of its blocks."""
        session = self._joined()
        recording = _Recording()
        handles = []

        def record(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if torch.is_grad_enabled() and not is_redirected_step(module, pl_module):
                    recording.calls.setdefault(name, []).append((args, kwargs, output))

            return hook

        for name, module in session.candidates(pl_module).items():
            handles.append(module.register_forward_hook(record(name), with_kwargs=True))
        if self.hidden and session.traced is not None:
            handles += _record_blocks(session.traced, recording.blocks)
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()

    def _mixed(self, pl_module: pl.LightningModule, result: Any, recording: _Recording) -> Any:
        session = self._joined()
        calls = recording.calls.get(session.traced_name, [])
        if not calls:
            return result  # this step did not call the module
        assert self._teacher is not None and session.traced is not None
        if self.hidden and not block_names(session.traced):
            raise ValueError(
                f"Expected repeated blocks, members of a torch.nn.ModuleList, in {type(session.traced).__name__} for "
                f"hidden above 0, "
                "but there are none. Set hidden=0.0."
            )
        hidden: dict[str, list[Tensor]] = {}
        # a step in which the module was not known yet has no hidden states of the student
        handles = _record_blocks(self._teacher, hidden) if self.hidden and recording.blocks else []
        try:
            with torch.no_grad():
                answers = [self._teacher(*args, **kwargs) for args, kwargs, _ in calls]
        finally:
            for handle in handles:
                handle.remove()
        terms = [self._output_loss(output, answer) for (_, _, output), answer in zip(calls, answers, strict=True)]
        added = self.alpha * torch.stack(terms).mean()
        if handles:
            runtime = token_runtime(session.traced)
            tokens = {} if runtime is None else runtime.places_after_layers()
            added = added + self.hidden * _hidden_loss(recording.blocks, hidden, self._kept_widths(), tokens)
        pl_module.log("distillation_loss", added.detach(), on_step=True, on_epoch=False, batch_size=1)
        return with_loss(result, lambda loss: (1 - self.alpha) * loss + added)

    def _kept_widths(self) -> dict[tuple[int, int], Tensor]:
        """(width before, width now) of what norms run over -> positions that stay, for widths that lost some."""
        plan = self._joined().plan
        widths = {}
        for structure in () if plan is None else plan.structures:
            kept = plan.kept[structure.name]  # type: ignore[union-attr]
            if structure.norms and len(kept) < structure.units:
                widths[structure.units, len(kept)] = torch.tensor(kept)
        return widths

    def _output_loss(self, student: Any, teacher: Any) -> Tensor:
        own, other = self._compared(student), self._compared(teacher)
        return logits_kl(own, other, self.temperature) if self.loss == "kl" else output_mse(own, other)

    def _compared(self, output: Any) -> Tensor:
        chosen: Any
        if self.outputs is not None:
            chosen = self.outputs(output)
        elif isinstance(output, Mapping):
            chosen = output.get("logits")
        else:
            chosen = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(chosen, Tensor):
            raise ValueError(
                f"Expected the traced module {self._joined().traced_name or 'itself'!r} to return a tensor or an "
                f"object with logits, but "
                f"got {type(output).__name__}. Say which tensor is distilled: Distillation(outputs=lambda output: "
                f"output[0])."
            )
        return chosen


def _copied(module: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, without what the fit has put around the module."""
    with eager(module):
        teacher = copy.deepcopy(module)
    for name in ("training_step", "on_load_checkpoint"):
        vars(teacher).pop(name, None)
    remove_tokens(teacher)  # the teacher sees all tokens
    detach_quantizers(teacher)
    detach_input_quantizers(teacher)
    for parameter in teacher.parameters():
        parameter.grad = None
    return teacher.requires_grad_(False).eval()


def block_names(model: nn.Module) -> list[str]:
    """Names of the members of every outermost ``torch.nn.ModuleList``: the repeated blocks of a deep model."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [n for n in lists if not any(n != other and n.startswith(f"{other}.") for other in lists)]
    return [f"{n}.{child}" if n else child for n in outer for child, _ in model.get_submodule(n).named_children()]


def _record_blocks(model: nn.Module, states: dict[str, list[Tensor]]) -> list[Any]:
    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if tensors:
                states.setdefault(name, []).append(tensors[0])

        return hook

    return [model.get_submodule(name).register_forward_hook(record(name)) for name in block_names(model)]


def _hidden_loss(
    student: Mapping[str, list[Tensor]],
    teacher: Mapping[str, list[Tensor]],
    kept: Mapping[tuple[int, int], Tensor],
    tokens: Mapping[str, list[tuple[Tensor | None, Tensor | None]]],
) -> Tensor:
    """Mean over blocks of the mean squared difference of their outputs.

    At the positions, and for the tokens, that the student still has.
    """
    terms = []
    for name, states in student.items():
        places = tokens.get(name, [])
        for number, (own, other) in enumerate(zip(states, teacher.get(name, []), strict=False)):
            positions = kept.get((other.shape[-1], own.shape[-1])) if own.dim() else None
            if positions is not None:
                other = other.index_select(-1, positions.to(other.device))
            index, shown = places[number] if len(places) == len(states) else (None, None)
            if index is not None and own.shape[:2] == index.shape and own.dim() == other.dim() == 3:
                other = other.gather(1, index.unsqueeze(-1).expand(-1, -1, other.shape[2]))
                if shown is not None:
                    own, other = own[shown], other[shown]
            if own.shape == other.shape and own.is_floating_point():
                terms.append(output_mse(own, other))
    if not terms:
        raise ValueError(
            f"Expected repeated blocks with outputs of one shape in student and teacher for hidden above 0, but none "
            f"of "
            f"{list(student)} matches {list(teacher)}. Set hidden=0.0."
        )
    return torch.stack(terms).mean()
