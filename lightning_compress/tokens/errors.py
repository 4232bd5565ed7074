"""What token pruning raises."""

from __future__ import annotations


class TokenPruningError(ValueError):
    """Tokens of this model cannot be pruned, or not in this call; the message says which layer and why."""


__all__ = ["TokenPruningError"]
