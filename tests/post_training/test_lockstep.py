"""Batches that go through a model together: what they halt at, what they are told, and that nobody disturbs another."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import PruningPlan, Repair, apply_plan, discover, repair_readers
from lightning_compress.post_training import repair as repair_module
from lightning_compress.post_training.lockstep import HaltedCall, Lockstep, OutOfStep
from lightning_compress.post_training.products import Product, ProductTap
from lightning_compress.structures import Structures
from tests import families
from tests.exact import doubled
from tests.post_training.test_fisher import double
from tests.post_training.test_repair import calibration


class Stream(nn.Module):
    """Two blocks read x and add to one stream; the second has the units of the first, and two of its own."""

    def __init__(self, *, keeps: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.keeps, self.twice, self.state = keeps, twice, torch.zeros(1)
        self.up, self.down = nn.Linear(5, 4), nn.Linear(4, 5)
        self.up2, self.down2 = nn.Linear(5, 6), nn.Linear(6, 5)
        with torch.no_grad():
            self.up2.weight[:4], self.up2.bias[:4] = self.up.weight, self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        stream = x + self.down(F.gelu(self.up(x)))
        self.state = stream  # of this call, unless another comes in between
        read = self.down2(F.gelu(self.up2(x)))
        stream = 1 * read + self.state if self.keeps else read + stream  # 1 *: calls halt before they look at the state
        return stream + self.down(F.gelu(self.up(x))) if self.twice else stream


def stream(**options: bool) -> tuple[Stream, Structures, PruningPlan, list[Tensor]]:
    """In float64, and a plan that leaves one unit of the first block."""
    torch.manual_seed(0)
    model = Stream(**options).double().eval().requires_grad_(False)
    batches = [torch.randn(8, 3, 5, dtype=torch.float64) for _ in range(6)]
    structures = discover(model, (batches[0],), prove=True)
    first, second = sorted(structures, key=lambda s: s.units)
    assert (first.units, second.units) == (4, 6)
    return model, structures, PruningPlan.of(model, structures, {first.name: [0], second.name: range(6)}), batches


def test_what_one_block_loses_the_next_makes_good() -> None:
    model, structures, plan, batches = stream()
    elsewhere = torch.randn_like(batches[0])
    wanted = model(elsewhere)
    lost, good = repair_readers(model, structures, plan, calibration(batches), dampings=(0.0,))
    assert (lost.parameter, good.parameter) == ("down.weight", "down2.weight")
    assert lost.after > 1e-3 and good.before > 1e-3 and good.after < 1e-12
    apply_plan(model, plan, verify=((elsewhere,), {}))
    assert float((model(elsewhere) - wanted).abs().max() / wanted.abs().max()) < 1e-9


def both_ways(model: nn.Module, run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Repair], list[Repair], bool]:
    """Repairs in step and by passes of copies, and whether the first stayed in step."""
    used: list[str] = []
    by_passes = repair_module._by_passes

    def noted(*args: Any) -> Any:
        used.append("passes")
        return by_passes(*args)

    def never(*args: Any) -> Any:
        raise OutOfStep("for the test")

    monkeypatch.setattr(repair_module, "_by_passes", noted)
    first, other = copy.deepcopy(model), copy.deepcopy(model)
    in_step = run(first)
    stayed = not used
    monkeypatch.setattr(repair_module, "_in_step", never)
    passes = run(other)
    for (name, a), b in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), name
    return in_step, passes, stayed


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "nn.TransformerEncoder", "ViT", "T5"])
def test_in_step_as_by_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = families.MODELS[name]
    model = doubled(example.model())
    args, kwargs = double(example.args), double(example.kwargs or {})
    structures = discover(model, args, kwargs, kinds=("head", "ffn"), prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(max(1, s.units // 2)) for s in structures})
    generator = torch.Generator().manual_seed(0)

    def another(t: Any) -> Any:
        if isinstance(t, Tensor) and t.is_floating_point():
            return torch.randn(t.shape, generator=generator, dtype=t.dtype)
        random = isinstance(t, Tensor) and int(t.max()) > 1
        return torch.randint(3, 90, t.shape, generator=generator) if random else t

    batches = [
        {"args": tuple(map(another, args)), "kwargs": {k: another(v) for k, v in kwargs.items()}} for _ in "12345"
    ]

    def run(copied: nn.Module) -> list[Repair]:
        call = calibration(batches, lambda m, batch: m(*batch["args"], **batch["kwargs"]))
        return repair_readers(copied, structures, plan, call)

    in_step, passes, stayed = both_ways(model, run, monkeypatch)
    assert stayed and len(in_step) >= len(structures)
    assert [r.parameter for r in in_step] == [r.parameter for r in passes]
    assert [r.damping for r in in_step] == [r.damping for r in passes]
    assert [r.after for r in in_step] == pytest.approx([r.after for r in passes], rel=1e-6)


@pytest.mark.parametrize("what", ["keeps", "twice"])
def test_what_cannot_go_in_step_goes_by_passes(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, structures, plan, batches = stream(**{what: True})
    in_step, passes, stayed = both_ways(
        model, lambda copied: repair_readers(copied, structures, plan, calibration(batches)), monkeypatch
    )
    assert not stayed and in_step == passes and len(passes) == 2


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, structures, plan, batches = stream()
    weights, threads, calls = copy.deepcopy(model.state_dict()), threading.active_count(), [0]

    def call(model: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        output: Tensor = model(batch)
        if calls[0] > 4:
            raise RuntimeError("no more")
        return output

    with pytest.raises(RuntimeError, match="no more"):
        repair_readers(model, structures, plan, calibration(batches, call))
    assert threading.active_count() == threads
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def halted(model: nn.Module, x: Tensor, summed: tuple[str, ...] = ()) -> HaltedCall:
    names = {id(parameter): name for name, parameter in model.named_parameters() if name.startswith("down")}
    return HaltedCall(lambda: model(x), names, summed)


def test_a_halted_call_goes_on_with_the_weights_of_now() -> None:
    model, _, _, batches = stream()
    x = batches[0]
    hidden = F.gelu(model.up(x))
    call = halted(model, x, ("down.weight",))
    product = call.go()
    assert product is not None and product.parameter == "down.weight"
    assert call.inputs is not None and torch.equal(call.inputs, hidden)
    assert call.other is not None and torch.equal(call.other, x)
    model.down.weight.mul_(2)
    product = call.go()  # the second halts behind its product: nobody said that it is added to something
    assert product is not None and product.parameter == "down2.weight" and call.other is None
    model.down2.weight.mul_(-1)
    assert call.go() is None and torch.equal(call.result, model(x))
    assert call.inputs is None and not call.is_alive()


def test_calls_out_of_step_are_told_and_stopped() -> None:
    model, _, _, batches = stream()
    calls = [halted(model, batches[0]), halted(model, batches[1])]
    with pytest.raises(OutOfStep, match=r"expected down2\.weight, but a call came to down\.weight"):
        with Lockstep(calls, ("down.weight", "down2.weight")) as together:
            together.go("down2.weight")
    assert not any(call.is_alive() for call in calls)
    never = halted(model, batches[0])
    never.stop()
    assert not never.is_alive()


def test_a_halted_call_has_the_modes_of_who_made_it() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        call = HaltedCall(lambda: layer(x), {id(layer.weight): "weight"}, ())
        assert call.go() is not None and call.output is not None
        assert call.output.dtype == torch.bfloat16 and not call.output.requires_grad
        with torch.no_grad():
            layer.weight.zero_()  # of a cache in autocast it would be the old one
        assert call.go() is None and torch.equal(call.result.float(), layer(x).float())


# What the tap says of sums


class Sums:
    """What was told."""

    def __init__(self, weight: Tensor) -> None:
        self.told: list[tuple[Product, Tensor, Tensor]] = []
        self.tap = ProductTap({id(weight): "weight"}, joined=lambda *told: self.told.append(told))


@pytest.mark.parametrize(
    "form",
    [
        lambda y, r: y + r,
        lambda y, r: r + y,
        lambda y, r: torch.add(r, y),
        lambda y, r: y.add_(r),
        lambda y, r: r.clone().add_(F.dropout(y, 0.5, False)),
        lambda y, r: (y.transpose(0, 1) + r.transpose(0, 1)).transpose(0, 1),
        lambda y, r: (y.view(-1, 4) + r.view(-1, 4)).view(2, 3, 4),
    ],
)
def test_sums_are_told_in_the_layout_of_the_output(form: Any) -> None:
    layer, x, r = nn.Linear(5, 4).requires_grad_(False), torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    expected = layer(x) + r
    sums = Sums(layer.weight)
    with sums.tap:
        result = form(layer(x), r)
    assert torch.allclose(result, expected)
    ((product, output, other),) = sums.told
    assert product.parameter == "weight" and output.shape == other.shape == (2, 3, 4) and torch.equal(other, r)


@pytest.mark.parametrize(
    "form",
    [
        lambda y, x, r: y.relu() + r,  # not the output itself
        lambda y, x, r: (y.relu(), y + r)[1],  # it is read before
        lambda y, x, r: y + r[0, 0],  # a bias
        lambda y, x, r: y[:1] + r[:1],  # a part
        lambda y, x, r: torch.add(y, r, alpha=2),
        lambda y, x, r: y + y,
        lambda y, x, r: y + 1,
        lambda y, x, r: (x.mul_(2), y + r)[1],  # what was multiplied is gone
    ],
)
def test_other_sums_are_not_told(form: Any) -> None:
    layer, x, r = nn.Linear(5, 4).requires_grad_(False), torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    sums = Sums(layer.weight)
    with sums.tap:
        form(layer(x), x, r)
    assert not sums.told


def test_nothing_to_compute_again() -> None:
    with pytest.raises(RuntimeError, match="Expected a product before it is computed again, but there was none"):
        ProductTap({}).again()
