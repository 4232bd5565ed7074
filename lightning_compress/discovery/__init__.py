"""Discovery: one traced forward pass of the user's own batch, no registry.

    structures = trace_structures(model, args, kwargs)

An operation without a rule pins everything it touches: what is not understood stays whole and is never broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.discovery.assemble import Modules, assemble
from lightning_compress.discovery.layers import KIND as LAYER
from lightning_compress.discovery.layers import ResidualPaths, find_layers, gates, watched
from lightning_compress.discovery.mixtures import KIND as EXPERT
from lightning_compress.discovery.mixtures import Choices, find_mixtures, shares
from lightning_compress.discovery.tracer import Trace, trace
from lightning_compress.discovery.valueless import real_tensors
from lightning_compress.polynomials import Polynomial
from lightning_compress.progress import Progress, quiet
from lightning_compress.structures import EXACT_KINDS, Structures, check_kinds


def trace_structures(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | str | None = None,
    *,
    progress: Progress = quiet,
) -> Structures:
    """Structures of ``model``, found by running ``model(*args, **kwargs)`` once in evaluation mode.

    Args:
        model: any module; it is left exactly as it was. Its weights may lack values (meta device, FakeTensorMode).
        args: positional arguments of the call; one short example is enough.
        kwargs: keyword arguments of the call.
        kinds: kinds of structures to return, ``EXACT_KINDS`` by default.
        progress: wraps what is gone through; the pass is a bar of unknown length, over its operations.

    Raises:
        ValueError: for an unknown kind.
    """
    chosen = EXACT_KINDS if kinds is None else check_kinds(kinds)
    if not {LAYER, EXPERT} & set(chosen):
        seen = trace(model, args, kwargs, progress=progress)
        with real_tensors():
            return assemble(seen, chosen)
    paths = ResidualPaths(watched(model) if LAYER in chosen else {})
    choices: list[Choices] = []

    def choosing(trace: Trace) -> Choices:
        choices.append(Choices(trace))
        return choices[0]

    seen = trace(model, args, kwargs, watch=[choosing, lambda _: paths], progress=progress)
    with real_tensors():
        layers, pinned = find_layers(model, seen, paths) if LAYER in chosen else ([], [])
        mixtures, whole = find_mixtures(model, seen, choices[0]) if EXPERT in chosen else ([], [])
        experts = [mixture.structure for mixture in mixtures]
        modules = Modules(
            (*layers, *experts),
            (*pinned, *whole),
            {axis: Polynomial.variable(m.structure.name) for m in mixtures for axis in m.axes},
            gates(layers),
            shares(experts),
        )
        return assemble(seen, chosen, modules)


__all__ = ["trace_structures"]
