"""What a checkpoint knows of token pruning, and how a module takes it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_compress.token_policies import TokenPolicy, policy_from
from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.runtime import TokenRuntime, install_tokens, remove_tokens
from lightning_compress.tokens.stack import TokenStack


@dataclass(frozen=True)
class TokenSetup:
    """What was found out about a module.

    Args:
        stack: where its layers are.
        protected: positions that always stay.
        scatter: whether more than protected tokens are read behind the layers.
        costs: of the layers.
    """

    stack: TokenStack
    protected: tuple[int, ...]
    scatter: bool
    costs: LayerCosts

    def state(self) -> dict[str, Any]:
        """Text and numbers."""
        return {
            "stack": {**asdict(self.stack), "dims": {path: list(dims) for path, dims in self.stack.dims.items()}},
            "protected": list(self.protected),
            "scatter": self.scatter,
            "costs": asdict(self.costs),
        }


def setup_from_state(state: Mapping[str, Any]) -> tuple[TokenSetup, TokenPolicy]:
    """The set-up and the policy in the state of a callback."""
    setup = state["setup"]
    stack = dict(setup["stack"])
    stack["layers"] = tuple(stack["layers"])
    stack["dims"] = {path: tuple(dims) for path, dims in stack["dims"].items()}
    costs = LayerCosts(**{name: tuple(values) for name, values in setup["costs"].items()})
    found = TokenSetup(TokenStack(**stack), tuple(setup["protected"]), setup["scatter"], costs)
    return found, policy_from(state["policy"])


def install_from(traced: nn.Module, setup: TokenSetup, policy: TokenPolicy, min_keep: int) -> TokenRuntime:
    """Put a runtime on a module, in place of one that it may have."""
    remove_tokens(traced)
    return install_tokens(traced, TokenRuntime(setup.stack, policy, setup.protected, min_keep, setup.scatter))


__all__ = ["TokenSetup", "install_from", "setup_from_state"]
