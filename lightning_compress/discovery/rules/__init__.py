"""What each operation does to the dimensions of its tensors: one small function per family of ATen operations.

A rule gets the trace and the call and returns the dimensions of every output tensor. It may unify, mark and pin axes on
the way. It raises `NoRule` for a use it does not cover; then, as for an operation without a rule, every axis of the
inputs is pinned.
"""

from lightning_compress.discovery.rules import (
    attention,
    contraction,
    elementwise,
    indexing,
    mixing,
    normalization,
    reduction,
    sequences,
    shape,
    windows,
)
from lightning_compress.discovery.rules.registry import RULES, Call, NoRule, rule_for

__all__ = [
    "RULES",
    "Call",
    "NoRule",
    "attention",
    "contraction",
    "elementwise",
    "indexing",
    "mixing",
    "normalization",
    "reduction",
    "rule_for",
    "sequences",
    "shape",
    "windows",
]
