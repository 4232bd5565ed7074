"""Layers that can be passed by: modules that return what they were given plus what they add to it.

A layer is a module of a container whose output, of the shape and type of its input, is reached from that input without
a product with a weight (the residual path), and that does such products on the way. What else it returns must be inputs
again, or None: then passing it by leaves the model defined.

    class Layer:  x -> x + f(x)          passed by:  x -> x
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_compress.discovery.tracer import Trace
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import ModuleEdit, Passage, Pinned, Structure, is_inside

KIND = "layer"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

# Operations behind which nothing of their input is left as it was.
PRODUCTS = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot", "vdot", "_grouped_mm"),
        *("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable", "cudnn_convolution"),
    }
)
_FORMS: tuple[tuple[type, str], ...] = ((tuple, "tuple"), (list, "list"), (dict, "dict"))


@dataclass
class Calls:
    """What was seen of a module: how often it was called, and what passing it by means, or why that is unknown."""

    count: int = 0
    residual: bool = False
    passage: Passage | None = None
    reason: str = ""


@dataclass
class _Open:
    """A call that has not returned."""

    number: int
    inputs: dict[int | str, Any]
    versions: dict[int | str, int] = field(default_factory=dict)


class ResidualPaths(TorchDispatchMode):
    """Follows, beside a trace, the inputs of every module that may be a layer until they meet a product.

    Args:
        modules: modules to watch by path.

    Attributes:
        calls: path -> what was seen.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules = dict(modules)
        self.calls: dict[str, Calls] = {}
        self._open: dict[str, list[_Open]] = {}
        self._alive: set[int] = set()
        self._numbers = 0
        # tensor -> inputs of open calls, as (number of the call, position or name), that reach it
        self._reached: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._handles: list[Any] = []

    def __enter__(self) -> ResidualPaths:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after(path), with_kwargs=True, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._alive or str(func._schema.name).split("::")[-1] in PRODUCTS:
            return result
        reached = [self._reached.get(t, frozenset()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        tokens = frozenset(token for tokens in reached for token in tokens if token[0] in self._alive)
        if tokens:
            for output in tree_leaves(result):
                if isinstance(output, Tensor):
                    self._reached[output] = tokens | self._reached.get(output, frozenset())
        return result

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._numbers += 1
            inputs: dict[int | str, Any] = dict(enumerate(args))
            inputs.update(kwargs)
            call = _Open(self._numbers, inputs)
            self._open.setdefault(path, []).append(call)
            self._alive.add(call.number)
            for key, value in call.inputs.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    call.versions[key] = value._version
                    self._reached[value] = self._reached.get(value, frozenset()) | {(call.number, key)}

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            call = self._open[path].pop()
            seen = self.calls.setdefault(path, Calls())
            seen.count += 1
            seen.residual, seen.passage, seen.reason = self._passage(call, output)
            self._alive.discard(call.number)

        return hook

    def _passage(self, call: _Open, output: Any) -> tuple[bool, Passage | None, str]:
        """Whether there is a residual path, how the module is passed by, and why that cannot be."""
        form = next((name for kind, name in _FORMS if isinstance(output, kind)), "tensor")
        values = list(output.values()) if form == "dict" else list(output) if form != "tensor" else [output]
        keys = tuple(output) if form == "dict" else ()
        exact = form == "tensor" or any(type(output) is kind for kind, _ in _FORMS)
        items: list[int | str | None] = []
        residual, reason = False, ""
        for number, value in enumerate(values):
            key, is_residual = self._source(call, value)
            residual = residual or is_residual
            if value is not None and key is None:
                reason = reason or f"item {number} of what it returns is neither an input of its nor a layer's output"
            items.append(key)
        if not exact:
            reason = f"it returns a {type(output).__name__}"
        if not all(isinstance(key, str) for key in keys):
            reason = "it returns a dict whose keys are no strings"
        passage = Passage(form, tuple(items), keys) if residual and not reason else None  # type: ignore[arg-type]
        return residual, passage, reason

    def _source(self, call: _Open, value: Any) -> tuple[int | str | None, bool]:
        """The input that takes the place of one item of the output, and whether a residual path leads there."""
        if value is None or isinstance(value, bool | int | float | str):
            return None, False
        for key, given in call.inputs.items():
            if value is given:
                changed = isinstance(value, Tensor) and key in call.versions and value._version != call.versions[key]
                return key, changed
        if isinstance(value, Tensor):
            tokens = self._reached.get(value, frozenset())
            for key, given in call.inputs.items():
                alike = isinstance(given, Tensor) and (given.shape, given.dtype) == (value.shape, value.dtype)
                if alike and (call.number, key) in tokens:
                    return key, True
        return None, False


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may be layers: with parameters and modules of their own, one of several in a container."""
    modules = dict(model.named_modules())
    return {path: module for path, module in modules.items() if path and _may_be_layer(path, module, modules)}


def _may_be_layer(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    import torch

    if isinstance(module, torch.jit.ScriptModule) or not any(True for _ in module.children()):
        return False
    if not any(True for _ in module.parameters()) or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    parent = modules[path.rpartition(".")[0]]
    return isinstance(parent, CONTAINERS) or sum(type(m) is type(module) for m in parent.children()) > 1


def find_layers(model: nn.Module, trace: Trace, paths: ResidualPaths) -> tuple[list[Structure], list[Pinned]]:
    """The layers of ``model``, each a structure of one unit, and those that must stay.

    Where stacks lie inside each other the outermost one of look-alike layers counts.
    """
    modules = dict(model.named_modules())
    working = {c.module for c in trace.contractions if c.weight}
    layers = [
        path
        for path, calls in paths.calls.items()
        if calls.residual and any(is_inside(inner, path) for inner in working)
    ]
    chosen = _stacks(layers, modules)
    owners: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name)
    reasons: dict[str, str] = {}
    for path in chosen:
        reason = _reason(path, paths.calls[path], owners, model)
        if reason:
            reasons[path] = reason
    found: list[Structure] = []
    stacks: dict[str, list[str]] = {}
    for path in chosen:
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    for container, members in stacks.items():
        free = [path for path in members if path not in reasons]
        children = modules[container].named_children()
        names = {
            f"{container}.{name}" if container else name for name, m in children if any(True for _ in m.parameters())
        }
        others = len(names - set(free))
        if len(free) + others < 2:
            reasons.update(dict.fromkeys(free, "it is the only layer of its stack, and one must stay"))
            continue
        size = Polynomial.constant(others)
        for path in free:
            size += Polynomial.variable(f"{path}.{KIND}")
        numbers = _numbers(modules[container])
        for path in free:
            passage = paths.calls[path].passage
            edit = ModuleEdit(path, "skip", passage, numbers)
            found.append(Structure(f"{path}.{KIND}", KIND, 1, (), (size,), edits=(edit,), floor=0, members=(path,)))
    pinned = [
        Pinned(
            f"{path}.{KIND}",
            KIND,
            1,
            tuple(f"{path}.{name}" for name, _ in modules[path].named_parameters()),
            (reason,),
        )
        for path, reason in reasons.items()
    ]
    return found, pinned


def _stacks(layers: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Of layers inside layers the outermost stack of look-alikes; single ones where no stack is around or inside."""
    groups: dict[tuple[str, type], list[str]] = {}
    for path in layers:
        groups.setdefault((path.rpartition(".")[0], type(modules[path])), []).append(path)

    def rank(item: tuple[tuple[str, type], list[str]]) -> tuple[bool, bool, int]:
        (container, _), members = item
        return len(members) < 2, not isinstance(modules[container], CONTAINERS), container.count(".")

    chosen: list[str] = []
    for (container, _), members in sorted(groups.items(), key=rank):
        if len(members) < 2 and not isinstance(modules[container], CONTAINERS):
            continue
        if not any(is_inside(a, b) or is_inside(b, a) for a in members for b in chosen):
            chosen += members
    order = {path: number for number, path in enumerate(modules)}
    return sorted(chosen, key=order.__getitem__)


def _reason(path: str, calls: Calls, owners: Mapping[int, list[str]], model: nn.Module) -> str:
    if calls.count > 1:
        return f"it is called {calls.count} times in one pass"
    for names in owners.values():
        inside = [name for name in names if is_inside(name, path)]
        if inside and len(inside) < len(names):
            other = next(name for name in names if not is_inside(name, path))
            return f"its {inside[0]!r} is shared with {other!r}"
    return calls.reason


def _numbers(container: nn.Module) -> tuple[str, ...]:
    """Attributes that are 0, 1, 2, ... in the members of a container, as paths from the member."""
    members = list(container.children())
    if len(members) < 2 or not isinstance(container, CONTAINERS):
        return ()
    common: set[str] | None = None
    for position, member in enumerate(members):
        own = {
            f"{path}.{name}" if path else name
            for path, module in member.named_modules()
            for name, value in module.__dict__.items()
            if type(value) is int and value == position and not name.startswith("_")
        }
        common = own if common is None else common & own
        if not common:
            return ()
    return tuple(sorted(common or ()))


def gates(structures: Iterable[Structure]) -> Callable[[str], Polynomial]:
    """How often the tensors and the work of a module path are there: the product of the variables of its layers."""
    layers = [(s.members[0], Polynomial.variable(s.name)) for s in structures if s.kind == KIND]

    def gate(path: str) -> Polynomial:
        result = Polynomial.constant(1)
        for member, variable in layers:
            if is_inside(path, member):
                result = result * variable
        return result

    return gate
