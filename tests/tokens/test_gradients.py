"""Training with pruned tokens: gradients of thresholds against differences, dropout, thresholds without an end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.surgery.precision import DoublePrecision
from lightning_compress.token_policies import KeepAll, Thresholds
from lightning_compress.tokens.forward import SoftPruning
from lightning_compress.tokens.install import install_tokens
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.tap import AttentionTap
from tests.tokens.agreement import EXACT, POLICY, proven, run
from tests.tokens.encoders import CALLS, LAYERS, Encoder, furthest, states

NAMES = ["bert-tags-sdpa", "bert-tags-eager", "torch-post-all-padded"]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_thresholds_are_differences(name: str, cumulative: bool) -> None:
    """Of the outputs and of the tokens that enter the layers, in float64.

    Cumulative masks pass no gradient on to scores, so that only the last threshold, behind which nothing is decided,
    has the whole one.
    """
    model, proof = proven(name)
    call = CALLS[name](3)

    def function(values: Tensor) -> Tensor:
        with DoublePrecision():
            values = torch.cat((values.new_tensor([0.8]), values)) if cumulative else values
            soft = SoftPruning(values, 0.3, cumulative=cumulative)
            output, runtime = run(model, proof, call, KeepAll(), mode="soft", soft=soft)
        assert runtime.counts is not None
        return torch.cat((first(output).flatten()[:6], runtime.counts.entering[1:].double().flatten()))

    values = torch.tensor([1.1] if cumulative else [0.8, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (values,), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("cumulative", [True, False])
def test_scores_get_gradients_as_published_only(cumulative: bool) -> None:
    model, proof = proven("torch-post-all-padded")
    model.zero_grad()
    soft = SoftPruning(torch.tensor([0.8, 1.1]), 0.3, cumulative=cumulative)
    _, runtime = run(model, proof, CALLS["torch-post-all-padded"](3), KeepAll(), mode="soft", soft=soft)
    assert runtime.counts is not None
    assert runtime.counts.entering.requires_grad != cumulative


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("ends", [(1, 1), (-1, -1), (1, -1), (-1, 1)])
def test_infinite_thresholds_keep_all_or_none(ends: tuple[int, int], straight_through: bool, name: str) -> None:
    model, proof = proven(name)
    call = CALLS[name](4)
    values = (torch.tensor(ends, dtype=torch.float32) * torch.inf).requires_grad_()
    soft = SoftPruning(values, 0.1, straight_through=straight_through)
    for protected in ((0,), ()):
        with DoublePrecision():
            output, runtime = run(model, proof, call, KeepAll(), "soft", protected, soft=soft)
        (gradient,) = torch.autograd.grad(first(output).sum(), values)
        assert bool(first(output).isfinite().all()) and gradient.tolist() == [0, 0]
        if protected:
            hard = Thresholds(tuple(1e9 * end for end in ends))
            with torch.no_grad(), DoublePrecision():
                expected, reference = run(model, proof, call, hard, "mask", protected)
            real = call["attention_mask"].bool() if "attention_mask" in call else ~call["mask"]
            assert furthest(first(expected)[real], first(output)[real]) < EXACT * 1e3  # a sure logit is 30
            assert runtime.counts is not None and reference.counts is not None
            assert torch.allclose(runtime.counts.entering.double(), reference.counts.entering.double())


def test_thresholds_of_a_policy_are_finite() -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(ValueError, match="finite numbers"):
            Thresholds((0.5, float(value)))


@pytest.mark.parametrize("mode", ["gather", "mask", "soft"])
@pytest.mark.parametrize("where", ["attention", "layers"])
def test_dropout_in_training(mode: str, where: str) -> None:
    """Tokens leave, shapes and gradients are whole, and a call without dropout is the one of evaluation."""
    torch.manual_seed(0)
    model = Encoder(pooled=False).double()
    call = states(5)
    proof = prove_tokens(model, (), call)
    runtime = install_tokens(model, proof.runtime(POLICY, mode="gather", train_mode=mode))
    runtime.worthwhile, runtime.saving = 0.0, 1
    values = torch.tensor([0.9, 1.0], requires_grad=True)
    runtime.soft = SoftPruning(values, 0.2)
    model.train()
    still = model(**call)
    if mode != "soft":
        with torch.no_grad():
            assert furthest(still, model.eval()(**call)) < EXACT
    model.train()
    for layer in model.encoder.layers:
        parts = [layer.self_attn] if where == "attention" else [layer.dropout, layer.dropout1, layer.dropout2]
        for part in parts:
            setattr(part, "dropout" if where == "attention" else "p", 0.3)
    torch.manual_seed(1)
    output = model(**call)
    assert output.shape == still.shape and furthest(still, output) > 1e-3
    assert runtime.counts is not None
    assert runtime.counts.entering.shape == (LAYERS, 5)
    assert float(runtime.counts.entering[-1].detach().sum()) < float(runtime.counts.real.sum())
    (output.square().mean() + runtime.counts.entering.sum() * 1e-3).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert (values.grad is not None) == (mode == "soft")
    assert values.grad is None or bool((values.grad != 0).all() and values.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_softmax_none_of_whose_keys_is_left_is_no_nan(dtype: torch.dtype) -> None:
    """Of an empty row, keys that are left get the weight; where none is, the bias is left out."""
    logits = torch.full((2, 1, 3, 3), torch.finfo(dtype).min, dtype=dtype)
    bias = torch.tensor([[0.0, -torch.inf, -70.0], [-torch.inf] * 3], dtype=torch.float64)
    with AttentionTap(2, 3, key_bias=bias) as tap:
        probabilities = torch.softmax(logits, -1)
    half = torch.tensor([0.5, 0.0, 0.5] if dtype == torch.float64 else [1.0, 0.0, 0.0], dtype=dtype)
    assert torch.equal(probabilities[0, 0, 0], half)
    assert torch.allclose(probabilities[1], torch.full((), 1 / 3, dtype=dtype))
    assert bool(tap.heard[0].scores.isfinite().all())  # type: ignore[union-attr]
