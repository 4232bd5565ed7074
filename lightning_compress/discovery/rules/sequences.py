"""Sequences of different lengths, packed one after the other and unpacked again."""

from __future__ import annotations

from lightning_compress.discovery import axes
from lightning_compress.discovery.rules.registry import Call, Dims, rule

REASON = "sequences of different lengths are packed along it"


@rule("_pack_padded_sequence")
def pack(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """(batch, time, features) -> (steps of all sequences, features), and how many sequences are left at each step."""
    batch, time, *features = trace.dims(call["input"])
    for axis in (batch, time):
        axes.pin(axis, REASON)
    data, *others = call.outputs
    return [[trace.pinned(data, REASON)[0], *features], *(trace.pinned(other, REASON) for other in others)]


@rule("_pad_packed_sequence")
def pad(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """The reverse."""
    steps, *features = trace.dims(call["data"])
    axes.pin(steps, REASON)
    data, *others = call.outputs
    return [[*trace.pinned(data, REASON)[:2], *features], *(trace.pinned(other, REASON) for other in others)]
