"""Modules under ``torch.compile``: eager while they are taken apart, compiled anew for their new shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Run ``module`` as it is written, where it or a part of it was compiled in place, for a while.

    A ``forward`` that was compiled and put on an instance, as Lightning does for ``fit(torch.compile(module))``, stays
    bound to that instance when it is copied: a copy would compute with the weights of the original.
    """
    compiled: list[tuple[nn.Module, str, Any]] = []
    for part in module.modules():
        for name in _compiled_attributes(part):
            compiled.append((part, name, vars(part).pop(name)))
    try:
        yield
    finally:
        for part, name, value in compiled:
            vars(part)[name] = value


def uncompiled_calls(pl_module: pl.LightningModule) -> ExitStack:
    """Let everything run as it is written until the result is closed: compiled code does not look for new hooks."""
    stack = ExitStack()
    if is_compiled(pl_module):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    return stack


def recompile(pl_module: pl.LightningModule) -> None:
    """Forget what was compiled for the old shapes, if anything was.

    Every shape that is met costs one of the few recompilations that torch allows a function before it gives up on it.
    """
    if is_compiled(pl_module):
        torch.compiler.reset()


def is_compiled(pl_module: pl.LightningModule) -> bool:
    """Whether the LightningModule, or a module in it, was compiled."""
    return getattr(pl_module, "_compiler_ctx", None) is not None or any(
        _compiled_attributes(part) or type(part).__name__ == "OptimizedModule" for part in pl_module.modules()
    )


def _compiled_attributes(module: nn.Module) -> list[str]:
    own = vars(module)
    names = ["_compiled_call_impl"] if own.get("_compiled_call_impl") is not None else []
    original = getattr(own.get("forward"), "_torchdynamo_orig_callable", None)
    if original is not None and getattr(original, "__func__", None) is type(module).forward:
        names.append("forward")
    return names


__all__ = ["eager", "is_compiled", "recompile", "uncompiled_calls"]
