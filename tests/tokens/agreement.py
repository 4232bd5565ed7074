"""What every odd call must hold: pruned tokens masked give what pruned tokens gone give."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from lightning_compress.surgery.precision import DoublePrecision
from lightning_compress.token_policies import Thresholds, TokenPolicy
from lightning_compress.tokens.forward import TokenCounts
from lightning_compress.tokens.proof import ProvenTokens, prove_tokens
from lightning_compress.tokens.runtime import TokenRuntime
from tests.tokens.encoders import CALLS, Call, built, furthest, outputs

EXACT = 1e-10
POLICY = Thresholds((0.9, 1.0))


@cache
def proven(name: str) -> tuple[nn.Module, ProvenTokens]:
    """A model of `tests.tokens.encoders` and its proof."""
    model = built(name)
    return model, prove_tokens(model, (), CALLS[name](4, seed=7))


def run(
    model: nn.Module,
    proof: ProvenTokens,
    call: Call,
    policy: TokenPolicy = POLICY,
    mode: Any = "gather",
    protected: tuple[int, ...] | None = None,
    min_keep: int = 1,
    **attributes: Any,
) -> tuple[Any, TokenRuntime]:
    """Outputs of one call with a runtime that wastes no chance to let tokens go, and the runtime."""
    settings = {"worthwhile": 0.0, "saving": 1, **attributes}
    return outputs(model, proof, policy, mode, call, protected=protected, min_keep=min_keep, **settings)


@torch.no_grad()
def agree(model: nn.Module, proof: ProvenTokens, call: Call, *policy: TokenPolicy, **settings: Any) -> TokenCounts:
    """Assert that masking is gathering, in float64; returns what was counted."""
    with DoublePrecision():  # eager attention casts to float32 inside
        masked, reference = run(model, proof, call, *policy, mode="mask", **settings)
        gathered, runtime = run(model, proof, call, *policy, **settings)
    assert furthest(masked, gathered) < EXACT
    assert runtime.counts is not None and reference.counts is not None
    assert torch.equal(runtime.counts.entering, reference.counts.entering)
    assert torch.equal(runtime.counts.layers_of_tokens(), reference.counts.layers_of_tokens())
    return runtime.counts
