"""What a checkpoint knows of token pruning, and how a module takes it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.install import remove_tokens
from lightning_compress.tokens.record import read_token_record, token_records
from lightning_compress.tokens.runtime import Fill, TokenRuntime
from lightning_compress.tokens.stack import TokenStack

OWNER = "TokenPruning"


@dataclass(frozen=True)
class TokenSetup:
    """What was found out about a module.

    Args:
        stack: where its layers are.
        protected: positions that always stay.
        scatter: whether more than protected tokens are read behind the layers.
        costs: of the layers.
        fill: what tokens that left have behind them.
    """

    stack: TokenStack
    protected: tuple[int, ...]
    scatter: bool
    costs: LayerCosts
    fill: Fill = "state"


def runtime_state(traced: nn.Module, setup: TokenSetup) -> dict[str, Any]:
    """The runtime on ``traced``, and the costs of its layers, as text and numbers."""
    (record,) = (record for record in token_records(traced) if record.module == "")
    return {"record": record.state, "costs": asdict(setup.costs)}


def install_state(traced: nn.Module, state: Mapping[str, Any]) -> tuple[TokenRuntime, TokenSetup]:
    """Put a runtime on a module, in place of one that it may have."""
    record = read_token_record({"module": "", "runtime": state["record"]}, "token pruning in the checkpoint")
    remove_tokens(traced)
    runtime = record.install(traced)
    costs = LayerCosts(**{name: tuple(values) for name, values in state["costs"].items()})
    return runtime, TokenSetup(runtime.stack, runtime.protected, runtime.scatter, costs, runtime.fill)


def runtimes_in(checkpoint: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What a checkpoint tells of token pruning: names of modules and what ``install_state`` takes."""
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(OWNER)]
    return [(state["module"], state["runtime"]) for state in states if state.get("runtime") is not None]


__all__ = ["TokenSetup", "install_state", "runtime_state", "runtimes_in"]
