"""Models as files for other runtimes: the file computes what the model does, or there is no file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ExportError, ExportResult, PruningPlan, apply_plan, discover, export_model
from lightning_compress.export import formats
from lightning_compress.export.call import flatten_call, identifier
from lightning_compress.export.comparison import relative_error
from lightning_compress.export.dynamic import derive, resized
from lightning_compress.surgery.shim import shims_of
from tests.zoo import ENCODER, MODELS, Example, _transformers

SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml"}


def needs(format: str) -> None:
    for package in formats.FORMATS[format].packages:
        pytest.importorskip(package, reason=f"needs the extra `{formats.FORMATS[format].extra}`")


def exported(model: nn.Module, folder: Path, format: str, *args: Any, **options: Any) -> ExportResult:
    needs(format)
    kwargs = options.pop("kwargs", None) or {}
    result = export_model(model, folder / f"model{SUFFIX[format]}", format, (args, kwargs), **options)  # type: ignore[arg-type]
    assert sorted(file.name for file in folder.iterdir()) == sorted(result.files)
    assert result.path.exists() and result.error <= result.tolerance
    return result


def halved(model: nn.Module, example: Example) -> set[str]:
    """Removes every second unit; returns the tiers."""
    structures = discover(model, example.args, example.kwargs, prove=True)
    kept = {s.name: range(0, s.units, 2) for s in structures}
    apply_plan(model, PruningPlan.of(model, structures, kept), verify=(example.args, example.kwargs or {}))
    return {s.tier for s in structures if s.tier}


class Tagger(nn.Module):
    """A mask, a constant, a nested input, several outputs, and a cache that nobody should see."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, pair: dict[str, Tensor], mask: Tensor | None = None, *, scale: float = 1.0) -> Any:
        hidden = self.embed(ids) + pair["shift"]
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        cache = type("Cache", (), {})()
        cache.kept = hidden
        return {"tags": self.head(hidden) * scale, "extra": (hidden.mean(1), hidden.amax(1)), "cache": cache}


def tagger_call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return (torch.arange(10).view(2, 5), {"shift": torch.randn(2, 5, 6)}), {"mask": mask.long(), "scale": 2.0}


COMPRESSED = ["nn.TransformerEncoder", "packed attention, literal sizes", "ResNet", "BERT", "GPT-2", "ViT"]


@pytest.mark.parametrize("name", COMPRESSED)
def test_dense_and_compressed_models_as_onnx(name: str, tmp_path: Path) -> None:
    example = MODELS[name]
    model = example.model()
    dense = exported(model, tmp_path, "onnx", *example.args, kwargs=example.kwargs)
    tiers = halved(model, example)
    assert tiers == {
        "nn.TransformerEncoder": {"native"},
        "ResNet": {"native"},
        "packed attention, literal sizes": {"shim"},
    }.get(name, {"native", "shim"})
    assert bool([shim for m in model.modules() for shim in shims_of(m)]) == ("shim" in tiers)
    small = exported(model, tmp_path, "onnx", *example.args, kwargs=example.kwargs)
    assert small.bytes < dense.bytes
    for result in (dense, small):
        assert set(result.dynamic) == ({"batch"} if name in ("ResNet", "ViT") else {"batch", "length"})
        batches = {shapes[0][0] for shapes in result.tried}
        assert {1, 2, 3} <= batches
        if "length" in result.dynamic:
            assert len({shapes[0][1] for shapes in result.tried}) >= 4


@pytest.mark.parametrize("format", ["torch_export", "openvino"])
@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "BERT"])
def test_the_other_formats(name: str, format: str, tmp_path: Path) -> None:
    example = MODELS[name]
    model = example.model()
    halved(model, example)
    result = exported(model, tmp_path, format, *example.args, kwargs=example.kwargs)
    assert set(result.dynamic) == {"batch", "length"}
    assert set(result.files) == ({"model.pt2"} if format == "torch_export" else {"model.xml", "model.bin"})


def test_the_encoder_of_a_translation_model(tmp_path: Path) -> None:
    options = {"num_layers": 2, "d_model": 60, "num_heads": 5, "d_kv": 14, "d_ff": 70, "vocab_size": 101}
    call = {key: MODELS["BERT"].kwargs[key] for key in ("input_ids", "attention_mask")}  # type: ignore[index]
    example = _transformers("T5EncoderModel", "T5Config", call, **options)
    model = example.model()
    assert halved(model, example) == {"native", "shim"}
    assert set(exported(model, tmp_path, "onnx", kwargs=example.kwargs).dynamic) == {"batch", "length"}


def test_the_file_has_names_and_runs_without_the_model(tmp_path: Path) -> None:
    needs("onnx")
    import onnxruntime

    model = Tagger().eval()
    args, kwargs = tagger_call()
    result = exported(model, tmp_path, "onnx", *args, kwargs=kwargs)
    assert result.inputs == ("ids", "pair_shift", "mask")
    assert result.outputs == ("tags", "extra_0", "extra_1")
    assert result.dynamic == {
        "batch": (("ids", 0), ("pair_shift", 0), ("mask", 0)),
        "length": (("ids", 1), ("pair_shift", 1), ("mask", 1)),
    }
    assert str(result).startswith(f"{tmp_path / 'model.onnx'}: onnx, ") and "length (ids[1] and" in str(result)
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert {i.name: i.shape for i in session.get_inputs()} == {
        "ids": ["batch", "length"],
        "pair_shift": ["batch", "length", 6],
        "mask": ["batch", "length"],
    }
    assert [o.name for o in session.get_outputs()] == ["tags", "extra_0", "extra_1"]
    fed = {"ids": args[0], "pair_shift": args[1]["shift"], "mask": kwargs["mask"]}
    (tags,) = session.run(["tags"], {name: tensor.numpy() for name, tensor in fed.items()})
    torch.testing.assert_close(torch.from_numpy(tags), model(*args, **kwargs)["tags"].detach())


def test_a_torch_file_is_called_by_the_names_of_the_model_and_keeps_no_example(tmp_path: Path) -> None:
    model = Tagger().eval()
    args, kwargs = tagger_call()
    result = exported(model, tmp_path, "torch_export", *args, kwargs=kwargs)
    program = torch.export.load(result.path)
    outputs = program.module()(ids=args[0], pair_shift=args[1]["shift"], mask=kwargs["mask"])
    assert list(outputs) == ["tags", "extra_0", "extra_1"]
    torch.testing.assert_close(outputs["tags"], model(*args, **kwargs)["tags"])
    assert not any(torch.equal(t, args[1]["shift"]) for t in torch.utils._pytree.tree_leaves(program.example_inputs))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 4)
    state, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    exported(model, tmp_path, "torch_export", x)
    assert [m.training for m in model] == [True, True, False] and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.mha.get_fastpath_enabled() == fastpath
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_hooks


def test_an_example_of_one_still_gives_a_free_batch(tmp_path: Path) -> None:
    result = exported(nn.Linear(4, 2), tmp_path, "torch_export", torch.randn(1, 4))
    assert set(result.dynamic) == {"batch"} and (5, 4) in {shapes[0] for shapes in result.tried}


class LengthFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=hidden)[0]


def test_a_layout_with_the_length_first(tmp_path: Path) -> None:
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    result = exported(LengthFirst(), tmp_path, "torch_export", torch.randn(5, 2, 8), hidden)
    assert sorted(map(sorted, result.dynamic.values())) == [[("hidden", 0), ("x", 1)], [("hidden", 1), ("x", 0)]]
    assert len(set(result.tried)) >= 4


class Even(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and x.shape[0] != 2:
            raise ValueError("two only")
        return x + 1


def test_sizes_that_could_not_be_tried_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no other sizes of \['batch'\] were tried, because the model refused"):
        exported(Even(), tmp_path, "torch_export", torch.randn(2), torch.randn(2))


def test_lengths_beyond_the_positions_of_a_model_are_not_tried(tmp_path: Path) -> None:
    ids = torch.randint(3, 99, (2, 38))
    example = _transformers("RobertaModel", "RobertaConfig", {"input_ids": ids}, **ENCODER)
    result = exported(example.model(), tmp_path, "torch_export", kwargs=example.kwargs)
    lengths = {shapes[0][1] for shapes in result.tried}
    assert "length" in result.dynamic and max(lengths) == 38 and min(lengths) < 20


# ------------------------------------------------------------------------------------------------ choices of the user


def test_sizes_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.randn(2, 3, 8, 8)
    result = exported(model, tmp_path, "torch_export", image, dynamic={"input": {0: "batch", 2: "height", -1: "width"}})
    assert result.dynamic == {"batch": (("input", 0),), "height": (("input", 2),), "width": (("input", 3),)}
    assert len({shapes[0][2:] for shapes in result.tried}) >= 3
    fixed = exported(model, tmp_path, "torch_export", image, dynamic={})
    assert fixed.dynamic == {} and {shapes[0] for shapes in fixed.tried} == {(2, 3, 8, 8)}


def test_a_size_that_was_asked_for_and_cannot_vary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Expected a model that torch\.export and \.pt2 can express, but got"):
        exported(nn.Linear(4, 2), tmp_path, "torch_export", torch.randn(3, 4), dynamic={"input": {1: "width"}})
    assert list(tmp_path.iterdir()) == []


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 4).cumsum(0)


def test_a_fixed_batch_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"model\.pt2: the batch size is fixed at that of the example"):
        result = exported(FixedBatch(), tmp_path, "torch_export", torch.randn(3, 4))
    assert result.dynamic == {}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_precision(precision: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 999), nn.ReLU(), nn.Linear(999, 8))
    format = "onnx" if precision == "float16" else "torch_export"
    full = exported(model, tmp_path, format, torch.randn(2, 64))
    half = exported(model, tmp_path, format, torch.randn(2, 64), precision=precision)
    assert full.error < 1e-5 < half.error < half.tolerance
    assert half.bytes < 0.75 * full.bytes
    assert model[0].weight.dtype == torch.float32
    if format == "torch_export":
        assert torch.export.load(half.path).module()(input=torch.randn(3, 64)).dtype == torch.float32


def test_openvino_stores_weights_in_half_precision(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    sizes = {
        p: exported(model, tmp_path, "openvino", torch.randn(2, 64), precision=p).files["model.bin"]
        for p in ("float32", "float16")
    }
    assert sizes["float16"] < 0.6 * sizes["float32"]


def test_opset(tmp_path: Path) -> None:
    needs("onnx")
    import onnx

    result = exported(nn.Linear(4, 2), tmp_path, "onnx", torch.randn(2, 4), opset=21)
    assert onnx.load(result.path).opset_import[0].version == 21


def test_further_calls_are_checked(tmp_path: Path) -> None:
    x = torch.randn(7, 4)
    result = exported(nn.Linear(4, 2), tmp_path, "torch_export", torch.randn(2, 4), check=[((x,), {})])
    assert result.tried[1] == ((7, 4),)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_file_that_differs_does_not_appear(tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    target.write_bytes(b"an older file")
    with pytest.raises(ExportError, match=r"Expected output 'output' to be that of the model within 1e-09.*\(2, 64\)"):
        export_model(
            nn.Linear(64, 8), target, "torch_export", ((torch.randn(2, 64),), {}), precision="float16", tolerance=1e-9
        )
    assert target.read_bytes() == b"an older file" and list(tmp_path.iterdir()) == [target]


def test_a_file_that_does_not_run_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, names: Any) -> formats.Run:
        def run(tensors: Any) -> list[Tensor]:
            raise RuntimeError("no kernel")

        return run

    form = formats.FORMATS["torch_export"]
    monkeypatch.setitem(formats.FORMATS, "torch_export", formats.Format(form.suffix, None, (), form.write, broken))
    with pytest.raises(ExportError, match=r"Expected the file to run on inputs .* but got RuntimeError: no kernel"):
        exported(nn.Linear(4, 2), tmp_path, "torch_export", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_a_format_cannot_express_are_fixed_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = formats.FORMATS["torch_export"]

    def write(traced: Any, path: Path, options: Any) -> None:
        path.write_bytes(b"half a file")
        if "length" in traced.groups:
            raise RuntimeError("no operator")
        form.write(traced, path, options)

    monkeypatch.setitem(formats.FORMATS, "torch_export", formats.Format(".pt2", None, (), write, form.read))
    example = MODELS["nn.TransformerEncoder"]
    with pytest.warns(UserWarning, match=r"lengths are fixed .* with free ones: RuntimeError: no operator"):
        result = exported(example.model(), tmp_path, "torch_export", *example.args)
    assert set(result.dynamic) == {"batch"}


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("onnx", "onnxscript", "onnx"), ("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")],
)
def test_a_missing_package_is_named_with_its_extra(
    format: Any, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in formats.FORMATS[format].packages:
        if other != package:
            monkeypatch.setitem(sys.modules, other, sys)  # there, whatever is installed
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"Expected '{package}' to be installed for format='{format}'.*lightning-compress\[{extra}\]"
    ):
        export_model(nn.Linear(2, 2), tmp_path / f"model{SUFFIX[format]}", format, ((torch.zeros(2, 2),), {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"format": "tflite"},
            r"Expected format to be one of \['onnx', 'torch_export', 'openvino'\], but got 'tflite'",
        ),
        ({"path": "m.bin"}, r"Expected a path that ends in '\.pt2' for format='torch_export', but got '.*m\.bin'"),
        ({"precision": "int8"}, r"Expected precision to be one of .*, but got 'int8'"),
        ({"format": "openvino", "path": "m.xml", "precision": "bfloat16"}, r"INFERENCE_PRECISION_HINT"),
        ({"opset": 18}, r"Expected no opset for format='torch_export'.*, but got 18"),
        ({"example": ((), {})}, r"Expected an example with at least one tensor, but got none"),
        ({"dynamic": {"y": {0: "n"}}}, r"Expected dynamic to name inputs out of \['input'\], but got 'y'"),
        (
            {"dynamic": {"input": {2: "n"}}},
            r"Expected a dimension of 'input', of shape \(3, 4\), in dynamic, but got 2",
        ),
        ({"dynamic": {"input": {0: "n", 1: "n"}}}, r"that dynamic calls 'n' to agree .* but they are \[3, 4\]"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"format": "torch_export", "path": "m.pt2", "example": ((torch.randn(3, 4),), {})}
    arguments |= options
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(ValueError, match=complaint):
        export_model(nn.Linear(4, 2), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_tensors_inside_an_object_are_refused(tmp_path: Path) -> None:
    class Batch:
        def __init__(self) -> None:
            self.ids = torch.zeros(2, 2)

    with pytest.raises(ValueError, match=r"'input' is an object of Batch with tensors inside.*Pass dict\(\.\.\.\)"):
        export_model(nn.Linear(2, 2), tmp_path / "m.pt2", "torch_export", ((Batch(),), {}))


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Expected weights with values, but 'weight' has none"):
        export_model(model, tmp_path / "m.pt2", "torch_export", ((torch.zeros(2, 2),), {}))


# ------------------------------------------------------------------------------------------------------------ the parts


def test_random_calls_look_like_the_example() -> None:
    hidden = torch.zeros(2, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    kwargs = {
        "ids": torch.tensor([[5, 9, 7, 6], [8, 5, 9, 9]]),
        "mask": torch.tensor([[True, True, True, True], [True, True, False, False]]),
        "hidden": hidden,
        "x": 100 + torch.randn(2, 4, 3),
        "time": torch.tensor(3),
    }
    call = flatten_call(nn.Module(), (), kwargs)
    groups = derive(call)
    assert groups["batch"] == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert groups["length"] == ((0, 1), (1, 1), (2, 2), (2, 3), (3, 1))
    ids, mask, larger, x, time = resized(call, groups, {"batch": 3, "length": 8}, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 8) and set(ids.flatten().tolist()) <= {5, 6, 7, 8, 9} and ids.dtype == torch.long
    assert mask.tolist()[0] == [True] * 8 and mask.tolist()[2] == [True] * 4 + [False] * 4
    assert larger.shape == (3, 1, 8, 8) and set(larger.flatten().tolist()) == {0.0, -torch.inf}
    assert x.shape == (3, 8, 3) and 98 < float(x.mean()) < 102
    assert int(time) == 3


def test_relative_error() -> None:
    expected = torch.tensor([1.0, -4.0, torch.inf, torch.nan])
    assert relative_error(torch.tensor([1.0, -3.0, torch.inf, torch.nan]), expected) == 0.25
    assert relative_error(torch.tensor([1.0, -4.0, -torch.inf, torch.nan]), expected) == torch.inf
    assert relative_error(torch.tensor([1.0, -4.0, 3.0, torch.nan]), expected) == torch.inf
    assert relative_error(torch.zeros(3), torch.zeros(4)) == torch.inf
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_error(torch.full((2,), 0.5), torch.zeros(2)) == 0.5


@pytest.mark.parametrize(
    ("text", "name"), [("[0]", "output_0"), ("[logits]", "logits"), ("", "output"), (".a[1].b", "a_1_b")]
)
def test_identifiers(text: str, name: str) -> None:
    assert identifier(text, "output") == name
