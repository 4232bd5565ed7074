"""One model, examined from discovery to the rebuilt file; what counts as right is decided here, not by the library.

    discover -> prove -> plan half of every structure -> zero (copy A) and remove (copy B) -> same outputs?
    -> one Adam step on both -> same outputs? -> save and rebuild from nothing -> same outputs?

All in float64 on perturbed weights; a model that does not run in float64 is examined in float32, to a tolerance that
rounding allows. Outputs are flattened and compared by code of this file.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import Structures
from lightning_compress.surgery import apply_plan, zero_units
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.precision import DoublePrecision
from lightning_compress.surgery.silence import silence


@dataclass(frozen=True)
class Arithmetic:
    """In which precision a model is called, and what counts as equal: an error in the logic shows as 1e-3 or more.

    ``widened``: casts to lower precisions inside the forward become casts to float64.
    """

    dtype: torch.dtype = torch.float64
    widened: bool = False

    @property
    def equal(self) -> float:
        return 1e-6 if self.dtype == torch.float64 else 1e-4


PLAIN, WIDENED, SINGLE = Arithmetic(), Arithmetic(widened=True), Arithmetic(torch.float32)


@dataclass
class KindVerdict:
    """What became of the structures of one kind.

    Args:
        found: structures of two or more units that discovery found free.
        native: of these, removed with the weights cut and the attributes repaired, and equal.
        shim: of these, removed with a scatter/gather shim, and equal.
        refused: reason -> number of those that were found free and did not go.
        pinned: reason -> number of families of this kind that discovery itself kept whole.
    """

    found: int = 0
    native: int = 0
    shim: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> int:
        return self.native + self.shim


@dataclass
class Verdict:
    """What became of one model.

    Args:
        name: of the model.
        kinds: kind -> what became of its structures.
        before: parameters before, each shared one once.
        after: parameters afterwards.
        error: largest relative difference of all comparisons; None where none was made.
        effect: how much zeroing changed the outputs, so that equality is not vacuous.
        seconds: discovery, proof and removal; the comparisons are not counted.
        flags: of "wrong", "half-changed", "hung", "error".
        notes: sentences: what went wrong, what could not be checked.
    """

    name: str = ""
    kinds: dict[str, KindVerdict] = field(default_factory=dict)
    before: int = 0
    after: int = 0
    error: float | None = None
    effect: float | None = None
    seconds: float = 0.0
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def smaller(self) -> bool:
        return self.after < self.before and not self.flags

    @property
    def complete(self) -> bool:
        """Smaller, and nothing that discovery found free was refused."""
        return self.smaller and all(kind.exact == kind.found for kind in self.kinds.values())

    def flag(self, flag: str, note: str) -> None:
        if flag not in self.flags:
            self.flags.append(flag)
        self.notes.append(note)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "smaller": self.smaller, "complete": self.complete}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Verdict:
        known = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        return cls(**{**known, "kinds": {kind: KindVerdict(**v) for kind, v in value["kinds"].items()}})


# --------------------------------------------------------------------------------------------------- calls and outputs


def copied(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Nested inputs, copied, with floating-point tensors of this type."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {k: copied(v, dtype) for k, v in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(copied(v, dtype) for v in value)
    return value


def other_batch(value: Any) -> Any:
    """Another batch: the examples in reverse order (a single one: rolled along its last axis), numbers changed."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] > 1:
            changed = value.flip(0)
        else:
            changed = value.roll(1, -1) if value.dim() else value
        return changed * 0.7 + 0.1 if value.is_floating_point() else changed
    if isinstance(value, dict):
        return {k: other_batch(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(other_batch(v) for v in value)
    return value


def outputs_of(value: Any, path: str = "output", own: bool = True, seen: set[int] | None = None) -> Iterator[Any]:
    """(path, tensor, whether its shape must stay) for every tensor in an output; objects such as caches may shrink."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value, own
        return
    if value is None or isinstance(value, str | bytes | int | float | complex | type | nn.Module) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, list | tuple):
        children = list(enumerate(value))
    elif is_dataclass(value):
        children = [(f.name, getattr(value, f.name)) for f in fields(value)]
    else:
        children, own = list(getattr(value, "__dict__", {}).items()), False
    for key, child in children:
        yield from outputs_of(child, f"{path}.{key}", own, seen)


def call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], how: Arithmetic) -> list[Any]:
    """Outputs of a call with fresh copies of its inputs and the same random numbers every time."""
    random.seed(0)
    torch.manual_seed(0)
    args, kwargs = copied(tuple(args), how.dtype), copied(dict(kwargs), how.dtype)
    if how.widened:
        with DoublePrecision():
            return list(outputs_of(model(*args, **kwargs)))
    return list(outputs_of(model(*args, **kwargs)))


def difference(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Largest over the outputs of max |a - b| / max |b|; infinite where they are not even of one shape."""
    worst = 0.0
    others = {path: (tensor, own) for path, tensor, own in second}
    if {path for path, _, own in first if own} != {path for path, (_, own) in others.items() if own}:
        return float("inf")
    for path, a, own in first:
        if not own:  # a cache may hold what nobody reads any more
            continue
        a, b = a.detach(), others[path][0].detach()
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, float((a != b).any()))
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, torch.zeros_like(a), a - b).abs()
        if not bool(gap.isfinite().all()):
            return float("inf")
        finite = b[b.isfinite()].abs()
        scale = max(float(finite.max()) if finite.numel() else 1.0, 1e-3)
        worst = max(worst, float(gap.max()) / scale)
    return worst


def finite(outputs: Sequence[Any]) -> bool:
    tensors = [t for _, t, own in outputs if own and t.is_floating_point()]
    return bool(tensors) and not any(bool(t.isnan().any()) for t in tensors)


# --------------------------------------------------------------------------------------------------- models


def prepared(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in evaluation mode, with nothing left at a value that would hide a mistake."""
    torch.manual_seed(0)
    random.seed(0)
    model = build().eval()
    model._apply(lambda t: t.to(dtype.to_complex() if t.is_complex() else dtype if t.is_floating_point() else t.dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                for statistic, low in ((module.running_mean, -0.5), (module.running_var, 0.5)):
                    noise = torch.rand(statistic.shape, generator=generator, dtype=statistic.dtype)
                    statistic.copy_(noise + low)
    return model


class Snapshot:
    """Everything about a model that must be as it was after a failure: bytes of tensors, numbers, classes, hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {
            name: (id(tensor), tensor.detach().clone())
            for name, tensor in (
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            )
        }
        self.modules = {path: _traits(module) for path, module in model.named_modules(remove_duplicate=False)}

    def changes(self, model: nn.Module) -> list[str]:
        """What is different in ``model`` now."""
        now = Snapshot(model)
        found = [f"module {path!r}" for path in self.modules.keys() ^ now.modules.keys()]
        found += [f"module {path!r}" for path in self.modules if now.modules.get(path) != self.modules[path]]
        for name in self.tensors.keys() | now.tensors.keys():
            before, after = self.tensors.get(name), now.tensors.get(name)
            if before is None or after is None or before[0] != after[0] or not _same_bits(before[1], after[1]):
                found.append(f"tensor {name!r}")
        return sorted(set(found))


def _traits(module: nn.Module) -> Any:
    numbers = {
        key: repr(value)
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple) and "Tensor" not in repr(value)
    }
    hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
    return type(module), numbers, hooks


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8) if a.dtype != torch.bool else a,
        b.contiguous().reshape(-1).view(torch.uint8) if b.dtype != torch.bool else b,
    )


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def every_second(structures: Structures) -> dict[str, list[int]]:
    """Every second unit of every structure stays: kept units are not simply the first ones."""
    return {s.name: list(range(0, s.units, 2)) for s in structures}


# --------------------------------------------------------------------------------------------------- a step on both


def kept_masks(model: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    """1 where a position stays, for every tensor that loses some."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    masks: dict[str, Tensor] = {}
    for (name, axis), positions in plan.removed_positions().items():
        masks.setdefault(name, torch.ones_like(tensors[name])).index_fill_(axis, positions, 0.0)
    return masks


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # some biases (of keys) have no gradient but rounding noise; with Adam's usual eps that would become a step
    return torch.optim.Adam((p for p in model.parameters() if p.is_floating_point()), lr=1e-2, eps=1e-3)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    how: Arithmetic,
) -> None:
    """One step on a smooth loss; ``masks`` keep removed positions where they are."""
    optimizer.zero_grad()
    outputs = call(model, args, kwargs, how)
    terms = [t[t.isfinite()] for _, t, own in outputs if own and t.is_floating_point() and t.requires_grad]
    sum((t**2).sum() + t.sum() for t in terms).backward()  # type: ignore[union-attr]
    by_identity = {id(p): masks[n] for n, p in model.named_parameters(remove_duplicate=False) if n in masks}
    for parameter in model.parameters():
        if id(parameter) in by_identity and parameter.grad is not None:
            parameter.grad.mul_(by_identity[id(parameter)])
    optimizer.step()


# --------------------------------------------------------------------------------------------------- saving


def save(model: nn.Module, folder: Path) -> None:
    """The state of ``model`` in a safetensors file; of tensors that are one, only the first is written."""
    import safetensors.torch

    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else name
        if place in first:
            same[name] = first[place]
        else:
            first[place] = name
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            tensors[name] = tensor.detach().clone().contiguous()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"same": json.dumps(same)})


def load(model: nn.Module, folder: Path) -> None:
    """The opposite of ``save``; every name of the model must be there."""
    import safetensors

    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        same = json.loads(file.metadata()["same"])
    state |= {name: state[other] for name, other in same.items()}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_complex():
            state[name] = torch.view_as_complex(state[name])
    state |= {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict(state, strict=True)


# --------------------------------------------------------------------------------------------------- the examination


def examine(
    build: Callable[[], nn.Module],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str = "",
    keep: Callable[[Structures], dict[str, list[int]]] = every_second,
    kinds: Sequence[str] | None = None,
) -> Verdict:
    """Examine one model; whatever it does, a verdict comes back.

    Args:
        build: makes the model, the same one every time after ``torch.manual_seed``.
        args: positional arguments of one example call.
        kwargs: its keyword arguments.
        name: for the verdict.
        keep: structures -> kept units of each; every second one by default.
        kinds: of structures; by default those of ``discover``.
    """
    verdict = Verdict(name)
    try:
        _examine(verdict, build, tuple(args), dict(kwargs or {}), keep, kinds)
    except Exception as failure:  # the verdict is the point of the exercise
        verdict.flag("error", f"the examination itself: {_text(failure)}")
    return verdict


def _examine(
    verdict: Verdict,
    build: Callable[[], nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep: Callable[[Structures], dict[str, list[int]]],
    kinds: Sequence[str] | None,
) -> None:
    how = PLAIN
    model = prepared(build)
    verdict.before = verdict.after = parameters_of(model)
    with torch.no_grad():
        try:
            dense = call(model, args, kwargs, how)
        except Exception as failure:  # some operations have no kernel for float64
            how, model = SINGLE, prepared(build, torch.float32)
            dense = call(model, args, kwargs, how)
            verdict.notes.append(f"examined in float32, because in float64: {_text(failure)}")
        if not finite(dense):
            verdict.flag("error", "the model itself returns no finite tensor")
            return
        if difference(call(model, args, kwargs, how), dense) > how.equal:
            verdict.notes.append("two calls of the untouched model differ")
    elsewhere: tuple[Any, Any] | None = (other_batch(args), other_batch(kwargs))
    try:
        with torch.no_grad():
            call(model, *elsewhere, how)
    except Exception:  # not every model takes any numbers
        elsewhere = None
        verdict.notes.append("no second batch: the model does not run on the changed one")

    snapshot = Snapshot(model)

    def attempt(what: str, action: Callable[[], Any]) -> Any:
        """The result of ``action``; None, and a flag, if it raises or leaves the model other than it was."""
        started, result = time.perf_counter(), None
        try:
            result = action()
        except Exception as failure:  # any exception is a finding
            verdict.flag("error", f"{what}: {_text(failure)}")
        verdict.seconds += time.perf_counter() - started
        changes = snapshot.changes(model)
        if changes:
            verdict.flag("half-changed", f"{what} changed {', '.join(changes[:4])} ({len(changes)} in all)")
        return result

    def structures_of(prove: bool) -> Structures:
        return discover(model, copied(args, how.dtype), copied(kwargs, how.dtype), kinds, prove)

    found = attempt("discover", lambda: structures_of(prove=False))
    proven = attempt("prove", lambda: structures_of(prove=True))
    if found is None:
        return
    _count(verdict, found, Structures() if proven is None else proven)
    if not proven or verdict.flags:
        return
    plan = PruningPlan.of(model, proven, keep(proven))
    if plan.is_empty:
        return
    error = _compare(verdict, model, build, plan, args, kwargs, elsewhere, dense, how)
    if error is None:  # removal was refused: said in the flags
        return
    if error > how.equal and how is PLAIN:
        exact = _compare(verdict, model, build, plan, args, kwargs, elsewhere, dense, WIDENED)
        if exact is not None and exact <= WIDENED.equal:
            verdict.flags.remove("wrong")
            verdict.notes.append(f"casts to a lower precision inside the forward: {error:.1e} with them")
            error = exact
    verdict.error = error


def _compare(
    verdict: Verdict,
    model: nn.Module,
    build: Callable[[], nn.Module],
    plan: PruningPlan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    elsewhere: tuple[Any, Any] | None,
    dense: list[Any],
    how: Arithmetic,
) -> float | None:
    """Largest error of all comparisons, None if removal was refused."""
    zeroed = _copy(model, build, how)
    optimizer = adam(zeroed)
    trains = True
    try:
        step(zeroed, optimizer, args, kwargs, {}, how)  # so that there is a state to carry over
    except Exception as failure:  # a model that is not made for training
        trains = False
        verdict.notes.append(f"no step was taken: {_text(failure)}")
    removed, removed_optimizer = _copied(zeroed, optimizer, build, how)
    before = Snapshot(removed)
    example = (copied(args, how.dtype), copied(kwargs, how.dtype))
    started = time.perf_counter()
    try:
        report = apply_plan(removed, plan, optimizers=[removed_optimizer], verify=example)
    except Exception as failure:  # any exception is a finding
        verdict.flag("error", f"apply_plan: {_text(failure)}")
        if changes := before.changes(removed):
            verdict.flag("half-changed", f"apply_plan raised and changed {', '.join(changes[:4])}")
        for kind in verdict.kinds.values():
            if kind.exact:
                kind.refused[f"all together: {_text(failure)}"] = kind.exact
            kind.native = kind.shim = 0
        return None
    if not how.widened:
        verdict.seconds += time.perf_counter() - started
    verdict.after = parameters_of(removed)
    zero_units(zeroed, plan, [optimizer])
    # statistics that leave the removed units out, where zero weights are not enough; to the end of the copy's life
    silence(dict(zeroed.named_modules()), [Removal(s, plan.kept[s.name]) for s in report.plan.structures])
    masks = kept_masks(zeroed, plan)
    names = {id(p): n for n, p in zeroed.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and names[id(parameter)] in masks:
                state[key] = value * masks[names[id(parameter)]]

    worst = 0.0

    def same(when: str, first: nn.Module, second: nn.Module, batch: tuple[Any, Any]) -> None:
        nonlocal worst
        with torch.no_grad():
            expected = call(first, *batch, how)
            try:
                error = difference(call(second, *batch, how), expected)
            except Exception as failure:  # it ran before
                error = float("inf")
                verdict.notes.append(f"{when}: {_text(failure)}")
        worst = max(worst, error)
        if error > how.equal:
            verdict.flag("wrong", f"{when}: the outputs differ by {error:.1e}")

    with torch.no_grad():
        verdict.effect = difference(call(zeroed, args, kwargs, how), dense)
    same("removed", zeroed, removed, (args, kwargs))
    if elsewhere is not None:
        same("on a second batch", zeroed, removed, elsewhere)
    if trains:
        step(zeroed, optimizer, args, kwargs, masks, how)
        try:
            step(removed, removed_optimizer, args, kwargs, {}, how)
        except Exception as failure:  # the zeroed one took it
            verdict.flag("wrong", f"the step of the smaller model: {_text(failure)}")
        same("after a step", zeroed, removed, (args, kwargs))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan.json").write_text(report.plan.to_json(), encoding="utf-8")
        save(removed, Path(folder))
        rebuilt = prepared(build, how.dtype)
        try:
            apply_plan(rebuilt, PruningPlan.from_json((Path(folder) / "plan.json").read_text(encoding="utf-8")))
            load(rebuilt, Path(folder))
        except Exception as failure:  # any exception is a finding
            verdict.flag("wrong", f"rebuilding from the file: {_text(failure)}")
        else:
            same("rebuilt", removed, rebuilt, (args, kwargs))
    return worst


def _count(verdict: Verdict, found: Structures, proven: Structures) -> None:
    """Fill in the kinds: what was found, how it goes, why it does not."""
    reasons = {p.name: p.reasons for p in proven.pinned}
    ways = {s.name: s.tier for s in proven}
    for structure in found:
        if structure.units < 2:
            continue
        kind = verdict.kinds.setdefault(structure.kind, KindVerdict())
        kind.found += 1
        if structure.name in ways:
            setattr(kind, str(ways[structure.name]), getattr(kind, str(ways[structure.name])) + 1)
        else:
            reason = "; ".join(reasons.get(structure.name, ("no reason was given",)))
            kind.refused[reason] = kind.refused.get(reason, 0) + 1
    for pinned in found.pinned:
        kind = verdict.kinds.setdefault(pinned.kind, KindVerdict())
        for reason, times in Counter(pinned.reasons[:1]).items():
            kind.pinned[reason] = kind.pinned.get(reason, 0) + times


def _copy(model: nn.Module, build: Callable[[], nn.Module], how: Arithmetic) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception:  # some modules hold what cannot be copied
        return prepared(build, how.dtype)


def _copied(
    model: nn.Module, optimizer: torch.optim.Optimizer, build: Callable[[], nn.Module], how: Arithmetic
) -> tuple[nn.Module, torch.optim.Optimizer]:
    try:
        return copy.deepcopy((model, optimizer))
    except Exception:  # the same by another road
        other = prepared(build, how.dtype)
        other.load_state_dict(model.state_dict())
        other_optimizer = adam(other)
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else they share counters
        return other, other_optimizer


def _text(failure: BaseException) -> str:
    where = traceback.extract_tb(failure.__traceback__)
    place = f" at {Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}{place}"
