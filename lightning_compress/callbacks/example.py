"""The example: one call of a module as it happened in a training or validation step, kept for later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.discovery.tracer import evaluation


@dataclass(frozen=True)
class ExampleCall:
    """Arguments of one call of a module: tensors detached and copied, everything else as it was."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def copied(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExampleCall:
        """The call, independent of what happens to its tensors later.

        Tensors that were made in inference mode become ordinary ones, so that autograd and tracing accept them.
        """
        with torch.inference_mode(False), torch.no_grad():
            return cls(*pytree.tree_map_only(Tensor, lambda t: t.clone().detach(), (args, dict(kwargs))))

    @property
    def size(self) -> int | None:
        """Number of examples in the call: the leading size that its tensors share; None if they share none."""
        sizes = {t.shape[0] for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim()}
        return sizes.pop() if len(sizes) == 1 else None

    def on_cpu(self) -> ExampleCall:
        """The call with its tensors on the CPU."""
        return ExampleCall(*pytree.tree_map_only(Tensor, lambda t: t.cpu(), (self.args, self.kwargs)))

    def narrowed(self, examples: int) -> ExampleCall | None:
        """The call with the first ``examples`` of its batch; None if it has no more, or no common leading size."""
        if self.size is None or self.size <= examples:
            return None
        narrow = pytree.tree_map_only(
            Tensor, lambda t: t[:examples].clone() if t.dim() else t, (self.args, self.kwargs)
        )
        return ExampleCall(*narrow)


def smallest_example(module: nn.Module, call: ExampleCall, examples: int = 2) -> ExampleCall:
    """``call`` narrowed to a few examples if ``module`` accepts that, else ``call``.

    Two and not one: a size of 1 broadcasts, and a batch dim that broadcasts cannot be told from one that is not there.
    """
    narrow = call.narrowed(examples)
    if narrow is None:
        return call
    try:
        with undisturbed(module), torch.no_grad():
            module(*narrow.args, **narrow.kwargs)
    except Exception:  # whatever the user's forward raises: this batch size is not for it
        return call
    return narrow


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, leaving training mode of every sub-module and the random state as they were."""
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)), evaluation(module):
        yield
