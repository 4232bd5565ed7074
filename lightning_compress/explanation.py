"""What can be removed and what stays whole, with the share of the parameters that each family of units owns.

A family owns the elements of a parameter that lie at its positions on any axis. Families overlap: an element of an
output projection belongs to a head, to a V/O dim and to the residual width. So shares do not add up, and the share of
several families is that of the union of their elements: with o_a of s_a positions of axis a owned, a parameter has

    prod_a s_a - prod_a (s_a - o_a)

elements that belong to one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.structures import Structures, Tier

Positions = Mapping[tuple[str, int], Tensor]

_NUMBER = re.compile(r"(?<![^.\s(])\d+(?=[.)]|$)")  # a path component that is a number: "layer.11.output"
_TIERS: dict[Tier | None, str] = {"native": "native", "shim": "scatter/gather shim", None: "not proven yet"}


@dataclass(frozen=True)
class Family:
    """Look-alike families of units, one in each of several modules.

    Args:
        name: their common name, with ``*`` where the names differ: "encoder.layer.*.attention.head".
        members: the names.
        kind: their kind.
        units: number of units of each.
        tier: how they can go; None for a family that stays whole, or where it is not proven.
        reasons: why they stay whole, with ``*`` where modules differ; empty for structures.
        parameters: number of elements that they own together.
        unprunable: how many of these no structure owns.
    """

    name: str
    members: tuple[str, ...]
    kind: str
    units: int
    tier: Tier | None
    reasons: tuple[str, ...]
    parameters: int
    unprunable: int

    @property
    def title(self) -> str:
        """Name, and how many there are."""
        return self.name + (f" x {len(self.members)}" if len(self.members) > 1 else "")


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns; ``str`` makes the text.

    Args:
        structures: what can go.
        pinned: what stays whole, and why.
        parameters: number of elements of all parameters; 0 where shapes are not known.
        prunable: elements that belong to a structure, each counted once.
        whole: elements that belong to a family, but to no structure.
    """

    structures: tuple[Family, ...]
    pinned: tuple[Family, ...]
    parameters: int
    prunable: int
    whole: int

    @property
    def rest(self) -> int:
        """Elements that belong to no family."""
        return self.parameters - self.prunable - self.whole

    def share(self, elements: int) -> str:
        """A number of elements as a percentage of all parameters."""
        return f"{elements / self.parameters:.1%}" if self.parameters else "?"

    def __str__(self) -> str:
        lines = ["No structure can be removed."]
        if self.structures:
            header = ("structure", "kind", "units", "removal", "parameters")
            rows = [(f.title, f.kind, str(f.units), _TIERS[f.tier], self.share(f.parameters)) for f in self.structures]
            lines = _table(header, rows)
        if self.parameters:
            lines += [
                "",
                f"Of {self.parameters:,} parameters {self.share(self.prunable)} belong to a structure (structures "
                f"overlap, so shares do not add up),",
                f"{self.share(self.whole)} only to families that stay whole, {self.share(self.rest)} to no family.",
            ]
        if self.pinned:
            lines += ["", "Stays whole:"]
            for reasons, families in _by_reasons(self.pinned).items():
                lines += [f"  {self._pinned_line(f)}" for f in families[:3]]
                if len(families) > 3:
                    lines.append(f"  and {len(families) - 3} more:")
                lines += [f"    {reason}" for reason in reasons]
        return "\n".join(lines)

    def _pinned_line(self, family: Family) -> str:
        shares = ""
        if self.parameters and family.parameters:
            shares = f", {self.share(family.parameters)} of the parameters"
            shares += f" ({self.share(family.unprunable)} in no structure)"
        return f"{family.title} ({family.units} units){shares}:"


def explanation_of(structures: Structures) -> Explanation:
    """Structures and pinned families, look-alikes together, with their shares."""
    shapes = structures.shapes
    owned = [{(p.parameter, p.axis): p.indices.reshape(-1) for p in s.slices} for s in structures]
    for places, structure in zip(owned, structures, strict=True):
        for name in structure.tensors_of(shapes) if structure.members else ():  # whole modules
            if shapes[name]:
                places[name, 0] = torch.arange(shapes[name][0])
    prunable = count_elements(shapes, owned)
    everything = count_elements(shapes, [*owned, *(p.positions for p in structures.pinned)])

    found = []
    for numbers in _alike((s.name, s.kind, s.units, s.tier) for s in structures):
        first, names = structures[numbers[0]], [structures[i].name for i in numbers]
        elements = count_elements(shapes, [owned[i] for i in numbers])
        found.append(Family(common_name(names), tuple(names), first.kind, first.units, first.tier, (), elements, 0))
    pinned = []
    for numbers in _alike((p.name, p.kind, p.units, _starred(p.reasons)) for p in structures.pinned):
        families = [structures.pinned[i] for i in numbers]
        names, positions = [f.name for f in families], [f.positions for f in families]
        pinned.append(
            Family(
                common_name(names),
                tuple(names),
                families[0].kind,
                families[0].units,
                None,
                _common_reasons([reason for f in families for reason in f.reasons]),
                count_elements(shapes, positions),
                count_elements(shapes, [*owned, *positions]) - prunable,
            )
        )
    total = sum(math.prod(shape) for shape in shapes.values())
    return Explanation(tuple(found), tuple(pinned), total, prunable, everything - prunable)


def count_elements(shapes: Mapping[str, tuple[int, ...]], families: Iterable[Positions]) -> int:
    """Number of elements of parameters that belong to one of ``families``; see the module docstring."""
    masks: dict[str, dict[int, Tensor]] = {}
    for positions in families:
        for (parameter, axis), owned in positions.items():
            if parameter in shapes:  # buffers are no parameters
                mask = masks.setdefault(parameter, {}).setdefault(axis, torch.zeros(shapes[parameter][axis]).bool())
                mask[owned] = True
    count = 0
    for parameter, by_axis in masks.items():
        free = [s - int(by_axis[a].sum()) if a in by_axis else s for a, s in enumerate(shapes[parameter])]
        count += math.prod(shapes[parameter]) - math.prod(free)
    return count


def common_name(names: Sequence[str]) -> str:
    """Names of equally many components as one, with ``*`` where they differ."""
    parts = [name.split(".") for name in names]
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def _alike(items: Iterable[tuple[str, object, object, object]]) -> list[list[int]]:
    """Numbers of the items whose names differ in numbers only and that agree in the rest, in order."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, (name, *rest) in enumerate(items):
        groups.setdefault((_NUMBER.sub("*", name), *rest), []).append(number)
    return list(groups.values())


def _starred(reasons: Iterable[str]) -> frozenset[str]:
    return frozenset(_NUMBER.sub("*", reason) for reason in reasons)


def _common_reasons(reasons: Sequence[str]) -> tuple[str, ...]:
    """Sentences that differ in the numbers of modules only, told once."""
    alike: dict[str, set[str]] = {}
    for reason in reasons:
        alike.setdefault(_NUMBER.sub("*", reason), set()).add(reason)
    return tuple(key if len(same) > 1 else next(iter(same)) for key, same in alike.items())


def _by_reasons(families: Iterable[Family]) -> dict[tuple[str, ...], list[Family]]:
    groups: dict[tuple[str, ...], list[Family]] = {}
    for family in families:
        groups.setdefault(family.reasons, []).append(family)
    return groups


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    cells = [header, tuple("-" * width for width in widths), *rows]
    right = {2, 4}
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
