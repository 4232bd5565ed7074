"""One forward pass of the user's model, watched operation by operation.

The mode sees every ATen call with real tensors, so it follows the branch that the model really takes. Compound
operations (linear, einsum, attention) decompose by themselves below it; fused kernels that would not are switched off
for the pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_compress.discovery import axes
from lightning_compress.discovery.axes import PLACE, Axis, AxisMismatch
from lightning_compress.discovery.memory import forgotten
from lightning_compress.discovery.outputs import Output, flatten
from lightning_compress.discovery.rules import Call, NoRule, rule_for
from lightning_compress.discovery.rules.registry import Dims
from lightning_compress.discovery.valueless import StandIns, storage_key, without_values
from lightning_compress.progress import Progress, quiet, steps
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.token_switch import tokens_off

# An input that is not a tensor of the model: its axes belong to the caller.
INPUT = "it is a dimension of the model's input"
OUTPUT = "it is returned by the model"
# In-place operations that change the dimensions of one tensor object, not its elements.
INPLACE_VIEWS = frozenset({"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_"})

OUTSIDE = "it comes from a tensor made outside the traced operations"


@dataclass(frozen=True)
class Member:
    """A parameter or buffer of the traced model and the axes of its dimensions."""

    name: str
    tensor: Tensor
    dims: tuple[Axis | None, ...]
    is_parameter: bool


@dataclass(frozen=True)
class Note:
    """An operation used ``axis`` of the parameter or buffer ``name`` in this role."""

    name: str
    axis: Axis
    role: str


@dataclass(frozen=True)
class Contraction:
    """A product that costs factor * (product of the sizes of axes) multiply-accumulates, in the module that does it."""

    axes: tuple[Axis, ...]
    factor: int
    weight: bool
    module: str = ""


@dataclass(frozen=True)
class Statistics:
    """A module took statistics over ``axis``, which therefore stays whole unless the module can leave units out."""

    axis: Axis
    module: str
    reason: str


@dataclass(frozen=True)
class LookUp:
    """Rows of a table were looked up by ids.

    Args:
        table: name of the parameter.
        axis: its axis of rows.
        ids: storage of the ids if they are an input of the model as it came in, else None.
        reason: why the rows stay whole where ids cannot be given anew.
    """

    table: str
    axis: Axis
    ids: int | None
    reason: str


@dataclass(frozen=True)
class Face:
    """Axes of what a module without sub-modules took and returned in one call."""

    taken: tuple[Axis | None, ...]
    returned: tuple[Axis | None, ...]


class Trace(TorchDispatchMode):
    """Axes of every tensor of one forward pass; see the module docstring.

    Attributes:
        members: parameters and buffers by name; a shared tensor under its first name only.
        notes: roles in which operations used weights.
        contractions: every matrix product and convolution with an activation.
        unknown: operations without a rule -> modules where they happened.
        statistics: normalisations over axes.
        faces: calls of modules without sub-modules, by path.
        look_ups: look-ups of rows by ids.
        step: called at every operation.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], stand_ins: StandIns | None = None) -> None:
        super().__init__()
        self._stand_ins = stand_ins
        self.step: Callable[[], None] = lambda: None
        self.members: dict[str, Member] = {}
        self.notes: list[Note] = []
        self.contractions: list[Contraction] = []
        self.unknown: dict[str, set[str]] = {}
        self.statistics: list[Statistics] = []
        self.faces: dict[str, list[Face]] = {}
        self.look_ups: list[LookUp] = []
        self.modules: list[str] = []
        self._dims: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._sources: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._active: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._serials: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._numbers = count()
        self._made_from: dict[int, list[int]] = {}
        self._used: set[int] = set()
        self._deferred: list[tuple[list[int], Axis, str, tuple[str, ...]]] = []
        self._deferred_statistics: list[tuple[list[int], Statistics]] = []
        self._storages: dict[tuple[int, tuple[int, ...]], Member] = {}
        scripted = {
            id(tensor)
            for module in model.modules()
            if isinstance(module, torch.jit.ScriptModule)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        named = [(True, *item) for item in model.named_parameters()] + [
            (False, *item) for item in model.named_buffers()
        ]
        for is_parameter, name, tensor in named:
            # A floating-point buffer (running statistics, rotary frequencies) or a mask may be sliced along; other
            # buffers are indices. What is scripted can neither be cut nor hooked.
            free = is_parameter or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
            reasons = [] if free else [f"it is a dimension of the buffer {name}"]
            if id(tensor) in scripted:
                reasons.append("it belongs to a scripted module: remove units from the eager one and script it then")
            dims = tuple(None if size == 1 else Axis(size, reasons) for size in tensor.shape)
            member = Member(name, tensor, dims, is_parameter)
            self.members[name] = member
            self._dims[tensor] = list(dims)
            self._sources[tensor] = frozenset([name])
            if tensor.numel():
                self._storages[(storage_key(tensor), tuple(tensor.shape))] = member
        for tensor in inputs:
            self._dims[tensor] = self.pinned(tensor, INPUT)
            self._active[tensor] = True
        self._inputs = {storage_key(tensor) for tensor in inputs}

    # -- what rules ask for ------------------------------------------------------------------------------------------

    def dims(self, tensor: Tensor) -> Dims:
        """Axes of a tensor's dimensions, None for those of size 1; a new list."""
        known = self._dims.get(tensor)
        if known is None:
            # ``.data`` of a parameter is a new tensor on its storage that no operation announces.
            member = self._storages.get((storage_key(tensor), tuple(tensor.shape))) if tensor.numel() else None
            if member is not None and tensor.is_contiguous():
                known = list(member.dims)
                self._sources[tensor] = frozenset([member.name])
            else:
                known = self.pinned(tensor, OUTSIDE)
            self._dims[tensor] = known
        return list(known)

    def sources(self, tensor: Tensor) -> frozenset[str]:
        """Names of the parameters and buffers that alone determine this tensor.

        Empty for an activation or a constant.
        """
        self.dims(tensor)
        return self._sources.get(tensor, frozenset())

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the values of this tensor are known and the same in every call: a literal in the forward."""
        return type(tensor) is Tensor and not tensor.is_meta and tensor not in self._active and not self.sources(tensor)

    def note(self, tensor: Tensor, axis: Axis | None, role: str) -> None:
        """State that the weight behind ``tensor`` uses ``axis`` in this role; nothing for an activation."""
        if axis is not None:
            self.notes.extend(Note(name, axis, role) for name in self.sources(tensor))

    def note_bias(self, tensors: Sequence[Tensor]) -> None:
        """A weight added to an activation helps to make its axes."""
        for tensor in tensors:
            if self.sources(tensor):
                for axis in self.dims(tensor):
                    self.note(tensor, axis, "producer")

    def pin_if_used(self, call: Call, axis: Axis | None, reason: str, *marks: str) -> None:
        """Pin and mark an axis at the end of the pass, unless nothing that the model returns depends on this call.

        Attention weights averaged over the heads, say, are often computed for nobody.
        """
        if axis is not None:
            self._deferred.append(([self._serial(t) for t in call.outputs], axis, reason + PLACE.get(), marks))

    def normalise(self, call: Call, axis: Axis | None, reason: str) -> None:
        """Note that statistics are taken over an axis: positions can go only where the module leaves them out.

        Decided at the end of the pass like ``pin_if_used``.
        """
        if axis is not None:
            module = self.modules[-1] if self.modules else ""
            serials = [self._serial(t) for t in call.outputs]
            self._deferred_statistics.append((serials, Statistics(axis, module, reason + PLACE.get())))

    def look_up(self, table: Tensor, axis: Axis | None, ids: Tensor, reason: str) -> None:
        """Note that rows of ``table`` are looked up; whether some can go is decided when all is known."""
        for name in self.sources(table):
            if axis is not None:
                key = storage_key(ids)
                given = key if key in self._inputs else None
                self.look_ups.append(LookUp(name, axis, given, reason + PLACE.get()))
        axes.mark(axis, "looked up")

    def leave(self, path: str, args: Sequence[Any], output: Any) -> None:
        """Note the axes of the first tensor that a module took and of what it returned."""
        taken = next((value for value in args if isinstance(value, Tensor)), None)
        if taken is not None and isinstance(output, Tensor):
            # under vmap a module sees tensors that no operation has announced
            face = Face(tuple(self._dims.get(taken, ())), tuple(self._dims.get(output, ())))
            self.faces.setdefault(path, []).append(face)

    def finish(self, outputs: Sequence[Output]) -> None:
        """Pin what the caller sees, and what was left to be decided until it is known what the outputs depend on."""
        for output in outputs:
            if not output.internal:
                for axis in self.dims(output.tensor):
                    axes.pin(axis, OUTPUT)
        used = set(self._used)
        queue = [*used, *(self._serial(output.tensor) for output in outputs)]
        while queue:
            serial = queue.pop()
            used.add(serial)
            queue.extend(s for s in self._made_from.pop(serial, ()) if s not in used)
        for serials, axis, reason, marks in self._deferred:
            if used.intersection(serials):
                axes.pin(axis, reason)
                axes.mark(axis, *marks)
        for serials, statistics in self._deferred_statistics:
            if used.intersection(serials):
                axes.mark(statistics.axis, "normalised")
                self.statistics.append(statistics)

    def _serial(self, tensor: Tensor) -> int:
        """A number of its own for every tensor; ids are used again when tensors die."""
        number = self._serials.get(tensor)
        if number is None:
            number = self._serials[tensor] = next(self._numbers)
        return number

    def count(self, factors: Sequence[Axis | None], weight: bool, factor: int = 1) -> None:
        """Count the multiply-accumulates of one contraction."""
        where = self.modules[-1] if self.modules else ""
        known = tuple(axis for axis in factors if axis is not None)
        self.contractions.append(Contraction(known, factor, weight, where))

    def broadcast(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> Dims:
        """Axes of tensors broadcast to ``shape``: those that meet are the same."""
        result: Dims = [None] * len(shape)
        for tensor in tensors:
            dims = self.dims(tensor)
            for i, axis in enumerate(dims, start=len(shape) - len(dims)):
                if result[i] is None:
                    result[i] = axis
                elif axis is not None and axis is not result[i]:
                    axes.unify(result[i], axis)
        return result

    def fresh(self, tensor: Tensor) -> Dims:
        """New free axes."""
        return [None if size == 1 else Axis(size) for size in tensor.shape]

    def pinned(self, tensor: Tensor, reason: str) -> Dims:
        """New axes that stay whole."""
        return [None if size == 1 else Axis(size, (reason,)) for size in tensor.shape]

    # -- the mode ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a stand-in what it is (its device), computes nothing
            return func(*args, **kwargs)
        self.step()
        if self._stand_ins is None:
            call = Call(func, args, kwargs, func(*args, **kwargs))
        else:
            call = Call(func, *self._stand_ins.run(func, args, kwargs))
        where = f" in {self.modules[-1]}" if self.modules and self.modules[-1] else ""
        token = PLACE.set(f" ({call.name}{where})")
        try:
            self._watch(call)
        finally:
            PLACE.reset(token)
        return call.result

    def _watch(self, call: Call) -> None:
        aliases = {id(tensor) for tensor in call.inputs}
        try:
            rule = rule_for(call)
            if rule is not None:
                results = rule(self, call)
            elif not call.inputs:
                results = [self.pinned(output, "it is made of constants") for output in call.outputs]
            else:
                raise NoRule
            self._check(call, results)
            for output, dims in zip(call.outputs, results, strict=True):
                if (
                    id(output) in aliases and call.name not in INPLACE_VIEWS
                ):  # written in place: it is what it was, and what was written
                    for before, after in zip(self.dims(output), dims, strict=True):
                        if before is not after:
                            axes.unify(before, after)
                else:
                    self._dims[output] = [None if axis is None or axis.size == 1 else axis for axis in dims]
        except (NoRule, AxisMismatch, RecursionError) as error:
            if isinstance(error, NoRule):
                self.unknown.setdefault(call.name, set()).add(self.modules[-1] if self.modules else "")
                reason = f"it passes through {call.name}, which has no rule"
            else:
                reason = f"it could not be followed through {call.name}"
            followed = isinstance(error, AxisMismatch) and not any(id(output) in aliases for output in call.outputs)
            for tensor in call.inputs:
                silent = followed and not self.sources(tensor)
                for axis in self.dims(tensor):
                    if silent:  # what comes after reads the width whole: units may go where zeros take their place
                        axes.mark(axis, "summed")
                    elif call.outputs:
                        self.pin_if_used(call, axis, reason)
                    else:
                        axes.pin(axis, reason)
            for output in call.outputs:
                if id(output) not in aliases:
                    self._dims[output] = self.pinned(output, reason)
        self._propagate(call, aliases)
        inputs = [self._serial(tensor) for tensor in call.inputs]
        for output in call.outputs:
            if id(output) in aliases:  # what is written in place may be read through any view of it
                self._used.update(inputs)
            else:
                self._made_from.setdefault(self._serial(output), []).extend(inputs)
        if not call.outputs:  # a number that Python reads
            self._used.update(inputs)

    def _check(self, call: Call, results: list[Dims]) -> None:
        """Our own invariant: a rule describes every output, and sizes agree."""
        if len(results) != len(call.outputs):
            raise AxisMismatch("number of outputs")
        for output, dims in zip(call.outputs, results, strict=True):
            if tuple(1 if axis is None else axis.size for axis in dims) != tuple(output.shape):
                raise AxisMismatch("sizes of an output")

    def _propagate(self, call: Call, aliases: set[int]) -> None:
        active = any(tensor in self._active for tensor in call.inputs)
        sources: frozenset[str] = frozenset()
        if not active:
            sources = frozenset().union(*(self.sources(tensor) for tensor in call.inputs))
        for output in call.outputs:
            if active:
                self._active[output] = True
                if (
                    id(output) in aliases
                    and output in self._sources
                    and not any(output is m.tensor for m in self.members.values())
                ):
                    del self._sources[output]
            elif sources and id(output) not in aliases:
                self._sources[output] = sources


def output_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested outputs: mappings, sequences, dataclasses, plain objects, also cyclic and deep ones."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        value = queue.pop()
        if isinstance(value, Tensor):
            yield value
            continue
        if value is None or isinstance(value, (str, bytes, int, float, complex, nn.Module)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            children: list[Any] = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            children = list(value)
        elif is_dataclass(value) and not isinstance(value, type):
            children = [getattr(value, f.name) for f in fields(value)]
        else:
            children = list(getattr(value, "__dict__", {}).values())
        queue.extend(reversed(children))


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """Switch off fused kernels that would hide their dimensions, for the duration of the pass."""
    fastpath, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # Not mkldnn.flags(): it also sets the TF32 flag, and torch warns of that on machines without the hardware.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.mkldnn.enabled = onednn


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own training flag restored afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def module_paths(model: nn.Module, watched: Trace) -> Iterator[None]:
    """Keep the path of the module that is being called on top of ``watched.modules``."""
    handles = []

    def leave(*_: Any) -> None:  # a hook that returned something would replace the module's output
        watched.modules.pop()

    def leave_leaf(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path = watched.modules.pop()
        watched.leave(path, [*args, *kwargs.values()], output)

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks; its operations are watched all the same
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: watched.modules.append(name)))
        if any(True for _ in module.children()):
            handles.append(module.register_forward_hook(leave, always_call=True))
        else:
            handles.append(module.register_forward_hook(leave_leaf, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Watchers = Sequence[Callable[[Trace], contextlib.AbstractContextManager[Any]]]


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    watch: Watchers = (),
    progress: Progress = quiet,
) -> Trace:
    """Run ``model(*args, **kwargs)`` once in evaluation mode and return what was seen; the model is left as it was.

    Weights and inputs may lack values (meta device, FakeTensorMode); see ``valueless``.

    Args:
        model: any module.
        args: positional arguments.
        kwargs: keyword arguments.
        watch: contexts to be entered around the pass, inside the trace that they are given.
        progress: shows the operations, as many as there will be.
    """
    kwargs = dict(kwargs or {})
    inputs = list(output_tensors((args, kwargs)))
    with without_values(model, inputs) as stand_ins:
        if stand_ins is None:
            return _trace(Trace(model, inputs), model, args, kwargs, watch, progress)
        args, kwargs = tree_map(stand_ins.of, (args, kwargs))
        known = [stand_ins.of(t) for t in inputs]
        return _trace(Trace(model, known, stand_ins), model, args, kwargs, watch, progress)


def _trace(
    watched: Trace,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watch: Watchers,
    progress: Progress,
) -> Trace:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # some modules remember their last call: forgotten after the hooks of module_paths are gone
    with forgotten(model.modules()), torch.random.fork_rng(devices=list(devices)), evaluation(model):
        with (
            module_paths(model, watched),
            torch.no_grad(),
            decomposed(),
            tokens_off(),
            quantization_off(),
            torch.autocast("cpu", enabled=False),
            steps(progress, "operations traced") as watched.step,
            watched,
            contextlib.ExitStack() as more,
        ):
            for watcher in watch:
                more.enter_context(watcher(watched))
            outputs = model(*args, **kwargs)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    watched.finish(list(flatten(outputs).values()))
    return watched


__all__ = ["Contraction", "Member", "Note", "Trace", "decomposed", "evaluation", "output_tensors", "trace"]
