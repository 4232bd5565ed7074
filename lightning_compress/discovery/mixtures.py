"""Mixtures of experts: an axis of scores that a weight makes and a top-k chooses from, and what it chooses among.

The router is found in the trace: the axis over which a top-k is taken, where a weight makes that axis. The experts are
looked for around it, by size: stacked tensors with as many entries as there are scores, or a list of as many look-alike
modules. Whether these are really the ones is for verification to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.discovery.axes import Axis, find
from lightning_compress.discovery.rules.registry import Call
from lightning_compress.discovery.tracer import Trace
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import Pinned, Role, Slice, Structure, is_inside

KIND = "expert"
# The experts are looked for in the module that owns the router's weight and in this many modules around it.
ANCESTORS = 3


class Choices(TorchDispatchMode):
    """Notes, beside a trace, every top-k over the last dimension and the axis that it chooses from.

    Attributes:
        seen: the axis, how many are chosen, and the module where it happens.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace
        self.seen: list[tuple[Axis, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func._schema.name).split("::")[-1]
        if name in ("topk", "argmax", "max", "sort"):
            self._note(Call(func, args, kwargs, result), name)
        return result

    def _note(self, call: Call, name: str) -> None:
        source = call.inputs[0]
        dim = int(call.get("dim", -1)) if call.get("dim", -1) is not None else -1
        if source.dim() < 2 or dim % source.dim() != source.dim() - 1 or not source.is_floating_point():
            return
        axis = self._trace.dims(source)[-1]
        if axis is not None:
            where = self._trace.modules[-1] if self._trace.modules else ""
            chosen = int(call["k"]) if name == "topk" else 1
            self.seen.append((axis, chosen, where))


@dataclass(frozen=True)
class Mixture:
    """A structure of experts and the axes whose size it is."""

    structure: Structure
    axes: tuple[int, ...]


def find_mixtures(model: nn.Module, trace: Trace, choices: Choices) -> tuple[list[Mixture], list[Pinned]]:
    """The mixtures of ``model``; those whose experts are not found, or are all chosen, are pinned."""
    modules = dict(model.named_modules())
    chosen: dict[int, tuple[Axis, int]] = {}
    for axis, count, _ in choices.seen:
        axis = find(axis)
        if axis.form == "atom" and axis.size > 1:
            chosen[id(axis)] = (axis, max(count, chosen.get(id(axis), (axis, 0))[1]))
    mixtures: list[Mixture] = []
    pinned: list[Pinned] = []
    claimed: set[str] = set()
    for axis, count in chosen.values():
        router = [
            (member.name, position)
            for member in trace.members.values()
            for position, dim in enumerate(member.dims)
            if dim is not None and find(dim) is axis
        ]
        weights = [name for name, position in router if position == 0 and trace.members[name].tensor.dim() == 2]
        made = {note.name for note in trace.notes if note.role == "producer" and find(note.axis) is axis}
        weights = [name for name in weights if name in made]
        if not weights:
            continue
        home, stacked, members = _experts(weights[0], axis.size, modules, trace, {n for n, _ in router} | claimed)
        name = _name(home, [m.structure.name for m in mixtures] + [p.name for p in pinned])
        parameters = tuple(n for n, _ in router)
        if home is None:
            continue  # a choice among classes or positions, not among experts
        reason = ""
        if len(weights) > 1 or any(position != 0 for _, position in router):
            reason = f"its scores are made by several weights: {parameters}"
        elif count >= axis.size:
            reason = f"all of its {axis.size} experts are chosen"
        if reason:
            pinned.append(Pinned(name, KIND, axis.size, parameters, (reason,)))
            continue
        claimed.update(stacked)
        table = torch.arange(axis.size).unsqueeze(1)

        def piece(parameter: str, role: Role, zero: bool = False, table: Tensor = table) -> Slice:
            return Slice(parameter, 0, table.shape[0], table, role, zero)

        variable = Polynomial.variable(name)
        structure = Structure(
            name,
            KIND,
            axis.size,
            (
                *(piece(n, "producer" if trace.members[n].is_parameter else "companion", n in made) for n, _ in router),
                *(piece(n, "producer") for n in stacked),
            ),
            sizes=(variable,),
            floor=count,
            members=members,
        )
        owned = [trace.members[n].dims[0] for n in stacked]
        mixtures.append(Mixture(structure, (id(axis), *(id(find(a)) for a in owned if a is not None))))
    return mixtures, pinned


def _experts(
    router: str, size: int, modules: Mapping[str, nn.Module], trace: Trace, taken: set[str]
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """The module that holds the mixture, its stacked tensors and its expert modules; nothing where there are none."""
    home = router.rpartition(".")[0]
    for _ in range(ANCESTORS + 1):
        stacked = tuple(
            name
            for name, member in trace.members.items()
            if is_inside(name, home)
            and name not in taken
            and member.is_parameter
            and member.tensor.dim() >= 2
            and member.tensor.shape[0] == size
            and member.dims[0] is not None
            and find(member.dims[0]).form == "atom"
        )
        cubes = [name for name in stacked if trace.members[name].tensor.dim() >= 3]
        if cubes:
            owners = {name.rpartition(".")[0] for name in cubes}
            return home, tuple(name for name in stacked if name.rpartition(".")[0] in owners), ()
        for path, module in modules.items():
            if is_inside(path, home) and isinstance(module, nn.ModuleList) and len(module) == size:
                kinds = {type(m) for m in module}
                if len(kinds) == 1 and all(any(True for _ in m.parameters()) for m in module):
                    return home, (), tuple(f"{path}.{key}" for key in module._modules)
        if not home:
            break
        home = home.rpartition(".")[0]
    return None, (), ()


def _name(home: str | None, names: Iterable[str]) -> str:
    base = f"{home}.{KIND}" if home else KIND
    name, number = base, 2
    while name in names:
        name, number = f"{base}_{number}", number + 1
    return name


def shares(structures: Iterable[Structure]) -> Callable[[str], Polynomial]:
    """Which part of the tensors of a module path is left: kept experts over experts, inside lists of expert modules."""
    lists = [
        (s.members, Polynomial.variable(s.name) * (1 / s.units)) for s in structures if s.kind == KIND and s.members
    ]

    def share(path: str) -> Polynomial:
        result = Polynomial.constant(1)
        for members, part in lists:
            if any(is_inside(path, member) for member in members):
                result = result * part
        return result

    return share
