"""Recent calls of a module, with which the cost of hard decisions is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.example import ExampleCall, undisturbed
from lightning_compress.callbacks.processes import Processes
from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.distribution import TokenDistribution
from lightning_compress.tokens.runtime import TokenRuntime

KEPT = 12
PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class TokenCall:
    """A call, and the mask of the tokens that were protected in it."""

    call: ExampleCall
    protected: Tensor | None = None


class RecentCalls:
    """The last few calls of a module in training."""

    def __init__(self) -> None:
        self._calls: deque[TokenCall] = deque(maxlen=KEPT)

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[TokenCall]:
        return iter(self._calls)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], protected: Tensor | None) -> None:
        """Keep copies of the arguments."""
        mask = None if protected is None else protected.clone()
        self._calls.append(TokenCall(ExampleCall.copied(args, kwargs), mask))

    def clear(self) -> None:
        """Forget all."""
        self._calls.clear()

    def state(self) -> list[Any]:
        """The calls, as far as they consist of what a checkpoint may hold."""
        return [
            {"args": list(kept.call.args), "kwargs": kept.call.kwargs, "protected": kept.protected}
            for kept in self._calls
            if all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves((kept.call.args, kept.call.kwargs)))
        ]

    def load(self, state: list[Mapping[str, Any]], device: torch.device) -> None:
        """What ``state`` has described."""
        self._calls.clear()
        for kept in state:
            args, kwargs, mask = pytree.tree_map_only(
                Tensor, lambda t: t.to(device), (tuple(kept["args"]), dict(kept["kwargs"]), kept["protected"])
            )
            self._calls.append(TokenCall(ExampleCall(args, kwargs), mask))


def measure_tokens(
    traced: nn.Module,
    runtime: TokenRuntime,
    calls: list[TokenCall],
    costs: LayerCosts,
    processes: Processes,
    context: AbstractContextManager[Any],
) -> TokenDistribution:
    """What the policy of ``runtime``, installed on ``traced``, keeps of the examples of all processes."""

    def measured() -> tuple[Tensor, Tensor]:
        before = runtime.protected_mask
        entering, real = [], []
        try:
            with torch.inference_mode(False), torch.no_grad(), undisturbed(traced), context:
                for kept in calls:
                    runtime.protected_mask = kept.protected
                    traced(*kept.call.args, **kept.call.kwargs)
                    counts = runtime.counts
                    assert counts is not None
                    entering.append(counts.entering.double().cpu())
                    real.append(counts.real.double().cpu())
        finally:
            runtime.protected_mask = before
        return torch.cat(entering, 1), torch.cat(real)

    what = "count tokens that stay"
    parts = processes.gather(what, processes.together(what, measured))
    return TokenDistribution.together([TokenDistribution(entering, real, costs) for entering, real in parts])


__all__ = ["KEPT", "RecentCalls", "TokenCall", "measure_tokens"]
