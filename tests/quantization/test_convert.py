"""Conversion: the integers are those of the prepared model, and so are its outputs."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import discover
from lightning_compress.quantization import (
    BACKENDS,
    ConversionReport,
    DynamicRange,
    LearnedRange,
    ObservedRange,
    QuantizationError,
    attach_input_quantizers,
    attach_quantizers,
    convert,
    detach_input_quantizers,
    detach_quantizers,
    input_quantizers,
    int8,
    packed_weights,
    plain_class,
    weight_quantizers,
)
from lightning_compress.quantization.int8 import reduced_range
from lightning_compress.quantization.kernels import KERNEL
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.quantizers import Binary, LearnedStep, Quantizer, Stochastic, Ternary, Uniform, packed_bytes
from tests.zoo import MODELS

EVERY: list[Quantizer] = [
    Uniform(8),
    Uniform(8, "tensor", symmetric=False),
    Uniform(3, "group:2"),
    Uniform(2, "row", symmetric=False),
    Stochastic(4),
    Stochastic(8, strict=False),  # nine bits
    Stochastic(1),
    Binary(),
    Ternary("tensor"),
    LearnedStep(4),
]


class Zoo(nn.Module):
    """Everything that holds a weight: tables, convolutions, attention, linear layers, a bare parameter, a tied one."""

    def __init__(self, odd: int = 0) -> None:
        super().__init__()
        width = 8 + odd
        self.table = nn.Embedding(10, width)
        self.conv, self.turn = nn.Conv1d(width, width, 3, padding=1), nn.ConvTranspose1d(width, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, width, bias=False)
        self.image = nn.Conv2d(1, 2, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(2, width))
        self.out = nn.Linear(width, 10)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.turn(self.conv(self.table(ids).mT)).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.down(torch.tanh(self.up(x)))
        x = self.image(x.unsqueeze(1)).mean(1) * self.gain[1]
        return self.out(x)


def zoo(odd: int = 0, dtype: torch.dtype = torch.float64) -> Zoo:
    torch.manual_seed(0)
    return Zoo(odd).to(dtype).eval()


def weights_of(model: nn.Module, scope: str = "row") -> list[str]:
    return [n for n, p in model.named_parameters() if p.dim() > 1 and (scope == "row" or p[0].numel() % 2 == 0)]


IDS = torch.tensor([[1, 2, 3, 4, 9], [0, 0, 5, 9, 8]])


@pytest.mark.parametrize("backend", ["packed", "unpacked"])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_integers_and_outputs_are_bit_equal(quantizer: Quantizer, odd: int, backend: str) -> None:
    model = zoo(odd)
    names = weights_of(model, "even" if "group" in quantizer.scope else "row")
    attach_quantizers(model, dict.fromkeys(names, quantizer))
    prepared = copy.deepcopy(model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    report = convert(model, backend, ((IDS,), {}), seconds=0.01)
    assert report.backend == backend and report.error == 0
    found = packed_weights(model)
    assert list(found) == names == list(report.converted)
    parameters = dict(prepared.named_parameters())
    rest = sum(p.numel() * p.element_size() for n, p in parameters.items() if n not in names)
    for name, quantizing in weight_quantizers(prepared).items():
        expected, got = quantizing.quantize(parameters[name]), found[name].quantized()
        assert got.integers.dtype == expected.integers.dtype
        assert torch.equal(got.integers, expected.integers)
        assert torch.equal(got.grid.scale, expected.grid.scale)
        assert torch.equal(got.dequantized(), expected.dequantized())
        assert found[name].form.bytes == expected.bytes
        rest += expected.bytes
    assert (report.bytes_before, report.bytes_after) == (before, rest)
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == rest
    with torch.no_grad():
        assert torch.equal(model(IDS), prepared(IDS))
        assert torch.equal(model.table(IDS), prepared.table(IDS))
        assert torch.equal(model.table.weight, prepared.table.weight)
    assert not weight_quantizers(model)
    assert not {n for n, _ in model.named_parameters()} & set(names)


def test_the_state_has_the_integers_once_and_goes_from_model_to_model() -> None:
    model, other = zoo(), zoo()
    for m in (model, other):
        attach_quantizers(m, dict.fromkeys(weights_of(m), Uniform(4, symmetric=False)))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    for m in (model, other):
        convert(m, "unpacked")
        m(IDS)  # values are kept, and must go
    state = model.state_dict()
    assert {n for n in state if n.startswith(("table.", "out."))} == {
        "table.weight_packed",
        "table.weight_scale",
        "table.weight_offset",
        "out.bias",
    }
    assert state["table.weight_packed"].dtype == torch.uint8
    assert state["table.weight_packed"].shape == (packed_bytes(80, 4),)
    assert not torch.equal(model(IDS), other(IDS))
    other.load_state_dict(state)
    assert torch.equal(model(IDS), other(IDS))
    other.load_state_dict(state, assign=True)
    assert torch.equal(model(IDS), other(IDS))
    with pytest.raises(RuntimeError, match=r"table.weight_packed"):
        other.load_state_dict(zoo().state_dict())


def test_rows_are_unpacked_where_they_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.quantization.packed import PackedWeight

    for bits, width in ((8, 3), (4, 4), (4, 5), (2, 3), (1, 8), (1, 7)):
        table = nn.Embedding(11, width, padding_idx=0).double()
        quantizer = Uniform(bits, "row") if bits > 1 else Binary("tensor")
        attach_quantizers(table, {"weight": quantizer})
        expected = quantizer(table._parameters["weight"].detach())  # type: ignore[union-attr]
        convert(table, "packed")
        with monkeypatch.context() as patch:
            patch.setattr(PackedWeight, "values", lambda self: pytest.fail("the whole table was unpacked"))
            for ids in (torch.randint(0, 11, (3, 4)), torch.tensor(10), torch.empty(0, 2, dtype=torch.int32)):
                assert torch.equal(table(ids), nn.functional.embedding(ids, expected))
            for wrong in (-1, 11):
                with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
                    table(torch.tensor([wrong]))


def test_embeddings_with_forwards_of_their_own_keep_them() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    for table in (Scaled(10, 4), nn.Embedding(10, 4, max_norm=0.5), nn.EmbeddingBag(10, 4)):
        attach_quantizers(table, {"weight": Uniform(4)})
        prepared = copy.deepcopy(table)
        convert(table, "packed")
        with torch.no_grad():
            assert torch.equal(table(IDS), prepared(IDS))


def test_types_and_copies_follow() -> None:
    model = zoo(dtype=torch.float32)
    attach_quantizers(model, dict.fromkeys(weights_of(model), Uniform(4)))
    convert(model, "unpacked")
    before = model(IDS)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.table.weight.dtype == torch.bfloat16
    assert torch.equal(half.table.weight, model.table.weight.bfloat16())
    assert half.table.weight_scale.dtype == torch.float32  # wide enough to come back
    double = half.double()
    assert double.table.weight.dtype == double.table.weight_scale.dtype == torch.float64
    assert torch.equal(double.table.weight.float(), model.table.weight)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.table.weight_scale.mul_(2)
    assert torch.equal(model(IDS), before)
    again = copy.deepcopy(model.out)  # what it shares comes along
    assert torch.equal(again.weight, model.out.weight)
    assert type(again) is type(model.out) and plain_class(model.out) is nn.Linear
    with torch.inference_mode():
        copied(IDS)
    copied(IDS).sum().backward()  # values that were kept are no tensors of inference mode
    assert copied.up.bias.grad is not None
    empty = copy.deepcopy(model).to("meta")
    assert empty.table.weight.is_meta


# The int8 kernel


def layer(inputs: int, outputs: int, bias: bool, quantizer: Quantizer, reduced: bool | None = None) -> nn.Linear:
    model = nn.Linear(inputs, outputs, bias)
    attach_quantizers(model, {"weight": quantizer})
    attach_input_quantizers(model, {"": DynamicRange(8, reduced)})
    return model.eval()


NATIVE: list[Quantizer] = [
    Uniform(8),
    Uniform(8, "tensor"),
    Uniform(4),
    Uniform(2, "tensor"),
    Stochastic(8),
    LearnedStep(8),
    LearnedStep(3, "tensor"),
    Ternary(),
]


def test_int8_products_are_those_of_the_prepared_model() -> None:
    choose, worst = random.Random(0), 0.0
    torch.manual_seed(0)
    for case in range(1000):
        quantizer = NATIVE[case % len(NATIVE)]
        inputs, outputs = choose.choice([1, 2, 3, 8, 31, 64, 100]), choose.choice([1, 3, 8, 17])
        model = layer(inputs, outputs, choose.random() < 0.5, quantizer)
        shape = choose.choice([(inputs,), (3, inputs), (2, 3, inputs)])
        x = 10 ** choose.uniform(-3, 3) * torch.randn(shape) + choose.choice([0, 0, 1, -3])
        x = x.abs() if choose.random() < 0.2 else x
        with torch.no_grad():
            expected = model(x)
            integers = weight_quantizers(model)["weight"].quantize(model._parameters["weight"]).integers  # type: ignore[arg-type]
            # a sum of float32 is as exact as its terms are large: where they cancel, its own size says nothing
            terms = x.abs() @ model.weight.abs().t() + (0 if model.bias is None else model.bias.abs())
            report = convert(model, "native")
            got = model(x)
        assert report.converted == {"weight": "multiplied in int8"}
        assert torch.equal(packed_weights(model)["weight"].quantized().integers, integers)
        assert got.shape == expected.shape
        worst = max(worst, float((got - expected).abs().max()) / (float(terms.max()) or 1.0))
    assert worst < 1e-5


def test_the_largest_products_do_not_saturate() -> None:
    for sign in (1, -1):
        model = layer(256, 4, False, Uniform(8))
        model._parameters["weight"].data.fill_(sign)  # type: ignore[union-attr]
        x = torch.ones(2, 256)
        convert(model, "native", ((x,), {}), tolerance=1e-5, seconds=0.01)
        assert model(x).flatten().tolist() == pytest.approx([256.0 * sign] * 8)


def test_the_kernel_follows_what_it_is_made_of() -> None:
    model, x = layer(8, 4, True, Uniform(8)), torch.randn(3, 8)
    prepared = copy.deepcopy(model)
    convert(model, "native")

    def check() -> None:
        torch.testing.assert_close(model(x), prepared(x), rtol=1e-5, atol=1e-5)

    check()
    first = vars(model)[KERNEL]
    check()
    assert vars(model)[KERNEL] is first
    copied = copy.deepcopy(model)
    assert vars(copied)[KERNEL] is None
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        for m in (model, prepared):
            m.bias.add_(1)
    check()
    bias = nn.Parameter(torch.randn(4))
    model.bias = prepared.bias = bias
    check()
    with torch.no_grad():
        prepared._parameters["weight"].mul_(-2)  # type: ignore[union-attr]
    other = copy.deepcopy(prepared)
    convert(other, "native")
    model.load_state_dict(other.state_dict())
    check()
    with torch.inference_mode():
        check()
    # in other types it computes as the prepared model does
    model.double(), prepared.double()
    x = x.double()
    check()
    model.float(), prepared.float()
    x = x.float()
    check()


def test_inputs_that_the_kernel_refuses_and_gradients() -> None:
    model = layer(8, 4, True, Uniform(8))
    prepared = copy.deepcopy(model)
    convert(model, "native")
    assert model(torch.full((2, 8), torch.nan)).isnan().all()
    assert model(torch.zeros(0, 8)).shape == (0, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 7))
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.zeros(2, 8).half())
    x = torch.randn(2, 3, 8)
    with quantization_off():
        assert torch.equal(model(x), nn.functional.linear(x, model.weight, model.bias))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16 and model(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), prepared(x).float(), rtol=2e-2, atol=2e-2)
    gradients = []
    for m in (model, prepared):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(m(leaf).square().sum(), (leaf, m.bias)))
    for one, same in zip(*gradients, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)


def test_the_fused_encoder_layer_does_not_read_past_the_kernel() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attach_quantizers(model, {"linear1.weight": Uniform(8), "linear2.weight": Uniform(8)})
    attach_input_quantizers(model, {"linear1": DynamicRange(), "linear2": DynamicRange()})
    convert(model, "native")
    with torch.no_grad():
        model(torch.randn(2, 5, 8))
    assert [q.calls for q in input_quantizers(model).values()] == [1, 1]
    with pytest.raises(QuantizationError, match=r"'linear1' was converted and does it within its product"):
        detach_input_quantizers(model)


def test_a_linear_layer_that_shares_a_table_multiplies_int8_too() -> None:
    model = zoo(dtype=torch.float32)
    attach_quantizers(model, {"table.weight": Uniform(8), "gain": Uniform(8)})
    attach_input_quantizers(model, {"out": DynamicRange()})
    prepared = copy.deepcopy(model)
    report = convert(model, "native", ((IDS,), {}), seconds=0.01)
    assert report.converted == {
        "table.weight": "unpacked row by row, where they are looked up and multiplied in int8",
        "gain": "unpacked once: Zoo is no plain linear layer",
    }
    assert {name: packed.kept for name, packed in packed_weights(model).items()} == {
        "table.weight": False,
        "gain": True,
    }
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), prepared(IDS), rtol=1e-5, atol=1e-5)
        state = model.state_dict()
        state["table.weight_scale"] *= 2
        model.load_state_dict(state)  # the table is loaded, the layer must see it
        prepared.table._parameters["weight"].mul_(2)  # type: ignore[union-attr]
        torch.testing.assert_close(model(IDS), prepared(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("quantizer", "on_inputs", "why"),
    [
        (Uniform(8), None, "its inputs are not quantized by a DynamicRange"),
        (Uniform(8), ObservedRange(), "its inputs are not quantized by a DynamicRange"),
        (Uniform(8), DynamicRange(7), "its inputs have 7 bits, not 8"),
        (Uniform(8, symmetric=False), DynamicRange(), "its integers are no int8 around 0"),
        (Stochastic(8, strict=False), DynamicRange(), "its integers are no int8 around 0"),
        (Uniform(8, "group:4"), DynamicRange(), "rows have several scales"),
    ],
)
def test_why_a_layer_does_not_multiply_int8(quantizer: Quantizer, on_inputs: Any, why: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)).train(), torch.randn(3, 8)
    attach_quantizers(model, {"0.weight": quantizer, "1.weight": Uniform(8)})
    attach_input_quantizers(model, {"0": on_inputs} if on_inputs else {})
    model(x)
    with pytest.raises(QuantizationError, match=f"'0.weight': {why}; '1.weight': its inputs are not quantized by a"):
        convert(model.eval(), "native")
    attach_input_quantizers(model, {"1": DynamicRange()})
    report = convert(model, "native")
    assert report.converted == {"0.weight": f"unpacked once: {why}", "1.weight": "multiplied in int8"}


def test_other_reasons_for_no_int8() -> None:
    def why(model: nn.Module) -> str:
        with pytest.raises(QuantizationError, match="there is none") as caught:
            convert(model, "native")
        return str(caught.value)

    double = layer(4, 2, True, Uniform(8)).double()
    assert "its type is float64, not float32" in why(double)
    hooked = layer(4, 2, True, Uniform(8))
    hooked.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert "another hook changes its inputs after they are quantized" in why(hooked)
    if reduced_range():
        assert "255 steps, which this machine does not compute exactly" in why(layer(4, 2, True, Uniform(8), False))
    attention = nn.MultiheadAttention(4, 2)
    attach_quantizers(attention, {"out_proj.weight": Uniform(8)})
    attach_input_quantizers(attention, {"out_proj": DynamicRange()})
    assert "'out_proj.weight': attention reads it and does not call its layer" in why(attention)
    own = layer(4, 2, True, Uniform(8))
    own.forward = lambda x: x  # type: ignore[method-assign]
    assert "its forward has been replaced, as token pruning does" in why(own)


def test_a_converted_model_is_exported_and_kept_whole_by_discovery() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).eval(), torch.randn(3, 8)
    attach_quantizers(model, {"0.weight": Uniform(4), "2.weight": Uniform(3, symmetric=False)})
    convert(model, "packed")
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert "0.weight_packed" in program.state_dict
    assert not len(discover(model, (x,), prove=True))  # sizes of bytes cannot be cut


def test_what_was_asked_about_the_kernel_once_holds_under_every_mode() -> None:
    from torch._subclasses import FakeTensorMode

    asked = int8._reduced_range.__wrapped__
    expected = asked(torch.backends.quantized.engine)
    torch.set_default_dtype(torch.float64)
    try:
        with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
            assert asked(torch.backends.quantized.engine) is expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_computes_as_it_was_prepared(name: str) -> None:
    example, kwargs = MODELS[name], MODELS[name].kwargs or {}
    model = example.model().eval()
    owners = dict(model.named_modules())
    read = [n for n, _ in model.named_parameters() if not isinstance(owners[n.rpartition(".")[0]], nn.RNNBase)]
    names = [n for n in read if model.get_parameter(n).dim() > 1]
    attach_quantizers(model, {n: Uniform(4 if number % 2 else 8) for number, n in enumerate(names)})
    for backend in ("packed", "unpacked"):
        report = convert(copy.deepcopy(model), backend, (example.args, kwargs), seconds=0.01)
        assert report.error == 0 and list(report.converted) == names
    attach_input_quantizers(model, {p: DynamicRange() for p, m in owners.items() if isinstance(m, nn.Linear)})
    report = convert(model, "native", (example.args, kwargs), tolerance=1e-5, seconds=0.01)
    assert report.error is not None and report.error < 1e-5


# What is measured and reported


def test_auto_keeps_the_fastest_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.timing import Latency

    module = sys.modules["lightning_compress.quantization.convert"]  # the package has the function under that name

    def run(times: dict[str, float], tolerance: float = 1e-2) -> tuple[ConversionReport, nn.Module]:
        model = layer(8, 4, True, Uniform(8))
        measured = {name: Latency(ms / 1e3, ms / 1e3, 1) for name, ms in times.items()}
        monkeypatch.setattr(module, "measure_latency", lambda models, *args, **kwargs: measured)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        try:
            return convert(model, "auto", ((torch.randn(5, 8),), {}), tolerance), model
        except QuantizationError:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert list(weight_quantizers(model)) == ["weight"]
            raise

    times = {"fp32": 2.0, "native": 1.0, "packed": 3.0, "unpacked": 2.5}
    report, model = run(times)
    assert report.backend == "native" and report.is_faster and dict(report.milliseconds) == pytest.approx(times)
    assert "multiplied in int8" in str(report) and "No candidate" not in str(report)
    report, model = run({**times, "native": 2.9})
    assert report.backend == "unpacked" and report.is_faster is False and report.error == 0
    assert packed_weights(model)["weight"].kept and not input_quantizers(model)[""].in_kernel
    assert "No candidate that was allowed is faster than fp32: the model is smaller, not faster." in str(report)
    report, _ = run(times, tolerance=1e-12)
    assert report.backend == "unpacked" and "above the tolerance of 1e-12" in str(report)
    monkeypatch.setattr(module, "_difference", lambda *_: 0.5)
    with pytest.raises(QuantizationError, match=r"within 0.01, but the errors are native 5.0e-01, packed 5.0e-01, unp"):
        run(times)


def test_rounding_may_change_as_much_as_quantization_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lightning_compress.quantization.convert"]
    call = ((torch.randn(5, 8),), {})
    # the prepared model against the dense one, native, packed, unpacked
    gaps = iter([0.3, 0.2, 0.0, 0.0] * 2 + [0.3, 0.4, 0.0, 0.0] + [0.03, 0.04, 0.0, 0.0] + [torch.inf, 0.06, 0.0, 0.0])
    monkeypatch.setattr(module, "_difference", lambda *_: next(gaps))

    def run(tolerance: float | None = None) -> ConversionReport:
        return convert(layer(8, 4, True, Uniform(8)), "auto", call, tolerance, seconds=0.01)

    assert run().tolerance == 0.3 and "above the tolerance" not in str(run(0.25))
    report = run()
    assert report.tolerance == 0.3 and report.backend != "native" and "above the tolerance of 0.3" in str(report)
    assert run().tolerance == 0.05
    report = run()
    assert report.tolerance == 0.05 and report.backend != "native" and report.errors["native"] == 0.06


def test_the_tolerance_is_what_quantization_changes() -> None:
    torch.manual_seed(0)
    call = ((torch.randn(5, 8),), {})
    model = layer(8, 4, True, Uniform(2))
    detached = copy.deepcopy(model)
    detach_quantizers(detached)
    detach_input_quantizers(detached)
    with torch.no_grad():
        prepared, dense = model(*call[0]), detached(*call[0])
    change = float((prepared - dense).abs().max() / dense.abs().max())
    report = convert(model, "auto", call, seconds=0.01)
    assert change > 0.05 and report.tolerance == pytest.approx(change)
    assert convert(layer(8, 4, True, Uniform(2)), "packed").tolerance == 0.05


def test_int8_products_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 8)
    report = convert(layer(8, 4, True, Uniform(8)), "native", ((x,), {}), seconds=0.01)
    assert report.layer_error is not None and report.layer_error < 1e-5
    assert "Error of int8 products, each by itself: " in str(report)
    assert convert(layer(8, 4, True, Uniform(8)), "packed", ((x,), {}), seconds=0.01).layer_error is None
    # a kernel that is a little wrong
    monkeypatch.setattr(
        "lightning_compress.quantization.kernels.int8_product", lambda *given: int8.int8_product(*given) * 1.001
    )
    model = layer(8, 4, True, Uniform(8))
    with pytest.raises(QuantizationError, match=r"int8 products to be those of float32 within 0.0001, .* is 1.0e-03"):
        convert(model, "native", ((x,), {}), seconds=0.01)
    assert list(weight_quantizers(model)) == ["weight"]
    report = convert(model, "auto", ((x,), {}), seconds=0.01)
    assert report.backend in ("packed", "unpacked") and report.errors["native"] < 0.05


def test_the_report_says_what_was_done() -> None:
    model = zoo(dtype=torch.float32)
    found = attach_quantizers(model, dict.fromkeys(("table.weight", "up.weight", "down.weight"), Uniform(4)))
    found["down.weight"].enabled = False
    with torch.no_grad():  # with gradients, some CPUs multiply by another kernel than without
        x = model(IDS)
        report = convert(model, "packed")
        assert torch.equal(model(IDS), x)
    assert report.converted == {
        "table.weight": "unpacked row by row, where they are looked up and unpacked at every read",
        "up.weight": "unpacked at every read",
    }
    assert report.left["down.weight"] == "whose quantizer is off" and report.left["gain"] == "without a quantizer"
    assert report.error is None and report.is_faster is None
    saved = 4 * (80 + 96) - (40 + 4 * 10) - (48 + 4 * 12)
    assert report.bytes_before - report.bytes_after == saved
    text = str(report)
    assert text.startswith("Converted 2 parameters, backend 'packed'\n  1 unpacked row by row")
    assert text.endswith("not measured, for want of an example")


def test_inputs_keep_their_quantizers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).double().train(), torch.randn(9, 8).double()
    attach_quantizers(model, {"0.weight": Uniform(4), "2.weight": LearnedStep(4)})
    attach_input_quantizers(model, {"0": ObservedRange(4), "2": LearnedRange(4)})
    for _ in range(3):
        model(x)
    expected = model.eval()(x)
    for backend in ("packed", "unpacked"):
        converted = copy.deepcopy(model)
        convert(converted, backend)
        assert torch.equal(converted(x), expected)
        assert [q.calls for q in input_quantizers(converted).values()] == [5, 5]
    assert type(convert(model, "auto", ((x,), {}), seconds=0.01)) is ConversionReport


def test_a_model_in_training_is_left_in_training_and_its_randomness_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).train()
    attach_quantizers(model, {"0.weight": Uniform(4)})
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = convert(model, "unpacked", ((torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),), {}))
    assert report.error == 0 and all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)


# Refusals


def _prepared() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    attach_quantizers(model, {"0.weight": Uniform(8), "1.weight": Uniform(4)})
    return model


def _converted() -> nn.Module:
    model = _prepared()
    convert(model, "packed")
    return model


def _off() -> nn.Module:
    model = _prepared()
    for quantizing in weight_quantizers(model).values():
        quantizing.enabled = False
    return model


def _unseen() -> nn.Module:
    model = _prepared()
    attach_input_quantizers(model, {"1": ObservedRange()})
    return model


def _named() -> nn.Module:
    model = _prepared()
    model[0].register_buffer("weight_packed", torch.zeros(1))
    return model


class Silent(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return None


def _silent() -> nn.Module:
    model = Silent(4, 3)
    attach_quantizers(model, {"weight": Uniform()})
    return model


GOOD = ((torch.zeros(2, 4),), {})


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "message"),
    [
        (lambda: nn.Linear(2, 2), ("packed",), QuantizationError, r"quantized weights, but Linear has none. Put quant"),
        (_off, ("packed",), QuantizationError, r"but all quantizers of Sequential are off. Set their enabled to True"),
        (_converted, ("packed",), QuantizationError, r"prepared model, but '0.weight' was converted already"),
        (_prepared, ("int8",), ValueError, r"one of \('native', 'packed', 'unpacked', 'auto'\), but got 'int8'"),
        (_prepared, ("auto",), QuantizationError, r"an example for backend='auto', which measures the backends, but"),
        (_prepared, ("auto", GOOD[0]), TypeError, r"Expected example to be \(args, kwargs\), a tuple and a dict"),
        (
            _prepared,
            ("auto", ((torch.zeros(2, 5),), {})),
            QuantizationError,
            r"example to run in evaluation mode, but it raised RuntimeError: .*Nothing was changed",
        ),
        (_silent, ("packed", GOOD), QuantizationError, r"example call to return a tensor, to compare it, but it"),
        (_prepared, ("packed", None, 0.0), ValueError, r"tolerance, a relative error, to be above 0, but got 0.0"),
        (_prepared, ("packed", None, 1.0, -1.0), ValueError, r"seconds, for measuring, to be above 0, but got -1.0"),
        (_prepared, ("native",), QuantizationError, r"backend='native', but there is none: '0.weight': its inputs ar"),
        (
            lambda: _prepared().to("meta"),
            ("native",),
            QuantizationError,
            r"weights on the CPU for backend='native', but '0.weight' lies on meta. Convert model.cpu\(\), or use",
        ),
        (_unseen, ("packed",), QuantizationError, r"those of '1' are not: ObservedRange\(.*has seen no batch. Train"),
        (_named, ("packed",), QuantizationError, r"no attribute 'weight_packed' of the module that has '0.weight'"),
    ],
)
def test_refusals_change_nothing(make: Any, arguments: Any, kind: type[Exception], message: str) -> None:
    model = make()

    def state() -> Any:
        kinds = [type(m) for m in model.modules()]
        return weight_quantizers(model), packed_weights(model), list(model.state_dict()), kinds

    before = state()
    with pytest.raises(kind, match=message):
        convert(model, *arguments)
    assert state() == before


def test_native_is_refused_without_an_exact_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer(4, 2, True, Uniform(8))
    monkeypatch.setattr("lightning_compress.quantization.int8._reduced_range", lambda engine: None)
    with pytest.raises(QuantizationError, match=r"int8 kernel of torch to be exact on this machine"):
        convert(model, "native")
    report = convert(model, "auto", ((torch.randn(2, 4),), {}), seconds=0.01)
    assert list(report.errors) == ["packed", "unpacked"] and report.error == 0
    assert BACKENDS == ("native", "packed", "unpacked")
