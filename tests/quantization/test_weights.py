"""Quantizers on weights: the model computes with quantized weights, and everything else sees the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import PruningPlan, apply_plan, discover, make_plan
from lightning_compress.quantization import (
    QuantizationError,
    attach_quantizers,
    detach_quantizers,
    holders_of,
    weight_quantizers,
)
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.quantizers import Binary, LearnedStep, Quantizer, Stochastic, Ternary, Uniform

EVERY: list[Quantizer] = [Uniform(8), Uniform(3, "group:4"), Stochastic(4), Binary(), Ternary(), LearnedStep(4)]


def mlp(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


NAMES = ("0.weight", "2.weight")


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_the_model_computes_with_quantized_weights(quantizer: Quantizer) -> None:
    model, plain = mlp().eval(), mlp().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attach_quantizers(model, dict.fromkeys(NAMES, quantizer))
    assert list(found) == list(NAMES)
    for name in NAMES:
        parameter = plain.get_parameter(name)
        parameter.data = quantizer(parameter.data, step=quantizer.first_step(parameter.data))
    assert torch.equal(model(inputs()), plain(inputs()))
    assert {n: q.calls for n, q in found.items()} == dict.fromkeys(NAMES, 1)

    # the rest of the world sees the plain model
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == "Linear"
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in model.named_parameters()] == list(before)
    with quantization_off():
        assert model[0].weight is dict(model.named_parameters())["0.weight"]
        assert torch.equal(model(inputs()), mlp()(inputs()))

    assert detach_quantizers(model) == found
    assert type(model[0]) is nn.Linear
    assert weight_quantizers(model) == {}
    assert torch.equal(model(inputs()), mlp()(inputs()))


def test_gradients_reach_the_weights_and_the_steps() -> None:
    model = mlp().train()
    found = attach_quantizers(model, {"0.weight": LearnedStep(4), "2.weight": Uniform(8)})
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    model(inputs()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    step = found["0.weight"].step
    assert step is not None
    assert step.grad is not None
    assert step.grad.abs().sum() > 0


def test_chance_goes_by_seed_name_and_draw_and_evaluation_knows_none() -> None:
    model = mlp()
    found = attach_quantizers(model, dict.fromkeys(NAMES, Stochastic(4)), seed=7)
    first, second = found.values()
    model.train()
    one = model[0].weight
    assert torch.equal(model[0].weight, one)  # a repeated forward sees the same weights
    first.draw += 1
    assert not torch.equal(model[0].weight, one)
    first.draw -= 1
    first.seed += 1
    assert not torch.equal(model[0].weight, one)
    first.seed -= 1
    assert torch.equal(model[0].weight, one)
    first.name = second.name
    assert not torch.equal(model[0].weight, one)
    model.eval()
    quiet = model[0].weight
    first.draw += 1
    assert torch.equal(model[0].weight, quiet)


def test_a_part_of_the_weight_is_quantized_in_training() -> None:
    model = nn.Linear(100, 100).train()
    (quantizing,) = attach_quantizers(model, {"weight": Uniform(2)}).values()
    quantized, raw = Uniform(2)(model._parameters["weight"].detach()), model._parameters["weight"].detach()
    quantizing.mix = 0.3
    value = model.weight.detach()
    chosen = value == quantized
    assert ((value == raw) | chosen).all()
    assert float(chosen.double().mean()) == pytest.approx(0.3, abs=0.02)
    model.eval()
    assert torch.equal(model.weight, quantized)
    quantizing.enabled = False
    assert torch.equal(model.weight, raw)


def test_a_shared_parameter_has_one_quantizer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    model, ids = Tied().eval(), torch.arange(6)
    weight = Uniform(4)(model.table.weight.detach())
    found = attach_quantizers(model, {"table.weight": Uniform(4), "out.weight": Uniform(4)})
    assert list(found) == ["table.weight"] == list(weight_quantizers(model))
    assert [path for path, _, _ in holders_of(model, found["table.weight"])] == ["table", "out"]
    torch.testing.assert_close(model(ids), weight @ weight.T)
    assert found["table.weight"].calls == 2
    detach_quantizers(model)
    with pytest.raises(QuantizationError, match=r"is shared, but it is 'table.weight' too, which gets Uniform\(bits=4"):
        attach_quantizers(model, {"table.weight": Uniform(4), "out.weight": Uniform(8)})
    assert weight_quantizers(model) == {}


def test_attention_of_torch_reads_its_packed_weights() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    plain = copy.deepcopy(attention)
    for name in ("in_proj_weight", "out_proj.weight"):
        plain.get_parameter(name).data = Uniform(3)(plain.get_parameter(name).data)
    found = attach_quantizers(attention, dict.fromkeys(("in_proj_weight", "out_proj.weight"), Uniform(3)))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for mode in (True, False):
        attention.train(mode)
        plain.train(mode)
        torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    with torch.no_grad():  # the fused path
        torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], plain(x, x, x, need_weights=False)[0])
    assert all(quantizing.calls >= 2 for quantizing in found.values())


def test_copies_have_quantizers_of_their_own() -> None:
    model = mlp()
    attach_quantizers(model, dict.fromkeys(NAMES, LearnedStep(4)))
    other = copy.deepcopy(model)
    ours, theirs = weight_quantizers(model)["0.weight"], weight_quantizers(other)["0.weight"]
    assert ours is not theirs
    assert ours.step is not None
    assert theirs.step is not None
    with torch.no_grad():
        theirs.step.mul_(3)
    assert not torch.equal(model.eval()(inputs()), other.eval()(inputs()))
    detach_quantizers(other)
    assert list(weight_quantizers(model)) == list(NAMES)


# With surgery


class Deep(nn.Module):
    """Structures of FFN units and attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


WEIGHTS = (
    "layer.self_attn.in_proj_weight",
    "layer.self_attn.out_proj.weight",
    "layer.linear1.weight",
    "layer.linear2.weight",
    "head.weight",
)


@pytest.mark.parametrize("scope", ["row", "tensor", "group:2"])
def test_a_quantized_model_is_discovered_and_cut_as_the_plain_one(scope: str) -> None:
    torch.manual_seed(0)
    model, x = Deep().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    found = attach_quantizers(model, dict.fromkeys(WEIGHTS, LearnedStep(4, scope)))
    steps = {}
    for name, quantizing in found.items():
        assert quantizing.step is not None
        with torch.no_grad():
            quantizing.step.mul_(1 + 0.5 * torch.rand(quantizing.step.shape, dtype=torch.float64))
        steps[name] = quantizing.step.detach().clone()
    kinds = ("head", "ffn")
    structures, same = (discover(m, (x,), kinds=kinds, prove=True) for m in (model, plain))
    assert [(s.name, s.units, s.tier) for s in structures] == [(s.name, s.units, s.tier) for s in same]
    assert list(weight_quantizers(model)) == list(WEIGHTS)
    plan = make_plan(plain, same, macs=0.5)
    report = apply_plan(model, plan, verify=((x,), {}))
    assert report.error is not None
    assert report.error < 1e-12
    apply_plan(plain, plan, verify=((x,), {}))
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    after = weight_quantizers(model)
    assert list(after) == list(WEIGHTS)
    (ffn,) = (s for s in plan.structures if s.kind == "ffn")
    kept = torch.tensor(plan.kept[ffn.name])
    step = after["layer.linear1.weight"].step
    assert step is not None
    if scope == "row":
        assert torch.equal(step, steps["layer.linear1.weight"][kept])
        assert torch.equal(after["layer.linear2.weight"].step, steps["layer.linear2.weight"])
    elif scope == "tensor":
        assert torch.equal(step, steps["layer.linear1.weight"])
    assert torch.isfinite(model(x)).all()
    for name, quantizing in after.items():
        weight = dict(model.named_parameters())[name].detach()
        stored = quantizing.quantize(weight)
        assert torch.equal(stored.dequantized(), quantizing.quantizer(weight, step=quantizing.step))


def test_what_cannot_be_cut_leaves_the_quantizers_as_they_were() -> None:
    model, x = mlp(6).eval(), inputs()
    structures = discover(model, (x,), kinds=("ffn",), prove=True)
    found = attach_quantizers(model, {"0.weight": LearnedStep(4), "2.weight": LearnedStep(4, "group:3")})
    (name,) = [s.name for s in structures if s.units == 6]
    plan = PruningPlan.of(model, structures, {name: range(4)})
    before, steps = model(x), [quantizing.step for quantizing in found.values()]
    with pytest.raises(QuantizationError, match=r"In '2.weight', which has become smaller: Expected rows that are"):
        apply_plan(model, plan, verify=((x,), {}))
    assert torch.equal(model(x), before)
    assert all(q.step is s for q, s in zip(weight_quantizers(model).values(), steps, strict=True))


# Refusals


def _nan() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


def _twice() -> nn.Module:
    model = mlp()
    attach_quantizers(model, {"0.weight": Binary()})
    return model


@pytest.mark.parametrize(
    ("make", "name", "quantizer", "message"),
    [
        (mlp, "9.weight", Uniform(), r"name of a parameter of Sequential, but got '9.weight'. It has '0.weight', "),
        (_nan, "0.weight", Uniform(), r"In '0.weight': Expected finite weights, but 1 of the 32 elements"),
        (_twice, "0.weight", Uniform(), r"'0.weight' has one: Binary\(.*Take it off first: detach_quantizers"),
        (mlp, "0.weight", Uniform(4, "group:3"), r"In '0.weight': Expected rows that are a multiple of 3"),
        (
            lambda: nn.LSTM(3, 4),
            "weight_ih_l0",
            Uniform(),
            r"'weight_ih_l0' belongs to LSTM, which keeps a list",
        ),
    ],
)
def test_refusals_change_nothing(make: Any, name: str, quantizer: Quantizer, message: str) -> None:
    model = make()
    before = weight_quantizers(model)
    kinds = [type(module) for module in model.modules()]
    good = {"2.weight": Uniform()} if isinstance(model, nn.Sequential) else {}
    with pytest.raises(QuantizationError, match=message):
        attach_quantizers(model, {**good, name: quantizer})
    assert weight_quantizers(model) == before
    assert [type(module) for module in model.modules()] == kinds
