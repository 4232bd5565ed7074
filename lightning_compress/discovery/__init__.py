"""Discovery: one traced forward pass of the user's own batch, no registry.

    structures = trace_structures(model, args, kwargs)

An operation without a rule pins everything it touches: what is not understood stays whole and is never broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.discovery.assemble import assemble
from lightning_compress.discovery.tracer import trace
from lightning_compress.discovery.valueless import real_tensors
from lightning_compress.structures import EXACT_KINDS, Structures, check_kinds


def trace_structures(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    kinds: Sequence[str] | str | None = None,
) -> Structures:
    """Structures of ``model``, found by running ``model(*args, **kwargs)`` once in evaluation mode.

    Args:
        model: any module; it is left exactly as it was. Its weights may lack values (meta device, FakeTensorMode).
        args: positional arguments of the call; one short example is enough.
        kwargs: keyword arguments of the call.
        kinds: kinds of structures to return, ``EXACT_KINDS`` by default.

    Raises:
        ValueError: for an unknown kind.
    """
    chosen = EXACT_KINDS if kinds is None else check_kinds(kinds)
    watched = trace(model, args, kwargs)
    with real_tensors():
        return assemble(watched, chosen)


__all__ = ["trace_structures"]
