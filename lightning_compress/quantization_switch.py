"""A switch that takes quantization out of the runs under it, wherever it is attached.

Structures are traced, removals compared and latencies tabulated on models that compute with their weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_off: ContextVar[bool] = ContextVar("quantization_off", default=False)


@contextmanager
def quantization_off() -> Iterator[None]:
    """Under it weights and activations are what they are."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def quantization_is_off() -> bool:
    """Whether the switch is off."""
    return _off.get()


__all__ = ["quantization_is_off", "quantization_off"]
