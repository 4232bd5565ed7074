"""Pruned tokens masked equal pruned tokens gone: outputs and gradients, in float64, for every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.surgery.precision import DoublePrecision
from lightning_compress.token_policies import KeepAll, Thresholds, TopK
from lightning_compress.tokens.forward import SoftPruning
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import ProvenTokens, prove_tokens
from tests.tokens.encoders import BUILD, CALLS, LAYERS, LENGTH, Encoder, built, furthest, outputs, shaken, states

EXACT = 1e-10


@cache
def proven(name: str) -> tuple[nn.Module, ProvenTokens]:
    model = built(name)
    return model, prove_tokens(model, (), CALLS[name](4, seed=7))


def thresholds(seed: int) -> Thresholds:
    generator = torch.Generator().manual_seed(seed)
    return Thresholds(tuple((0.6 + 0.6 * torch.rand(LAYERS - 1, generator=generator)).tolist()))


POLICIES = {
    "thresholds": thresholds(1),
    "top_k": TopK((0.7, 0.4)),
    "accumulated": TopK((0.6, 0.45), accumulated=True),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "eager gathers": {"worthwhile": 0.0, "saving": 1},
    "lazy": {"worthwhile": 0.3},
    "scattered": {"worthwhile": 0.0, "saving": 10**9, "scatter": True},
    "crowded": {"worthwhile": 0.0, "protected": (0, 1, 2, -1), "min_keep": 3},
    "unprotected": {"worthwhile": 0.0, "protected": (), "min_keep": 2},
}


@pytest.mark.parametrize("name", list(BUILD))
def test_masked_is_gathered(name: str) -> None:
    model, proof = proven(name)
    assert proof.error < EXACT
    assert proof.scatter == ("tags" in name or "base" in name or "-all-" in name)
    removed = 0.0
    with torch.no_grad(), DoublePrecision():  # eager attention casts to float32 inside
        for number, (kind, policy) in enumerate(POLICIES.items()):
            for batch, setting in ((1, "eager gathers"), (16, "eager gathers"), (5, list(SETTINGS)[1 + number])):
                call = CALLS[name](batch, 9 + batch % 4, seed=batch + number)
                settings = SETTINGS[setting]
                masked, reference = outputs(model, proof, policy, "mask", call, **settings)
                gathered, runtime = outputs(model, proof, policy, "gather", call, **settings)
                assert furthest(masked, gathered) < EXACT, (kind, batch, setting)
                assert torch.equal(runtime.counts.entering, reference.counts.entering)
                removed += float(runtime.counts.entering[0].sum() - runtime.counts.entering[-1].sum())
    assert removed > 20


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", ["bert-tags-sdpa", "distilbert-classes-eager", "torch-pre-all-padded"])
def test_settings(name: str, setting: dict[str, Any]) -> None:
    model, proof = proven(name)
    for seed, policy in enumerate(POLICIES.values()):
        call = CALLS[name](6, 13, seed=seed)
        guarded = torch.rand(6, 13, generator=torch.Generator().manual_seed(seed)) < 0.2
        with torch.no_grad():
            masked, _ = outputs(model, proof, policy, "mask", call, protected_mask=guarded, **setting)
            gathered, runtime = outputs(model, proof, policy, "gather", call, protected_mask=guarded, **setting)
        assert furthest(masked, gathered) < EXACT
        real = call["attention_mask"].bool() if "attention_mask" in call else ~call["mask"]
        through = runtime.counts.layers_of_tokens()
        assert bool((through[guarded & real] == LAYERS).all())
        assert bool((through[~real] <= 1).all())
        least = torch.minimum(real.sum(1), torch.tensor(setting.get("min_keep", 1)))
        assert bool((runtime.counts.entering >= least).all())


@pytest.mark.parametrize("name", ["bert-classes-sdpa", "albert-tags-eager", "modernbert-classes-sdpa", "vit-base-sdpa"])
def test_gradients(name: str) -> None:
    model, proof = proven(name)
    call, gradients = CALLS[name](6), {}
    for mode in ("mask", "gather"):
        model.zero_grad()
        output, _ = outputs(model, proof, thresholds(2), mode, call, worthwhile=0.0, saving=1)
        value = output[0]
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum().backward()
        gradients[mode] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert gradients["mask"].keys() == gradients["gather"].keys()
    assert max(float(g.abs().max()) for g in gradients["mask"].values()) > 1e-3
    for parameter, gradient in gradients["mask"].items():
        assert torch.allclose(gradient, gradients["gather"][parameter], rtol=0, atol=1e-9), parameter


@pytest.mark.parametrize("name", ["bert-tags-sdpa", "bert-tags-eager", "torch-post-all-padded", "deit-classes-sdpa"])
def test_soft_ends_as_hard(name: str) -> None:
    """The colder, the nearer to the hard decision; straight through, the same."""
    model, proof = proven(name)
    policy, call = thresholds(3), CALLS[name](6)
    values = torch.tensor(policy.values)
    with torch.no_grad():
        hard, runtime = outputs(model, proof, policy, "mask", call, worthwhile=0.0)
        real = real_tokens(call)
        for soft in (SoftPruning(values, 1e-6), SoftPruning(values, 0.1, straight_through=True)):
            softly, other = outputs(model, proof, KeepAll(), "soft", call, soft=soft)
            assert furthest_real(hard, softly, real) < 1e-9
            assert torch.allclose(other.counts.entering.double(), runtime.counts.entering.double(), atol=1e-4)
        warm, _ = outputs(model, proof, KeepAll(), "soft", call, soft=SoftPruning(values, 0.3))
        assert furthest_real(hard, warm, real) > 1e-4


def real_tokens(call: dict[str, Any]) -> Tensor | None:
    if "attention_mask" in call:
        return call["attention_mask"].bool()
    return None if call.get("mask") is None else ~call["mask"]


def furthest_real(one: Any, other: Any, real: Tensor | None) -> float:
    """`furthest`, without what padding gives."""
    first, second = (o if isinstance(o, Tensor) else o[0] for o in (one, other))
    if real is not None and first.shape[:2] == real.shape:
        first, second = first[real], second[real]
    return furthest(first, second)


def test_soft_gives_thresholds_gradients() -> None:
    model, proof = proven("bert-classes-sdpa")
    for settings in ({}, {"straight_through": True}, {"cumulative": False}):
        values = torch.full((LAYERS - 1,), 0.9, requires_grad=True)
        soft = SoftPruning(values, 0.2, **settings)
        output, runtime = outputs(model, proof, KeepAll(), "soft", CALLS["bert-classes-sdpa"](5), soft=soft)
        (gradient,) = torch.autograd.grad(output[0].sum(), values, retain_graph=True)
        assert bool((gradient.abs() > 1e-8).all())
        (gradient,) = torch.autograd.grad(runtime.counts.entering.sum(), values)
        assert bool((gradient < 0).all())


def test_faithful_form() -> None:
    """As published: what a layer returns times its own mask, no key masked; written out for a small encoder."""
    model = shaken(Encoder(pooled=False))
    call = states(4)
    proof = prove_tokens(model, (), call)
    values, temperature = (0.8, 1.1), 0.2
    x, mask = call["x"], call["mask"]
    real = (~mask).double()
    for number, layer in enumerate(model.encoder.layers):
        attended, weights = layer.self_attn(x, x, x, key_padding_mask=mask)
        if number < LAYERS - 1:
            soft = torch.sigmoid(((weights * real[:, :, None]).sum(1) - values[number]) / temperature)
            soft[:, 0] = 1.0
        x = layer.norm1(x + attended)
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        x = x * soft[..., None] if number < LAYERS - 1 else x
    settings = SoftPruning(torch.tensor(values), temperature, cumulative=False)
    got, _ = outputs(model, proof, KeepAll(), "soft", call, soft=settings)
    assert furthest_real(model.head(x), got, ~mask) < 1e-6  # masks are of single precision


def test_mask_mode_is_what_it_says() -> None:
    """No feed-forward part for pruned tokens, later layers without them, states frozen, queries uncounted: by hand."""
    model = shaken(Encoder(pooled=False))
    call = states(4)
    proof = prove_tokens(model, (), call)
    policy = Thresholds((0.8, 1.0))
    x, shown = call["x"], ~call["mask"]
    for number, layer in enumerate(model.encoder.layers):
        attended, weights = layer.self_attn(x, x, x, key_padding_mask=~shown)
        scores = (weights * shown[:, :, None]).sum(1)
        assert torch.allclose(scores.sum(1) / shown.sum(1), torch.ones(4, dtype=x.dtype))
        new = layer.norm1(x + attended)
        stays = shown
        if number < LAYERS - 1:
            stays = shown & ((scores >= policy.values[number]) | (torch.arange(LENGTH) == 0))
        new = layer.norm2(new + layer.linear2(torch.relu(layer.linear1(new))) * stays[..., None])
        x = torch.where(shown[..., None], new, x) if number else new
        shown = stays
    for mode in ("mask", "gather"):
        got, runtime = outputs(model, proof, policy, mode, call, worthwhile=0.0, saving=1)
        assert furthest(model.head(x), got) < EXACT
    assert float(runtime.counts.entering[-1].sum()) < 0.8 * float(runtime.counts.real.sum())


def test_off_is_the_model_itself() -> None:
    model, proof = proven("bert-tags-sdpa")
    call = CALLS["bert-tags-sdpa"](5)
    with torch.no_grad():
        before = model(**call)
        within, _ = outputs(model, proof, thresholds(1), "off", call)
        runtime = install_tokens(model, proof.runtime(thresholds(1)))
        pruned = model(**call)
        assert remove_tokens(model) is runtime
        after = model(**call)
    assert torch.equal(before[0], within[0])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[0], pruned[0])


def test_states_of_many_departures_are_put_back_in_order() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).double().eval()
    states_in = torch.randn(3, 20, 8, dtype=torch.float64)
    proof = prove_tokens(model, (states_in,))
    results = []
    for mode in ("mask", "gather"):
        runtime = proof.runtime(TopK((0.9, 0.7, 0.5, 0.3, 0.1)), mode=mode)
        runtime.worthwhile = 0.0
        install_tokens(model, runtime)
        with torch.no_grad():
            results.append(model(states_in))
        remove_tokens(model)
    assert float((results[0] - results[1]).abs().max()) < EXACT
    assert runtime.counts is not None and runtime.counts.entering[:, 0].tolist() == [20, 18, 14, 10, 6, 2]
