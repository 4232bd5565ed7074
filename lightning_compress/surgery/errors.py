"""The one exception of surgery."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A removal was refused; the model, its gradients, its hooks and the optimizers are exactly as they were before."""
