"""What a user does with the smaller model afterwards: train it, save and load it, generate with a cache."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from lightning_compress.analysis import discover
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.plan import PruningPlan
from lightning_compress.surgery import SurgeryReport, apply_plan, zero_units
from tests.zoo import MODELS

GENERATORS = ("GPT-2", "Llama", "T5", "BART")


@cache
def pruned(name: str) -> tuple[nn.Module, nn.Module, nn.Module, SurgeryReport]:
    """The dense model, the zeroed one, the small one without every second unit of every structure, and the report."""
    example = MODELS[name]
    model, kwargs = example.model(), example.kwargs or {}
    structures = discover(model, example.args, kwargs, prove=True)
    plan = PruningPlan.of(model, structures, {s.name: list(range(0, s.units, 2)) for s in structures})
    zeroed, small = copy.deepcopy(model), copy.deepcopy(model)
    zero_units(zeroed, plan)
    return model, zeroed, small, apply_plan(small, plan, verify=(example.args, kwargs))


def first_output(model: nn.Module, name: str) -> torch.Tensor:
    return next(output_tensors(model(*MODELS[name].args, **(MODELS[name].kwargs or {}))))


@pytest.mark.parametrize("name", MODELS)
def test_it_trains(name: str) -> None:
    small = copy.deepcopy(pruned(name)[2]).train()
    first_output(small, name).square().sum().backward()
    gradients = {n: p.grad for n, p in small.named_parameters() if p.grad is not None}
    assert all(g.shape == small.get_parameter(n).shape and g.isfinite().all() for n, g in gradients.items())
    # a bias of keys has no gradient but rounding noise: it shifts all scores of a query alike
    moving = {n: small.get_parameter(n).detach().clone() for n, g in gradients.items() if g.abs().max() > 1e-3}
    torch.optim.SGD(small.parameters(), lr=1e-2).step()
    assert len(moving) > 3 and all(not torch.equal(small.get_parameter(n), p) for n, p in moving.items())


@pytest.mark.parametrize("name", MODELS)
def test_saved_weights_load_into_a_replay_of_the_plan(name: str) -> None:
    model, _, small, report = pruned(name)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    apply_plan(fresh, PruningPlan.from_json(report.plan.to_json()))
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(first_output(fresh, name), first_output(small, name))


@pytest.mark.parametrize("name", GENERATORS)
def test_it_generates_with_a_cache_what_the_zeroed_model_generates(name: str) -> None:
    _, zeroed, small, _ = pruned(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, mask = MODELS[name].kwargs["input_ids"], MODELS[name].kwargs["attention_mask"]  # type: ignore[index]
    tokens = [m.generate(ids, attention_mask=mask, **options) for m in (zeroed, small)]
    assert torch.equal(*tokens) and tokens[0].shape[1] >= 6


@pytest.mark.parametrize("name", GENERATORS)
def test_another_attention_kernel_agrees(name: str) -> None:
    zeroed, small = (copy.deepcopy(m) for m in pruned(name)[1:3])
    for model in (zeroed, small):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(first_output(small, name), first_output(zeroed, name), rtol=1e-4, atol=1e-5)
