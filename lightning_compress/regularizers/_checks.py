"""Checks of arguments.

They read shapes and dtypes only: looking at values would make the host wait for the device in every training step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Float32 for half precision, whose squares overflow or vanish; otherwise the dtype of the tensor."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def unknown_name(what: str, name: object, known: Mapping[str, object]) -> ValueError:
    """The error for a name that is not in the table, with the closest name that is."""
    close = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"Expected the {what} to be one of {', '.join(map(repr, sorted(known)))}, but got {name!r}.{hint}"
    )


def require_floating(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless `tensor` holds floating-point numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = f"dtype {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"Expected {name} to be a floating-point tensor, but got {got}.")


def checked_norms(norms: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Norms and weights in a precision that can hold their sums."""
    require_floating(norms, "norms")
    if norms.ndim != 1:
        raise ValueError(
            f"Expected norms to be a vector with one norm per group, but got shape {tuple(norms.shape)}. "
            "Take the norms of a matrix with group_norms(weight, axis)."
        )
    if weights is not None and weights.shape != norms.shape:
        raise ValueError(
            f"Expected weights to have one weight per group, shape {tuple(norms.shape)}, "
            f"but got shape {tuple(weights.shape)}."
        )
    norms = norms.to(accumulation_dtype(norms))
    return norms, None if weights is None else weights.to(norms)


def require_mask(protected: Tensor, norms: Tensor) -> None:
    """Raise unless `protected` is a bool vector with one entry per norm."""
    if not isinstance(protected, Tensor) or protected.dtype != torch.bool:
        got = f"dtype {protected.dtype}" if isinstance(protected, Tensor) else type(protected).__name__
        raise TypeError(f"Expected protected to be a bool tensor, but got {got}.")
    if protected.shape != norms.shape:
        raise ValueError(
            f"Expected protected to have one entry per group, shape {tuple(norms.shape)}, "
            f"but got shape {tuple(protected.shape)}."
        )


def checked_step(step: float) -> float:
    """The step as a float that is finite and not negative."""
    step = float(step)
    if not (step >= 0 and math.isfinite(step)):
        raise ValueError(
            f"Expected step, the learning rate times the strength, to be finite and at least 0, but got {step}."
        )
    return step
