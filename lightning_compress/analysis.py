"""What can be removed from a model: found by one traced forward pass, proven by a dry run, told as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.discovery import trace_structures
from lightning_compress.discovery.valueless import lacking_values
from lightning_compress.explanation import Explanation, explanation_of
from lightning_compress.progress import Progress, quiet
from lightning_compress.structures import Structures
from lightning_compress.surgery import prove as prove_structures
from lightning_compress.surgery.guards import check_names


def discover(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | str | None = None,
    prove: bool = False,
    *,
    progress: Progress = quiet,
) -> Structures:
    """Structures of ``model``: families of units that can be removed together without a change of anything else.

    Args:
        model: any module; it is left exactly as it was.
        args: positional arguments of one example call; one short example is enough.
        kwargs: keyword arguments of the call.
        kinds: kinds of structures to look for, ``EXACT_KINDS`` by default; see ``KINDS`` for the others.
        prove: also remove a unit of each structure, compare the outputs in float64, and roll back. What cannot go is
            pinned with its reason; the others carry how they go (``tier`` and ``edits``).
        progress: wraps what is gone through, for a progress bar, see ``progress_bars``.

    Returns:
        The structures, with the model's costs as polynomials in their kept counts and with what stays whole
        (``.pinned``).

    Raises:
        ValueError: for an unknown kind; for a compiled or scripted model, with ``prove`` also for a wrapped one
            (``SurgeryError``).

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(s.kind, s.units, s.tier) for s in discover(model, (torch.randn(3, 4),), prove=True)]
    [('ffn', 8, 'native')]
    """
    check_names(model)
    structures = trace_structures(model, args, kwargs, kinds, progress=progress)
    return prove_structures(model, structures, args, kwargs, progress=progress) if prove else structures


def explain(
    model: nn.Module | Structures,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | str | None = None,
    prove: bool | None = None,
    *,
    progress: Progress = quiet,
) -> Explanation:
    """What can be removed and what stays whole and why, with shares of the parameters; print it.

    Args:
        model: a module, which is then discovered, or structures that ``discover`` returned.
        args: see ``discover``; not used for structures.
        kwargs: see ``discover``.
        kinds: see ``discover``.
        prove: see ``discover``; by default where the model has weights (it is not on the meta device).
        progress: see ``discover``.

    Returns:
        Rows for structures and for what stays whole, look-alikes together; ``str`` of it is the text.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> explanation = explain(model, (torch.randn(3, 4),))
    >>> [(row.title, row.units, row.tier) for row in explanation.structures], explanation.prunable
    ([('ffn', 8, 'native')], 56)
    """
    if isinstance(model, Structures):
        return explanation_of(model)
    if prove is None:
        prove = not lacking_values(model)
    return explanation_of(discover(model, args, kwargs, kinds, prove, progress=progress))
