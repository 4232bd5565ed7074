"""What the callbacks of one fit share: the traced module, an example of its call, its structures, the plan so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_compress.analysis import discover
from lightning_compress.budget import kept_fraction
from lightning_compress.callbacks.bars import bars
from lightning_compress.callbacks.checkpoint import (
    before_load,
    plans_from_state,
    plans_state,
    structures_from_state,
    structures_state,
)
from lightning_compress.callbacks.compiled import eager, uncompiled_calls
from lightning_compress.callbacks.example import ExampleCall, smallest_example, undisturbed
from lightning_compress.callbacks.optimizer_steps import OptimizerSteps
from lightning_compress.callbacks.plain_copy import plain_copy, reshard
from lightning_compress.callbacks.processes import Processes, check_silent
from lightning_compress.callbacks.strategies import unwrapped
from lightning_compress.plan import PruningPlan
from lightning_compress.progress import Progress
from lightning_compress.report import TokenSummary
from lightning_compress.structures import KINDS, Structures, check_kinds
from lightning_compress.surgery.guards import check_plain

if TYPE_CHECKING:
    from lightning_compress.callbacks.finalize_compression import FinalizeCompression
    from lightning_compress.callbacks.quantization_aware_training import QuantizationAwareTraining
    from lightning_compress.callbacks.structured_sparsity import StructuredSparsity
    from lightning_compress.callbacks.token_pruning import TokenPruning

DEFAULT_KINDS = ("head", "ffn")


class Participant(Protocol):
    """A callback that takes part in a session."""

    @property
    def module(self) -> str | None:
        """Dotted name of the module to compress, None to find it."""

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """Kinds of structures that it asks for."""


class CompressionSession:
    """Shared by `StructuredSparsity`, `FinalizeCompression` and `Distillation` during one fit of one LightningModule.

    It watches the first sanity-validation or training step to learn which module is called and with what, traces that
    call, and keeps the structures up to date when units are removed. In a distributed fit every process has an example
    of its own; the structures are those of process 0.

    Attributes:
        traced: the module that is compressed; None until its first call has been seen.
        traced_name: its dotted name in the LightningModule, "" for the LightningModule itself.
        batch: the first call of the traced module, all of the batch.
        example: the same narrowed to a few examples if the module accepts that; what structures are traced and verified
            with.
        structures: structures of the traced module as it is now; None until they are discovered.
        dense: the structures as they were before anything was removed.
        plan: everything removed so far, in the coordinates of the original model; None before the first removal.
        plans: the same removal by removal, each in the coordinates of the model before it.
        version: number of removals so far; what was derived from ``structures`` is out of date when it changes.
        steps: real steps of the optimizers, and the learning rates they were taken with.
        processes: the processes of the fit.
        sharded: whether parameters are sharded over them. Then a removal happens to a copy, not to the module.
        exported: what was removed from the copy; None before.
        max_epochs: those of the Trainer when the fit was set up.
        shows_progress: whether bars are shown where the Trainer shows one.
    """

    _sessions: ClassVar[WeakKeyDictionary[pl.LightningModule, CompressionSession]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.module_name: str | None = None
        self.traced: nn.Module | None = None
        self.traced_name = ""
        self.batch: ExampleCall | None = None
        self.example: ExampleCall | None = None
        self.structures: Structures | None = None
        self.dense: Structures | None = None
        self.plan: PruningPlan | None = None
        self.plans: list[PruningPlan] = []
        self.dense_state: dict[str, Any] | None = None
        self.version = 0
        self.steps = OptimizerSteps()
        self.processes = Processes()
        self.sharded = False
        self.exported: PruningPlan | None = None
        self.max_epochs: int | None = None
        self.shows_progress = True
        self.sparsities: list[StructuredSparsity] = []
        self.finalizer: FinalizeCompression | None = None
        self.token_pruning: TokenPruning | None = None
        self.quantization: QuantizationAwareTraining | None = None
        self.before_removal: list[Callable[[], None]] = []
        # what happens with a checkpoint before its weights are loaded: first to the dense module, then to its shape
        self.before_shape: list[Callable[[Mapping[str, Any]], None]] = []
        self.take_shape: list[Callable[[Mapping[str, Any]], None]] = []
        self._undo: Callable[[], None] | None = None
        self._kinds: dict[str, None] = {}
        self._members: list[object] = []
        self._hooks: list[Any] = []
        self._uncompiled = ExitStack()
        self._calls: dict[str, ExampleCall] = {}
        self._closed = False

    # Membership

    @classmethod
    def join(cls, pl_module: pl.LightningModule, callback: Participant) -> CompressionSession:
        """The session of the fit of ``pl_module`` that is being set up, with ``callback`` in it.

        Raises:
            ValueError: if the callbacks of a fit name different modules.
        """
        session = cls._sessions.get(pl_module)
        if session is None or session._closed or callback in session._members:
            session = cls._sessions[pl_module] = CompressionSession()
            session._undo = before_load(pl_module, session._prepare)
        if callback.module is not None:
            if session.module_name not in (None, callback.module):
                raise ValueError(
                    f"Expected the compression callbacks of a Trainer to name one module, but got "
                    f"{session.module_name!r} and "
                    f"{callback.module!r}. Give all of them the same module=..., or give it to one of them only."
                )
            session.module_name = callback.module
            session.traced_name = callback.module
            # what configure_model makes is not there yet
            if not is_overridden("configure_model", pl_module):
                session.traced = _named_module(pl_module, callback.module)
        session._members.append(callback)
        session._kinds.update(dict.fromkeys(check_kinds(callback.kinds) if callback.kinds is not None else ()))
        return session

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of structures that the callbacks of this fit ask for, in the order of ``KINDS``."""
        wanted = self._kinds or dict.fromkeys(DEFAULT_KINDS)
        return tuple(k for k in KINDS if k in wanted)

    def bars(self, trainer: pl.Trainer) -> Progress:
        """What wraps iterables for a progress bar, where the Trainer shows one."""
        return bars(trainer, self.shows_progress)

    def close(self) -> None:
        """Let go of hooks, models and examples; the structures and the plan stay for whoever asks after the fit."""
        self._closed = True
        self._unwatch()
        if self._undo is not None:
            self._undo()
            self._undo = None
        self.steps.detach()
        self.batch = self.example = None
        self._calls.clear()

    # The first call

    def watch(self, pl_module: pl.LightningModule) -> None:
        """Look out for the first call of the module to be traced."""
        if self.batch is not None or self._hooks:
            return
        if self.module_name is not None and self.traced is None:
            self.traced = _named_module(pl_module, self.module_name)
        self._uncompiled = uncompiled_calls(pl_module)
        candidates = self.candidates(pl_module)
        plain = {n: m for n, m in candidates.items() if not isinstance(m, torch.jit.ScriptModule)}
        for module in [] if plain else candidates.values():
            check_plain(module)  # takes no hook, and says what to do
        for name, module in plain.items():
            # first of all hooks: it is the call that is repeated, and others (casts, masks) will happen to it again
            self._hooks.append(
                module.register_forward_pre_hook(self._recorder(pl_module, name), prepend=True, with_kwargs=True)
            )

    @property
    def watching(self) -> bool:
        """Whether the first call is still looked out for."""
        return bool(self._hooks)

    def candidates(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        """Modules that may be the traced one: the one named or found, else the LightningModule and its children."""
        if self.traced is not None:
            # of a compiled one the wrapper, whose hooks are outside of what was compiled
            return {self.traced_name: pl_module.get_submodule(self.traced_name)}
        modules: dict[str, nn.Module] = {}
        if is_overridden("forward", pl_module):
            modules[""] = pl_module
        modules.update((n, m) for n, m in pl_module.named_children() if any(True for _ in m.parameters()))
        return modules

    def _recorder(self, pl_module: pl.LightningModule, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in self._calls and not is_redirected_step(module, pl_module):
                self._calls[name] = ExampleCall.copied(args, kwargs)

        return record

    def take_call(self, pl_module: pl.LightningModule, name: str, call: ExampleCall) -> None:
        """A call of the module ``name`` that a checkpoint holds, unless one has been seen."""
        if self.batch is None and name not in self._calls:
            self.traced_name, self.traced = name, traced_module(pl_module, name)
            self._calls[name] = call

    def _unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._uncompiled.close()

    def resolve(self, pl_module: pl.LightningModule) -> bool:
        """Decide, after a step, which module is traced; False while none has been called."""
        if self.batch is not None:
            return True
        if not self._calls:
            return False
        if self.traced is None:
            called = {n: m for n, m in self.candidates(pl_module).items() if n in self._calls}
            # the whole if it is called; else the largest part, the first of equals
            name = "" if "" in called else max(called, key=lambda n: sum(p.numel() for p in called[n].parameters()))
            others = [n for n in called if n != name]
            if name and others:
                rank_zero_warn(
                    f"The compression callbacks trace the sub-module {name!r}, the largest that "
                    f"{type(pl_module).__name__} calls "
                    f"in a step; {others} are left whole. To compress another one, name it: module={others[0]!r}; to "
                    f"compress "
                    f"them together, call them through {type(pl_module).__name__}.forward."
                )
            self.traced_name, self.traced = name, called[name]
        # a compiled module computes what its original computes, and it is the original that can be taken apart
        self.traced = getattr(self.traced, "_orig_mod", self.traced)
        assert isinstance(self.traced, nn.Module)
        self.batch = self._calls[self.traced_name]
        self._unwatch()
        self._calls.clear()
        return True

    # Structures

    def ensure_example(self, pl_module: pl.LightningModule) -> bool:
        """Narrow the first call to an example, as soon as one has been seen; False until then."""
        if self.example is not None:
            return True
        if not self._resolved_everywhere(pl_module):
            return False
        traced, batch = self.traced, self.batch
        assert traced is not None and batch is not None
        with plainly(pl_module), eager(traced):
            self.example = self.processes.together(
                "call the module that is traced", lambda: self._narrowed(traced, batch)
            )
        return True

    def ensure_structures(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Discover the structures as soon as a call has been seen; False until then.

        Raises:
            ValueError: if nothing in the traced module can be removed.
        """
        if self.sharded:
            return self._ensure_gathered(pl_module)
        if not self.ensure_example(pl_module):
            return False
        if self.structures is not None:
            return True  # found already, or known from a checkpoint
        traced, example = self.traced, self.example
        assert traced is not None and example is not None
        # the proof holds weights in float64 for a while, after which a reducer no longer hears of their gradients
        with plainly(pl_module), eager(traced), unwrapped(trainer, pl_module):
            self.structures = self.dense = self.processes.first(
                "discover structures",
                lambda: self._discovered(traced, example, pl_module),
                pack=lambda structures: structures_state(traced, structures),
                unpack=structures_from_state,
            )
        self.dense_state = structures_state(traced, self.dense)
        return True

    def _ensure_gathered(self, pl_module: pl.LightningModule) -> bool:
        if self.structures is not None and self.example is not None:
            return True
        if not self._resolved_everywhere(pl_module):
            return False
        traced, batch = self.traced, self.batch
        assert traced is not None and batch is not None
        self._discover_gathered(traced, batch, pl_module)
        return True

    def _discover_gathered(self, traced: nn.Module, batch: ExampleCall, pl_module: pl.LightningModule) -> None:
        """Discover the structures in a copy with whole weights, which only process 0 has, and only for now."""
        self.example = batch.on_cpu()
        if self.structures is not None:
            return  # known from a checkpoint
        processes = self.processes
        with torch.inference_mode(False), torch.autocast(pl_module.device.type, enabled=False):
            copy = processes.together("gather the weights", lambda: plain_copy(traced, keep=processes.rank == 0))

            def discovered() -> Structures:
                assert copy is not None and self.example is not None
                self.example = self._narrowed(copy, self.example)
                return self._discovered(copy, self.example, pl_module)

            self.structures = self.dense = processes.first(
                "discover structures",
                discovered,
                pack=lambda structures: structures_state(traced, structures),
                unpack=structures_from_state,
            )
        self.dense_state = structures_state(traced, self.dense)

    def _narrowed(self, traced: nn.Module, batch: ExampleCall) -> ExampleCall:
        if self.processes.count > 1:
            with undisturbed(traced):
                check_silent(traced, batch.args, batch.kwargs)
        return smallest_example(traced, batch)

    def _discovered(self, traced: nn.Module, example: ExampleCall, pl_module: pl.LightningModule) -> Structures:
        with undisturbed(traced):
            structures = discover(
                traced,
                example.args,
                example.kwargs,
                kinds=self.kinds,
                prove=True,
                progress=self.bars(pl_module.trainer),
            )
        if not len(structures):
            raise ValueError(self._nothing_prunable(structures, pl_module))
        return structures

    def _resolved_everywhere(self, pl_module: pl.LightningModule) -> bool:
        """Whether all processes know which module is traced, and an example of its call."""
        own = self.traced_name if self.resolve(pl_module) else None
        names = self.processes.gather("see which module is called", own)
        if None in names:
            return False
        if len(set(names)) > 1:
            raise ValueError(
                f"Expected all processes to trace one sub-module of {type(pl_module).__name__}, but by their first "
                f"steps it is {names}, process by process. Name it: module={names[0]!r}."
            )
        return True

    # Checkpoints

    def _prepare(self, checkpoint: Mapping[str, Any]) -> None:
        for prepare in (*self.before_shape, *self.take_shape):
            prepare(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit cannot find out: the structures of the dense model, and what has been removed from it."""
        return {
            "module": self.traced_name if self.traced is not None else None,
            "dense": self.dense_state,
            "plan": None if self.plan is None else self.plan.to_json(),
            "plans": plans_state(self.plans),
            "version": self.version,
            "exported": None if self.exported is None else self.exported.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
        """Continue where ``state_dict`` was taken; the module has the shape of that moment already."""
        if state["dense"] is None:
            return
        self.traced_name, self.traced = state["module"], traced_module(pl_module, state["module"])
        self.dense_state = state["dense"]
        self.dense = self.structures = structures_from_state(state["dense"])
        self.version = state["version"]
        exported = state.get("exported")
        self.exported = None if exported is None else PruningPlan.from_json(exported)
        self.plan, self.plans = None, []
        for plan in plans_from_state(state):
            self._follow(plan)

    def require_structures(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Structures:
        """The structures, once the first training batch is over.

        Raises:
            ValueError: if no module has been called, or nothing in it can be removed.
        """
        if not self.ensure_structures(trainer, pl_module):
            names = [n for n, m in pl_module.named_children() if any(True for _ in m.parameters())]
            raise ValueError(
                f"Expected a step of {type(pl_module).__name__} to call "
                f"{self.traced_name or 'itself or one of its sub-modules'} "
                f"(module(inputs), not module.forward(inputs)), but no call was seen. Name the module that is called, "
                f"for "
                f"example module={names[0] if names else 'model'!r}; its sub-modules are {names}."
            )
        assert self.structures is not None
        return self.structures

    def _nothing_prunable(self, structures: Structures, pl_module: pl.LightningModule) -> str:
        where = self.traced_name or type(pl_module).__name__
        message = f"Expected structures of kinds {self.kinds} in {where!r}, but found none that can be removed."
        if structures.pinned:
            reasons = [
                f"  {p.name} ({p.units} units): {' '.join(p.reasons) or 'no reason recorded'}"
                for p in structures.pinned[:8]
            ]
            more = len(structures.pinned) - len(reasons)
            message += "\nPinned:\n" + "\n".join(reasons) + (f"\n  and {more} more" if more > 0 else "")
        return f"{message}\nChoose other kinds, or name another part of the module: module=..."

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the traced module by every name they have there."""
        assert self.traced is not None
        if self.sharded:
            reshard(self.traced)
        return dict(self.traced.named_parameters(remove_duplicate=False))

    def removed(self, plan: PruningPlan) -> None:
        """Note that ``plan``, in the coordinates of the module as it was until now, has been applied."""
        self._follow(plan)
        self.version += 1

    def _follow(self, plan: PruningPlan) -> None:
        assert self.structures is not None
        self.structures = plan.shrunk(self.structures)
        self.plan = plan if self.plan is None else self.plan.compose(plan)
        self.plans.append(plan)

    def progress(self) -> dict[str, float]:
        """Part of the units that is zero or removed, and what is left of the prunable MACs without them."""
        assert self.dense is not None and self.structures is not None
        alive = {**dict.fromkeys(self.dense.counts, 0), **self.structures.counts}
        for sparsity in self.sparsities:
            for name, count in sparsity.sparsifier.alive().items():
                alive[name] = min(alive[name], count)
        if self.exported is not None:
            alive.update({name: len(kept) for name, kept in self.exported.kept.items()})
        units = sum(self.dense.counts.values())
        return {"sparsity": 1.0 - sum(alive.values()) / units, "macs_kept": kept_fraction(self.dense, alive, "macs")}


@contextmanager
def plainly(pl_module: pl.LightningModule) -> Iterator[None]:
    """Outside of what the Trainer puts around a step: weights are looked at as they are stored.

    Autocast would hide them behind casts.
    """
    with torch.inference_mode(False), torch.autocast(pl_module.device.type, enabled=False):
        yield


def log_progress(pl_module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Log numbers to the progress bar and the loggers, as of this step."""
    for name, value in values.items():
        pl_module.log(name, value, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)


def log_tokens(trainer: pl.Trainer, pl_module: pl.LightningModule, tokens: TokenSummary) -> None:
    """Print what token pruning leaves, and give its headline numbers to the loggers."""
    pl_module.print(str(tokens))
    for logger in trainer.loggers:
        logger.log_metrics(tokens.metrics(), step=trainer.global_step)


def traced_module(pl_module: nn.Module, name: str) -> nn.Module:
    """The sub-module of this name; of a compiled one the original, which can be taken apart."""
    module = pl_module.get_submodule(name)
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def is_redirected_step(module: nn.Module, pl_module: pl.LightningModule) -> bool:
    """Whether this call of the LightningModule is a step that a distributed strategy sends through ``forward``."""
    return module is pl_module and getattr(module.forward, "__name__", "") == "wrapped_forward"


def _named_module(pl_module: pl.LightningModule, name: str) -> nn.Module:
    if not isinstance(name, str):
        raise TypeError(f"Expected module to be the dotted name of a sub-module, but got {type(name).__name__}.")
    modules = dict(pl_module.named_modules())
    if name not in modules:
        close = get_close_matches(name, list(modules), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected module to be the dotted name of a sub-module of {type(pl_module).__name__}, but got {name!r}; "
            f"it has "
            f"{[n for n, _ in pl_module.named_children()]}.{hint}"
        )
    return modules[name]
