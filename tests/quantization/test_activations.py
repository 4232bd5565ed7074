"""Quantizers of activations: the rounding of the native kernel, ranges observed or learned, and their hooks."""

from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import apply_plan, discover, make_plan
from lightning_compress.quantization import (
    ActivationQuantizer,
    DynamicRange,
    InputState,
    LearnedRange,
    ObservedRange,
    QuantizationError,
    attach_input_quantizers,
    attach_quantizers,
    convert,
    detach_input_quantizers,
    input_quantizers,
)
from lightning_compress.quantization.activations import on_range
from lightning_compress.quantization.int8 import reduced_range
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.quantizers import Uniform
from tests.quantization.test_weights import Deep


def inputs_of_all_kinds(number: int) -> list[Tensor]:
    """Ranges of all sizes, on one side of 0 or on both, with ties, and only zeros."""
    choose, generator, found = random.Random(0), torch.Generator().manual_seed(0), []
    for kind in range(number):
        x = torch.randn(choose.choice([1, 2, 5]), choose.choice([1, 3, 8, 9, 31, 64, 100]), generator=generator)
        x = x * 10 ** choose.uniform(-9, 6) + choose.choice([0, 0, 1, -3]) * 10 ** choose.uniform(-6, 3)
        turned = [x, x.abs(), -x.abs(), (x * 4).round() / 4, x, torch.zeros_like(x)]
        found.append(turned[kind % 6])
    return found


def test_the_dynamic_range_is_that_of_the_native_kernel_bit_for_bit() -> None:
    for x in inputs_of_all_kinds(1200):
        for reduced in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated
                expected = torch.quantize_per_tensor_dynamic(x, torch.quint8, reduced).dequantize()
            assert torch.equal(DynamicRange(8, reduced)(x, InputState(), False), expected), (x, reduced)
            assert torch.equal(on_range(x, 127 if reduced else 255, 255), expected), (x, reduced)
    nothing = torch.full((2, 2), torch.nan)  # which the kernel refuses
    assert DynamicRange()(nothing, InputState(), False).isnan().all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_range_has_so_many_steps_and_keeps_zero(bits: int) -> None:
    quantizer, x = DynamicRange(bits, reduced=False if bits == 8 else None), torch.randn(50, 40, dtype=torch.float64)
    x[0, 0] = 0
    y = quantizer(x, InputState(), True)
    assert y[0, 0] == 0
    assert len(y.unique()) <= 2**bits
    step = float(x.max() - x.min()) / (2**bits - 1)
    assert float((y - x).abs().max()) <= step * (1 + 1e-9)
    assert float((y - x).abs().median()) <= step / 2


def test_eight_bits_are_what_this_machine_computes_with() -> None:
    assert DynamicRange().steps(torch.device("cpu")) == (127 if reduced_range() else 255)
    assert DynamicRange().steps(torch.device("cuda")) == 255
    assert DynamicRange(8, reduced=True).steps(torch.device("cuda")) == 127
    assert DynamicRange(4).steps(torch.device("cpu")) == 15


@pytest.mark.parametrize("quantizer", [DynamicRange(4), ObservedRange(4), LearnedRange(4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_types_and_gradients_pass(quantizer: ActivationQuantizer, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, dtype=dtype).requires_grad_()
    y = quantizer(x, quantizer.first_state(), True)
    assert y.dtype == dtype and y.shape == x.shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert set(gradient.unique().tolist()) <= {0.0, 1.0}
    assert float(gradient.mean()) > 0.8


def test_the_observed_range_follows_training_batches_and_stays_in_evaluation() -> None:
    quantizer, state = ObservedRange(2, momentum=0.5), InputState()
    x = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    assert torch.equal(quantizer(x, state, False), x)  # its own range, and nothing is remembered
    assert state.range is None and not quantizer.is_ready(state)
    quantizer(x, state, True)
    assert state.range is not None and state.range.tolist() == [-1, 2]
    quantizer(2 * x, state, True)
    assert state.range.tolist() == [-1.5, 3]
    large = torch.tensor([[-9.0, 0.0, 9.0]], dtype=torch.float64).requires_grad_()
    y = quantizer(large, state, False)
    assert state.range.tolist() == [-1.5, 3] and quantizer.is_ready(state)
    assert y.tolist() == [[-1.5, 0, 3]]  # steps of 1.5, -1.5 the first
    (gradient,) = torch.autograd.grad(y.sum(), large)
    assert gradient.tolist() == [[0, 1, 0]]


def test_the_learned_range_begins_with_the_first_batch_and_learns() -> None:
    quantizer = LearnedRange(4)
    for x, signed, high in (
        (torch.randn(6, 5, dtype=torch.float64), True, 7),
        (torch.rand(6, 5, dtype=torch.float64), False, 15),
    ):
        state = quantizer.first_state()
        step = state.step
        assert step is not None
        zeros = torch.zeros_like(x)
        assert torch.equal(quantizer(zeros, state, True), zeros) and not quantizer.is_ready(state)
        y = quantizer(x, state, True)
        assert state.signed is signed
        assert state.step is step  # an optimizer has it already
        assert step.item() == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(high))
        y.square().sum().backward()
        assert step.grad is not None

        # LSQ's gradient: per example, scaled by the elements of one
        c = step.item()
        at = x / c
        by_step = torch.where(
            at > high, high, torch.where(at < (-high if signed else 0), -high * signed, at.round() - at)
        )
        expected = float((2 * y.detach() * by_step).sum()) / math.sqrt(5 * high)
        assert float(step.grad) == pytest.approx(expected, rel=1e-6)
    assert LearnedRange(4, signed=True)(x, first := LearnedRange(4).first_state(), True) is not None
    assert first.signed is True


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def test_modules_compute_with_quantized_inputs() -> None:
    model, x = net().eval(), torch.randn(5, 4, dtype=torch.float64)
    plain = model(x)
    found = attach_input_quantizers(model, {"0": DynamicRange(4), "2": LearnedRange(3)})
    assert input_quantizers(model) == found and list(found) == ["0", "2"]
    y = model(x)
    first = torch.relu(model[0].forward(DynamicRange(4)(x, InputState(), False)))
    step = found["2"].step
    assert step is not None and found["2"].state.signed is False
    expected = model[2].forward(torch.clamp((first / step).round(), 0, 7) * step)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    assert [q.calls for q in found.values()] == [1, 1]
    assert list(model.state_dict()) == list(net().state_dict())
    with quantization_off():
        assert torch.equal(model(x), plain)
    for quantizing in found.values():
        quantizing.enabled = False
    assert torch.equal(model(x), plain)
    assert [q.calls for q in found.values()] == [1, 1]
    found["0"].enabled = True
    assert torch.equal(model[0](input=x), model[0](x))  # by name, too
    assert not torch.equal(model[0](x), model[0].forward(x))
    assert model[0](x[:0]).shape == (0, 6)
    assert detach_input_quantizers(model) == found
    assert torch.equal(model(x), plain) and input_quantizers(model) == {}
    assert not model[0]._forward_pre_hooks and not model[0]._forward_pre_hooks_with_kwargs


def test_inputs_that_are_no_numbers_are_left_alone() -> None:
    class Picky(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    model, x = Picky(), torch.arange(3)
    attach_input_quantizers(model, {"": DynamicRange(2)})
    assert model(x)[0][0] is x
    assert model("text", x) == (("text", x), {})
    assert model(how="text") == ((), {"how": "text"})
    assert model() == ((), {})


def test_copies_have_states_of_their_own() -> None:
    model, x = net().train(), torch.randn(5, 4, dtype=torch.float64)
    attach_input_quantizers(model, {"0": ObservedRange(4), "2": LearnedRange(4)})
    model(x)
    other = copy.deepcopy(model)
    ours, theirs = input_quantizers(model), input_quantizers(other)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert theirs["2"].step is not None and theirs["2"].step.requires_grad
    with torch.no_grad():
        theirs["2"].step.mul_(2)
    other.train()(3 * x)
    assert not torch.equal(theirs["0"].state.range, ours["0"].state.range)  # type: ignore[arg-type]
    assert torch.equal(theirs["2"].step, 2 * ours["2"].step)  # type: ignore[operator]
    detach_input_quantizers(other)
    assert not other[0]._forward_pre_hooks and len(input_quantizers(model)) == 2


def test_it_goes_with_quantized_weights_and_the_fused_encoder_layer_stays_out_of_the_way() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    attach_quantizers(layer, {"linear1.weight": Uniform(8)})
    found = attach_input_quantizers(layer, {"linear1": DynamicRange(), "linear2": DynamicRange()})
    with torch.no_grad():
        layer(x)
    assert [q.calls for q in found.values()] == [1, 1]


def test_a_model_with_quantized_inputs_is_cut_as_the_plain_one() -> None:
    torch.manual_seed(0)
    model, x = Deep().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    chosen = {"layer.linear1": DynamicRange(), "layer.linear2": LearnedRange(4), "head": ObservedRange(4)}
    found = attach_input_quantizers(model, chosen)
    model.train()(x)
    model.eval()
    attach_quantizers(model, {"layer.linear1.weight": Uniform(8), "head.weight": Uniform(8)})
    kinds = ("head", "ffn")
    structures, same = (discover(m, (x,), kinds=kinds, prove=True) for m in (model, plain))
    assert [(s.name, s.units, s.tier) for s in structures] == [(s.name, s.units, s.tier) for s in same]
    plan = make_plan(plain, same, macs=0.5)
    calls = {path: quantizing.calls for path, quantizing in found.items()}
    for m in (model, plain):
        report = apply_plan(m, plan, verify=((x,), {}))
        assert report.error is not None and report.error < 1e-12
    assert input_quantizers(model) == found
    assert {path: quantizing.calls for path, quantizing in found.items()} == calls  # the removal is that of the weights
    with quantization_off():
        torch.testing.assert_close(model(x), plain(x))
    assert torch.isfinite(model(x)).all()
    assert convert(model, "packed", ((x,), {}), seconds=0.01).error == 0


@pytest.mark.parametrize(
    ("chosen", "kind", "message"),
    [
        ({"9": DynamicRange()}, QuantizationError, r"path of a module of Sequential, but got '9'. It has '', '0', '1'"),
        ({"0": Uniform()}, TypeError, r"quantizer of activations for '0', but got Uniform. There are DynamicRange, "),
        ({"2": DynamicRange()}, QuantizationError, r"those of '2' are: ObservedRange\(.*detach_input_quantizers"),
        ({"again": DynamicRange(), "0": DynamicRange()}, QuantizationError, r"'0' is 'again' too. Name one of them"),
        ({"script": DynamicRange()}, QuantizationError, r"'script' is compiled \(scripted\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_refusals_change_nothing(chosen: Any, kind: type[Exception], message: str) -> None:
    model = net()
    model.add_module("again", model[0])
    model.add_module("script", torch.jit.script(nn.ReLU()))
    before = attach_input_quantizers(model, {"2": ObservedRange()})
    with pytest.raises(kind, match=message):
        attach_input_quantizers(model, {"1": DynamicRange(), **chosen})
    assert input_quantizers(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicRange(9), r"bits of DynamicRange to be an integer from 2 to 8, but got 9"),
        (lambda: DynamicRange(4, reduced=True), r"Expected 8 bits with reduced=True, but got 4. Leave reduced out"),
        (lambda: ObservedRange(1), r"bits of ObservedRange to be an integer from 2 to 8, but got 1"),
        (lambda: ObservedRange(8, 0.0), r"momentum, the part of a new batch, to be in \(0, 1\], but got 0.0"),
        (lambda: LearnedRange(True), r"bits of LearnedRange to be an integer from 2 to 8, but got True"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
