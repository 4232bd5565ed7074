"""The exception of surgery."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A removal was refused; the model, its gradients, its hooks and the optimizers are exactly as they were before."""


class NotFinite(SurgeryError):
    """The example call returns NaN, so that nothing can be compared."""
