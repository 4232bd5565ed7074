"""The search for precisions: within the loss that is allowed, cheaper than what was there, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import convert
from lightning_compress.quantization import (
    DynamicRange,
    PrecisionSearch,
    QuantizationError,
    attach_input_quantizers,
    attach_quantizers,
    detach_input_quantizers,
    detach_quantizers,
    input_quantizers,
    packed_weights,
    precision,
    search_precision,
    weight_quantizers,
)
from lightning_compress.quantizers import Uniform, quantizer_named
from lightning_compress.timing import Latency
from tests.recorded import Recorded

NAMES = ("a.weight", "b.weight", "c.weight")


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return out


def example() -> Any:
    return (torch.randn(6, 8, generator=torch.Generator().manual_seed(1)),), {}


class Errors:
    """A loss that is the sum of the squared errors of the weights, each with its own importance."""

    def __init__(self, model: nn.Module, importance: Mapping[str, float]) -> None:
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in NAMES}
        self.importance, self.seen = importance, 0

    def of(self, name: str, precision: str) -> float:
        return self.importance[name] * self.error(self.weights[name], quantizer_named(precision)(self.weights[name]))

    @staticmethod
    def error(weight: Tensor, other: Tensor) -> float:
        return float((weight - other).double().square().sum())

    def __call__(self, model: nn.Module) -> float:
        self.seen += 1
        assert not model.training and not torch.is_grad_enabled()
        read = {name: model.get_submodule(name[0]).weight.detach() for name in NAMES}  # type: ignore[union-attr]
        return 1.0 + sum(s * self.error(self.weights[n], read[n]) for n, s in self.importance.items())  # type: ignore[arg-type]


def searched(importance: Mapping[str, float], tolerance: float, **options: Any) -> tuple[PrecisionSearch, Errors]:
    model = Three()
    before = copy.deepcopy(model.state_dict())
    loss = Errors(model, importance)
    found = search_precision(model, loss, example(), tolerance=tolerance, **options)
    assert found.losses["found"] <= found.limit == found.losses["float32"] + tolerance
    assert found.costs["found"] <= found.costs["float32"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not weight_quantizers(model) and not input_quantizers(model) and model.training
    return found, loss


def test_what_harms_stays_as_it_is() -> None:
    importance = {"a.weight": 1.0, "b.weight": 1e6, "c.weight": 1.0}
    loss = Errors(Three(), importance)
    allowed = 2 * (loss.of("a.weight", "int4") + loss.of("c.weight", "int4"))
    found, _ = searched(importance, allowed, precisions=("int4",))
    assert found.chosen == {"a.weight": "int4", "b.weight": "float32", "c.weight": "int4"}
    for name in NAMES:
        assert found.sensitivities[name]["int4"] == pytest.approx(loss.of(name, "int4"), rel=1e-6)
    assert found.losses["cheapest"] > found.limit
    # bytes: two elements in one, a float32 scale for each row
    assert found.costs["float32"] == 4 * (256 + 512 + 64)
    assert found.costs["found"] == (256 // 2 + 4 * 32) + 4 * 512 + (64 // 2 + 4 * 4)


def test_everything_is_changed_where_nothing_harms() -> None:
    found, loss = searched(dict.fromkeys(NAMES, 1.0), 1e9)
    assert set(found.chosen.values()) == {"int8"}
    assert found.losses["found"] == found.losses["cheapest"] and found.evaluations == loss.seen


def test_nothing_is_changed_where_nothing_may_be_lost() -> None:
    found, _ = searched(dict.fromkeys(NAMES, 1.0), 0.0)
    assert set(found.chosen.values()) == {"float32"}
    with pytest.raises(QuantizationError, match=r"search that found weights .* but all 3 stay float32"):
        found.apply(Three(), example())


@pytest.mark.parametrize("thorough", [False, True])
def test_several_precisions(thorough: bool) -> None:
    importance = {"a.weight": 1.0, "b.weight": 30.0, "c.weight": 1e9}
    loss = Errors(Three(), importance)
    allowed = 1.01 * (loss.of("a.weight", "int4") + loss.of("b.weight", "int8") + loss.of("c.weight", "int16"))
    found, _ = searched(importance, allowed, precisions=("int16", "int8", "int4"), thorough=thorough)
    assert found.chosen == {"a.weight": "int4", "b.weight": "int8", "c.weight": "int16"}
    assert "3 weights: 1 int4, 1 int8, 1 int16" in str(found)


def test_the_search_finds_what_trying_everything_finds() -> None:
    """Losses that add up, one weight as good as another for its bytes: the best set is found by enumeration."""
    from itertools import product

    importance = {"a.weight": 3.0, "b.weight": 1.0, "c.weight": 40.0}
    loss = Errors(Three(), importance)
    sizes = {"a.weight": 256, "b.weight": 512, "c.weight": 64}
    for share in (0.2, 0.5, 0.9):
        allowed = share * sum(loss.of(name, "int4") for name in NAMES)
        sets = [dict(zip(NAMES, chosen, strict=True)) for chosen in product((False, True), repeat=3)]
        within = [s for s in sets if sum(loss.of(n, "int4") for n in NAMES if s[n]) <= allowed]
        found, _ = searched(importance, allowed, precisions=("int4",))
        best = max(sum(sizes[n] for n in NAMES if s[n]) for s in within)
        assert sum(sizes[n] for n in NAMES if found.chosen[n] == "int4") >= 0.8 * best


def test_what_is_applied_is_what_was_judged() -> None:
    seen: dict[str, Tensor] = {}
    call = example()[0]

    def loss(model: nn.Module) -> float:
        return float(model(*call).square().mean())

    model = Three()
    found = search_precision(
        model, loss, example(), tolerance=1.0, report=lambda m: seen.setdefault(str(len(seen)), m(*call).detach())
    )
    expected = list(seen.values())[2]
    assert set(found.reported) == {"float32", "cheapest", "found"}
    assert torch.equal(seen["0"], Three().eval()(*call))
    found.apply(model.eval(), example())
    assert torch.equal(model(*call), expected)
    convert(model, "packed")
    assert torch.equal(model(*call), expected)
    assert list(packed_weights(model)) == list(NAMES)


def test_inputs_are_quantized_where_weights_have_eight_bits() -> None:
    model = Three()
    chosen = {"a.weight": "int8", "b.weight": "int16", "c.weight": "float32"}
    zero = dict.fromkeys(("float32", "cheapest", "found"), 0.0)
    found = PrecisionSearch(chosen, zero, 0.0, "bytes", zero, {}, {}, 1, DynamicRange())
    found.apply(model, example())
    assert list(weight_quantizers(model)) == ["a.weight", "b.weight"] and list(input_quantizers(model)) == ["a"]
    detach_quantizers(model)
    detach_input_quantizers(model)
    PrecisionSearch(chosen, zero, 0.0, "bytes", zero, {}, {}, 1, None).apply(model, example())
    assert not input_quantizers(model)


def test_milliseconds_are_those_of_layers_that_multiply_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {8: (4.0, 1.0), 32: (2.0, 3.0), 16: (1.0, 0.5)}  # by inputs: float32 and int8, of which one gets slower

    def measure(models: Mapping[str, nn.Module], args: Any, **_: Any) -> dict[str, Latency]:
        (x,) = args
        assert x.shape == (6, x.shape[-1])
        assert list(models) == ["float32", "int8"]  # int16 has no product
        assert torch.allclose(models["int8"](x), models["float32"](x), atol=0.1)
        return {name: Latency.of([t / 1e3]) for name, t in zip(models, times[x.shape[-1]], strict=True)}

    monkeypatch.setattr(precision, "measure_latency", measure)
    found, _ = searched(dict.fromkeys(NAMES, 1.0), 1e9, precisions=("int16", "int8"), objective="milliseconds")
    assert found.chosen == {"a.weight": "int8", "b.weight": "float32", "c.weight": "int8"}
    assert found.costs == {"float32": 7.0, "cheapest": 3.5, "found": 3.5}


@pytest.mark.parametrize("thorough", [False, True])
def test_progress_is_told(thorough: bool, capfd: pytest.CaptureFixture[str]) -> None:
    importance = {"a.weight": 1.0, "b.weight": 30.0, "c.weight": 1e9}
    loss = Errors(Three(), importance)
    allowed = 1.01 * (loss.of("a.weight", "int4") + loss.of("b.weight", "int8") + loss.of("c.weight", "int16"))
    options: dict[str, Any] = {"precisions": ("int16", "int8", "int4"), "thorough": thorough, "report": str}
    recorded = Recorded()
    found, _ = searched(importance, allowed, progress=recorded, **options)
    assert found == searched(importance, allowed, **options)[0]
    assert len(recorded.of("operations traced")) == 1
    assert recorded.of("costs of weights") == [(3, 3)]
    assert recorded.of("sensitivities") == [(9, 9)]
    assert recorded.of("report") == [(3, 3)]
    ((length, steps),) = recorded.of("backward search")
    assert length is None and 1 <= steps <= 9
    assert recorded.of("forward search") == [(9, 9)] * (1 if thorough else 2)  # the second after the backward search
    lengths = [length or 0 for length, _ in recorded.of("sensitivities of the moves left")]
    assert lengths == (sorted(set(lengths), reverse=True) if thorough else [])
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_fails_leaves_the_model_alone() -> None:
    model, calls = Three(), 0

    def loss(_: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        search_precision(model, loss, example(), tolerance=0.1)
    assert not weight_quantizers(model) and not input_quantizers(model) and model.training
    assert type(model.a) is nn.Linear


def test_a_loss_that_becomes_nan_is_not_allowed() -> None:
    found = search_precision(
        Three(),
        lambda m: float("nan") if any(q.enabled for q in weight_quantizers(m).values()) else 0.0,
        example(),
        tolerance=1.0,
    )
    assert set(found.chosen.values()) == {"float32"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": -1.0}, ValueError, "Expected tolerance, by how much the loss may grow, to be at least 0"),
        ({"objective": "flops"}, ValueError, "Expected objective to be 'bytes' or 'milliseconds', but got 'flops'"),
        ({"precisions": "int8"}, ValueError, "Expected precisions to be several different names"),
        ({"precisions": ("int8", "int8")}, ValueError, "Expected precisions to be several different names"),
        ({"precisions": ("lsq4",)}, ValueError, "Expected precisions that need no training.*Use 'int4'"),
        ({"modules": "rnn.*"}, QuantizationError, "'rnn.\\*' fits none"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search_precision(Three(), lambda _: 0.0, example(), **{"tolerance": 0.1, **options})


def test_models_that_are_refused() -> None:
    with pytest.raises(QuantizationError, match="Expected a finite loss of the model as it is"):
        search_precision(Three(), lambda _: float("nan"), example(), tolerance=0.1)
    model = Three()
    attach_input_quantizers(model, {"a": DynamicRange()})
    with pytest.raises(QuantizationError, match="Expected a model without quantizers, but Three has some"):
        search_precision(model, lambda _: 0.0, example(), tolerance=0.1)
    model = Three()
    attach_quantizers(model, {"a.weight": Uniform(8)})
    with pytest.raises(QuantizationError, match="Expected a model without quantizers, but Three has some"):
        search_precision(model, lambda _: 0.0, example(), tolerance=0.1)
