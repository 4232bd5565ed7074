"""Layers after which every token stays: no scores are computed there, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_compress.surgery.precision import DoublePrecision
from lightning_compress.token_policies import KeepAll, Thresholds, TokenPolicy, TopK
from lightning_compress.tokens import tap
from tests.tokens.agreement import agree, proven, run
from tests.tokens.encoders import CALLS, furthest

NAMES = ["bert-classes-sdpa", "bert-tags-eager", "torch-post-all-padded", "torch-pre-first-whole", "vit-base-sdpa"]
POLICIES: dict[str, tuple[TokenPolicy, int]] = {  # with the number of layers whose scores are wanted
    "first layer whole": (Thresholds((-1e4, 1.0)), 1),
    "second layer whole": (Thresholds((1.0, 0.0)), 1),
    "none whole": (Thresholds((0.9, 1.0)), 2),
    "share of the first layer": (TopK((1.0, 0.5)), 1),
    "accumulated": (TopK((1.0, 0.5), accumulated=True), 2),
    "all whole": (KeepAll(), 0),
}


def _counted(original: Any, calls: list[str]) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        calls.append(original.__name__)
        return original(*args, **options)

    return counted


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every layer whose scores were computed."""
    calls: list[str] = []
    for name in ("attention_with_scores", "scores_of_probabilities"):
        monkeypatch.setattr(tap, name, _counted(getattr(tap, name), calls))
    return calls


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("name", NAMES)
def test_only_scores_that_decide_are_computed(
    name: str, policy: str, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, proof = proven(name)
    scored.clear()
    chosen, wanted = POLICIES[policy]
    call = CALLS[name](5, seed=3)
    with torch.no_grad(), DoublePrecision():
        output, runtime = run(model, proof, call, chosen, saving=1000)  # one call for each layer
        assert len(scored) == wanted
        agree(model, proof, call, chosen)
        monkeypatch.setattr(type(chosen), "keeps_all", lambda self, layer: False)
        scored.clear()
        again, other = run(model, proof, call, chosen, saving=1000)
    assert len(scored) == 2
    assert furthest(output, again) < 1e-12
    assert runtime.counts is not None and other.counts is not None
    assert torch.equal(runtime.counts.entering, other.counts.entering)
    assert torch.equal(runtime.counts.real, other.counts.real)
