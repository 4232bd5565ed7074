"""Everything that surgery may change, as plain values that can be compared: for tests of "nothing was changed"."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def state_of(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Classes, attributes, hooks, tensors (identity, memory, values), gradients, random state and optimizer state."""
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
    for path, module in model.named_modules():
        found[f"{path} class"] = type(module)
        for name, value in module.__dict__.items():
            found[f"{path}.{name}"] = _value(value)
    for number, optimizer in enumerate(optimizers):
        found[f"optimizer {number} groups"] = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        for parameter, state in optimizer.state.items():
            found[f"optimizer {number} {id(parameter)}"] = {key: _value(value) for key, value in state.items()}
    return found


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        gradient = None if not value.is_leaf or value.grad is None else (id(value.grad), str(value.grad.tolist()))
        return (
            id(value),
            value.data_ptr(),
            value.dtype,
            value.stride(),
            value.requires_grad,
            str(value.tolist()),
            gradient,
        )
    if isinstance(value, dict):
        return id(value), [(key, _value(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return id(value), [_value(item) for item in value]
    if isinstance(value, int | float | str | bool) or value is None:
        return value
    return id(value), {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, int | float | str)}
