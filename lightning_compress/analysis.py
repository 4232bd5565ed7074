"""What can be removed from a model: found by one traced forward pass, proven by a dry run, told as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.discovery import trace_structures
from lightning_compress.structures import Structures
from lightning_compress.surgery import prove as prove_structures


def discover(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | str | None = None,
    prove: bool = False,
) -> Structures:
    """Structures of ``model``: families of units that can be removed together without a change of anything else.

    Args:
        model: any module; it is left exactly as it was.
        args: positional arguments of one example call; one short example is enough.
        kwargs: keyword arguments of the call.
        kinds: kinds of structures to look for, ``EXACT_KINDS`` by default; see ``KINDS`` for the others.
        prove: also remove a unit of each structure, compare the outputs in float64, and roll back. What cannot go is
            pinned with its reason; the others carry how they go (``tier`` and ``edits``).

    Returns:
        The structures, with the model's costs as polynomials in their kept counts and with what stays whole
        (``.pinned``).

    Raises:
        ValueError: for an unknown kind; with ``prove`` also for a wrapped or compiled model (``SurgeryError``).

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(s.kind, s.units, s.tier) for s in discover(model, (torch.randn(3, 4),), prove=True)]
    [('ffn', 8, 'native')]
    """
    structures = trace_structures(model, args, kwargs, kinds)
    return prove_structures(model, structures, args, kwargs) if prove else structures


def explain(
    model: nn.Module | Structures,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | str | None = None,
    prove: bool = True,
) -> str:
    """The structures of a model as a table, and below it what stays whole and why.

    Args:
        model: a module, which is then discovered, or structures that ``discover`` returned.
        args: see ``discover``; not used for structures.
        kwargs: see ``discover``.
        kinds: see ``discover``.
        prove: see ``discover``.
    """
    structures = model if isinstance(model, Structures) else discover(model, args, kwargs, kinds, prove)
    tiers = {"native": "native", "shim": "scatter/gather shim", None: "not proven yet"}
    rows = [(s.name, s.kind, str(s.units), tiers[s.tier]) for s in structures]
    lines = _table(("structure", "kind", "units", "removal"), rows) if rows else ["No structure can be removed."]
    if structures.pinned:
        lines += ["", "Stays whole:"]
        reasons: dict[tuple[str, ...], list[str]] = {}
        for family in structures.pinned:
            reasons.setdefault(family.reasons, []).append(f"{family.name} ({family.units} units)")
        for why, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  {shown}:")
            lines += [f"    {reason}" for reason in why]
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    cells = [header, tuple("-" * width for width in widths), *rows]
    return [
        "  ".join(
            c.rjust(w) if i == 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
