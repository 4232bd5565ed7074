"""A converted model is saved with its integers, and loaded from data that nobody vouches for."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_compress import PruningPlan, apply_plan, discover
from lightning_compress.quantization import (
    ActivationQuantizer,
    DynamicRange,
    LearnedRange,
    ObservedRange,
    QuantizationError,
    attach_input_quantizers,
    attach_quantizers,
    convert,
    input_quantizers,
    packed_weights,
)
from lightning_compress.quantization.record import activation_from, activation_state, quantizer_from, quantizer_state
from lightning_compress.quantizers import Binary, LearnedStep, Quantizer, Stochastic, Ternary, Uniform
from lightning_compress.saving import load_compressed, read_manifest, save_compressed
from tests.saving.test_saving import edited, resealed

EVERY: list[Quantizer] = [
    Uniform(4),
    Uniform(8),
    Uniform(3, "group:2", symmetric=False),
    Stochastic(8, strict=False),
    Stochastic(4, "mse", "tensor"),
    Binary(),
    Binary.of_the_report(),
    Binary.of_the_report(head_dim=16),
    Ternary("tensor"),
    LearnedStep(4),
]
ACTIVATIONS: list[ActivationQuantizer] = [
    DynamicRange(),
    DynamicRange(8, reduced=True),
    ObservedRange(4, 0.25),
    LearnedRange(5),
    LearnedRange(5, signed=True),
]


class Tied(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(6, 4), nn.Linear(4, width), nn.Linear(width, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 6)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.down(torch.relu(self.up(x))))


IDS = torch.tensor([[0, 1, 2], [5, 3, 3]])


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


def prepared(quantizer: Quantizer = EVERY[0]) -> Tied:
    model = tied()
    attach_quantizers(model, {n: quantizer for n, p in model.named_parameters() if p.dim() > 1})
    return model


@pytest.mark.parametrize("backend", ["packed", "unpacked"])
@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_outputs_are_bit_equal_after_loading(quantizer: Quantizer, backend: str, tmp_path: Path) -> None:
    model = prepared(quantizer)
    with torch.no_grad():  # attention of torch computes in another way where there are gradients
        expected = model(IDS)
    report = convert(model, backend)
    manifest = save_compressed(model, tmp_path / "model", Tied)
    again = load_compressed(tmp_path / "model", Tied)
    with torch.no_grad():
        assert torch.equal(model(IDS), expected) and torch.equal(again(IDS), expected)
    assert {n: (p.form, p.kept) for n, p in packed_weights(again).items()} == {
        n: (p.form, p.kept) for n, p in packed_weights(model).items()
    }
    assert manifest.quantization is not None and manifest.quantization.backend == backend
    assert manifest.quantization.weights[0].places == (("table", "weight"), ("out", "weight"))
    assert read_manifest(tmp_path / "model") == manifest
    save_compressed(again, tmp_path / "again", Tied)
    content, same = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again"))
    assert content == same

    # the file is as large as the arithmetic says: packed bytes, scales, the rest and a header
    header = 8 + struct.unpack("<Q", content[:8])[0]
    assert len(content) == header + report.bytes_after


def test_int8_products_and_ranges_of_inputs_come_back(tmp_path: Path) -> None:
    model = tied().train()
    attach_quantizers(model, dict.fromkeys(("table.weight", "up.weight", "down.weight"), Uniform(8)))
    chosen = {"out": DynamicRange(), "up": ObservedRange(4), "down": LearnedRange(3)}
    found = attach_input_quantizers(model, chosen)
    for _ in range(3):
        model(IDS)
    model.eval()
    convert(model, "native")
    assert [q.in_kernel for q in found.values()] == [True, False, False]
    expected = model(IDS)
    save_compressed(model, tmp_path / "model", Tied)
    again = load_compressed(tmp_path / "model", Tied)
    assert torch.equal(again(IDS), expected)
    kept = input_quantizers(again)
    assert {path: q.quantizer for path, q in kept.items()} == chosen
    assert kept["out"].in_kernel and kept["out"].calls == 1
    assert torch.equal(kept["up"].state.range, found["up"].state.range)  # type: ignore[arg-type]
    step = kept["down"].step
    assert step is not None and step.requires_grad and step.dtype == torch.float32
    assert [p.kept for p in packed_weights(again).values()] == [p.kept for p in packed_weights(model).values()]
    other = load_compressed(tmp_path / "model", Tied, backend="packed")
    assert not input_quantizers(other)["out"].in_kernel
    torch.testing.assert_close(other(IDS), expected, rtol=1e-5, atol=1e-5)


def test_what_was_removed_and_other_types_come_back(tmp_path: Path) -> None:
    model = Tied().eval()
    structures = discover(model, (IDS,), kinds=("ffn",), prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(0, 8, 2) for s in structures if s.units == 8})
    apply_plan(model, plan, verify=((IDS,), {}))
    model.bfloat16()
    attach_quantizers(model, {"up.weight": LearnedStep(4), "down.weight": Uniform(2, "group:4")})
    convert(model, "packed")
    save_compressed(model, tmp_path / "model", Tied)
    again = load_compressed(tmp_path / "model", Tied)
    assert again.up.weight.shape == (4, 4) and again.up.weight.dtype == torch.bfloat16
    assert again.up.weight_scale.dtype == torch.float32
    assert torch.equal(again(IDS), model(IDS))
    deep = copy.deepcopy(again)
    assert torch.equal(deep(IDS), model(IDS))


def test_a_model_of_transformers_needs_no_factory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    model = transformers.BertForMaskedLM(config).eval()
    attach_quantizers(model, {n: Uniform(4) for n, p in model.named_parameters() if p.dim() > 1})
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    convert(model, "packed")
    save_compressed(model, tmp_path / "model")
    again = load_compressed(tmp_path / "model")
    assert torch.equal(model(ids).logits, expected) and torch.equal(again(ids).logits, expected)


# Records


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_quantizers_are_json(quantizer: Quantizer) -> None:
    assert quantizer_from(json.loads(json.dumps(quantizer_state(quantizer))), "q") == quantizer


@pytest.mark.parametrize("quantizer", ACTIVATIONS, ids=str)
def test_quantizers_of_activations_are_json(quantizer: ActivationQuantizer) -> None:
    assert activation_from(json.loads(json.dumps(activation_state(quantizer))), "q") == quantizer


def test_quantizers_of_other_kinds_are_not_saved(tmp_path: Path) -> None:
    class Own(Uniform):
        pass

    model = prepared(Own())
    convert(model, "packed")
    with pytest.raises(QuantizationError, match=r"quantizer that can be saved, Uniform, .*LearnedStep, but got Own. A"):
        save_compressed(model, tmp_path / "model", Tied)
    model = prepared()
    attach_input_quantizers(model, {"up": ObservedRange()})["up"].state.range = torch.tensor([0, torch.inf])
    convert(model, "packed")
    with pytest.raises(QuantizationError, match=r"range of inputs of 'up' to be finite, but got \[0.0, inf\]"):
        save_compressed(model, tmp_path / "model", Tied)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = prepared()
    attach_input_quantizers(model, {"up": ObservedRange(), "down": LearnedRange(4), "out": DynamicRange(6)})
    model.train()(IDS)
    convert(model.eval(), "packed")
    save_compressed(model, tmp_path / "model", Tied)
    return tmp_path / "model"


def weight(data: Any) -> Any:
    return data["quantization"]["weights"][0]


def given(data: Any, number: int) -> Any:
    return data["quantization"]["inputs"][number]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(quantization=[]), r"expected quantization to be an object with the keys"),
        (lambda d: d["quantization"].update(more=1), r"quantization to have the keys .*\['more'\] are unknown"),
        (lambda d: d["quantization"].update(backend="x"), r"quantization.backend to be one of \('native', 'packed', "),
        (
            lambda d: d["quantization"].update(weights=[]),
            r"quantization.weights to be a list with a weight, but got \[\]",
        ),
        (lambda d: weight(d).update(more=1), r"quantization.weights\[0\] to have the keys .*\['more'\] are unknown"),
        (lambda d: weight(d).update(bits=5), r"weights\[0\].bits to be 4, as Uniform\(bits=4, .* stores, but got 5"),
        (lambda d: weight(d).update(bits=True), r"weights\[0\].bits to be an integer from 1 to 16, but got True"),
        (lambda d: weight(d).update(low=1), r"weights\[0\].low to be an integer from -65536 to 0, but got 1"),
        (lambda d: weight(d).update(high=99), r"weights\[0\].high to be an integer from -6 to 8, but got 99"),
        (lambda d: weight(d).update(offset=0), r"weights\[0\].offset to be true or false, but got 0"),
        (
            lambda d: weight(d).update(offset=True),
            r"weights\[0\] to be of a tensor 'table.weight_offset', float32 of shape \(6, 1\), but got 'none'",
        ),
        (lambda d: weight(d).update(dtype="int8"), r"weights\[0\].dtype to be one of \('float64', .*, but got 'int8'"),
        (
            lambda d: weight(d).update(dtype="float64"),
            r"of a tensor 'table.weight_scale', float64 of shape \(6, 1\), but got 'float32 of shape \(6, 1\)'",
        ),
        (
            lambda d: weight(d).update(shape=[6, 6]),
            r"of a tensor 'table.weight_packed', uint8 of shape \(18,\), but got 'uint8 of shape \(12,\)'",
        ),
        (lambda d: weight(d).update(shape=[6, -4]), r"weights\[0\].shape\[1\] to be an integer from 1 to"),
        (lambda d: weight(d).update(shape=[1] * 17), r"weights\[0\].shape to be a list of at most 16 sizes"),
        (lambda d: weight(d).update(module="no"), r"weights\[0\] to be of a tensor 'no.weight_packed', .*got 'none'"),
        (lambda d: weight(d).update(shared=[["out"]]), r"weights\[0\].shared\[0\] to be a list of a module and a para"),
        (
            lambda d: weight(d).update(shared=[["up", "weight"]]),
            r"weights\[1\] to be of a parameter that has no other record, but got 'up.weight'",
        ),
        (
            lambda d: weight(d)["quantizer"].update(kind="x"),
            r"weights\[0\].quantizer.kind to be one of \('uniform', ",
        ),
        (
            lambda d: weight(d)["quantizer"].update(bits=9),
            r"weights\[0\].quantizer: Expected bits .* from 2 to 8, or 16",
        ),
        (
            lambda d: weight(d)["quantizer"].update(bits=17),
            r"weights\[0\].quantizer.bits to be an integer from 1 to 16",
        ),
        (
            lambda d: weight(d)["quantizer"].update(bits=1),
            r"in quantization.weights\[0\].quantizer: Expected bits",
        ),
        (
            lambda d: weight(d)["quantizer"].update(scope="x"),
            r"weights\[0\].quantizer: Expected scope to be",
        ),
        (lambda d: weight(d)["quantizer"].update(scope="group:3"), r"shape to be one whose rows are a multiple of 3"),
        (
            lambda d: weight(d)["quantizer"].pop("scope"),
            r"weights\[0\].quantizer to have the keys .*\['scope'\]",
        ),
        (
            lambda d: given(d, 0).update(range=[1]),
            r"inputs\[0\].range to be a list of two numbers, or null",
        ),
        (lambda d: given(d, 0).update(range=[1, 0]), r"inputs\[0\].range\[1\] to be a number from 1.0 to"),
        (lambda d: given(d, 0).update(range=None), r"inputs\[0\] to be with what ObservedRange\(.* needs to know"),
        (lambda d: given(d, 0).update(step=1.0), r"inputs\[0\].step to be null for ObservedRange\(.*, but got 1.0"),
        (
            lambda d: given(d, 1).update(step=None),
            r"inputs\[1\].step to be a number for LearnedRange\(.*, but got",
        ),
        (lambda d: given(d, 1).update(step=-1), r"inputs\[1\].step to be a number from 0 to"),
        (lambda d: given(d, 1).update(signed=1), r"inputs\[1\].signed to be true or false, but got 1"),
        (lambda d: given(d, 1).update(module="up"), r"inputs\[1\].module to be of no other record, but got 'up'"),
        (
            lambda d: given(d, 2)["quantizer"].update(kind="uniform"),
            r"inputs\[2\].quantizer.kind to be one of \('",
        ),
        (lambda d: given(d, 0)["quantizer"].update(momentum=2), r"inputs\[0\].quantizer: Expected momentum"),
        (
            lambda d: weight(d).update(shared=[["gone", "weight"]]),
            r"rebuilt model to have a parameter 'gone.weight', as quantization.weights\[0\] says",
        ),
        (
            lambda d: weight(d).update(shared=[["down", "weight"]]) or d["quantization"]["weights"].pop(2),
            r"to have a parameter 'down.weight' of shape \(6, 4\), .* but it has one of shape \(4, 8\)",
        ),
        (
            lambda d: given(d, 0).update(module="gone"),
            r"to have a module 'gone', as quantization.inputs",
        ),
        (lambda d: weight(d).update(shared=[]), r"Expected the rebuilt model to have the tensors of the saved one"),
        (lambda d: d.update(quantization=None), r"Expected the rebuilt model to have the tensors of the saved one"),
    ],
)
def test_damaged_records_are_refused(saved: Path, change: Any, message: str) -> None:
    edited(saved, change)
    with pytest.raises(ValueError, match=message):
        load_compressed(saved, Tied)


def test_damaged_integers_and_scales_are_refused(saved: Path) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(saved / "model.safetensors").items()}
    whole = (saved / "model.safetensors").read_bytes()
    resealed(saved, save({**state, "table.weight_packed": torch.full((12,), 255, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=r"integers of quantization.weights\[0\] from -7 to 7, .* from 8 to 8: "):
        load_compressed(saved, Tied)
    for wrong in (-1.0, torch.inf):
        resealed(saved, save({**state, "up.weight_scale": torch.full((8, 1), wrong)}))
        with pytest.raises(ValueError, match=r"scales of quantization.weights\[1\] to be finite .*: 'up.weight'"):
            load_compressed(saved, Tied)
    resealed(saved, whole)
    load_compressed(saved, Tied)


def test_backends_are_chosen_for_converted_models_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend to be one of \('native', 'packed', 'unpacked'\), but got 'fast'"):
        load_compressed(saved, Tied, backend="fast")
    save_compressed(tied(), saved.parent / "dense", Tied)
    with pytest.raises(ValueError, match=r"backend=None for .*, because its weights were not converted to integers"):
        load_compressed(saved.parent / "dense", Tied, backend="packed")
    monkeypatch.setattr("lightning_compress.quantization.int8._reduced_range", lambda engine: None)
    with pytest.raises(QuantizationError, match=r"int8 kernel of torch to be exact on this machine"):
        load_compressed(saved, Tied, backend="native")


ODD = [None, True, -1, 0, 1, 3, 10**30, 1.5, "", "x", "row", [], {}, [[]], {"a": 1}, 2**40, "native", "unpacked"]


def test_records_that_were_changed_at_random_are_refused_or_loaded(saved: Path) -> None:
    choose, text, refused = random.Random(0), (saved / "compression.json").read_text(), 0
    for _ in range(400):
        data = json.loads(text)
        at: Any = data["quantization"]
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = choose.choice(keys)
            if not isinstance(at[key], dict | list) or not at[key] or choose.random() < 0.1:
                break
            at = at[key]
        kind = choose.randrange(3)
        if kind == 0:
            del at[key]
        else:
            at[key] = choose.choice(ODD)
        (saved / "compression.json").write_text(json.dumps(data))
        try:
            model = load_compressed(saved, Tied)
        except ValueError:  # nothing else may be raised
            refused += 1
        else:
            model(IDS)
    assert 200 < refused < 400
