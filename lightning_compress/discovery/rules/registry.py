"""The table of operation rules and the view of a call that they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.discovery.axes import Axis

if TYPE_CHECKING:
    from lightning_compress.discovery.tracer import Trace

Dims = list[Axis | None]
Rule = Callable[["Trace", "Call"], list[Dims]]


class NoRule(Exception):
    """This use of an operation is not covered: its axes are pinned."""


@dataclass
class Call:
    """One ATen call: arguments by their names in the schema, tensors in order."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    inputs: list[Tensor] = field(init=False)
    outputs: list[Tensor] = field(init=False)
    named: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        self.outputs = [t for t in tree_leaves(self.result) if isinstance(t, Tensor)]
        arguments = self.func._schema.arguments
        self.named = {a.name: a.default_value for a in arguments if a.has_default_value()}
        self.named.update({a.name: value for a, value in zip(arguments, self.args, strict=False)})
        self.named.update(self.kwargs)

    @property
    def name(self) -> str:
        """Name of the operation without namespace and overload."""
        return str(self.func._schema.name).split("::")[-1]

    def __getitem__(self, key: str) -> Any:
        return self.named[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Argument by name, or a default where this overload does not have it."""
        value = self.named.get(key, default)
        return default if value is None else value

    def dim(self, key: str = "dim", rank: int | None = None) -> int:
        """A dimension argument, counted from zero."""
        rank = self.inputs[0].dim() if rank is None else rank
        return int(self.get(key, 0)) % max(1, rank)

    def dims(self, key: str = "dim", rank: int | None = None) -> list[int]:
        """A list-of-dimensions argument; all dimensions where it is absent or empty."""
        rank = self.inputs[0].dim() if rank is None else rank
        value = self.named.get(key)
        if value is None or value == [] or isinstance(value, bool):
            return list(range(rank))
        values = [value] if isinstance(value, int) else list(value)
        return [int(v) % max(1, rank) for v in values]


RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def rule_for(call: Call) -> Rule | None:
    """The rule of a call.

    By name, by the name of the out-of-place form, or the elementwise rule for pointwise operations.
    """
    name = call.name
    if name in RULES:
        return RULES[name]
    plain = name.removesuffix("_")
    if plain in RULES and call.func._schema.is_mutable:
        return RULES[plain]
    if torch.Tag.pointwise in call.func.tags:
        return RULES["elementwise"]
    return None
