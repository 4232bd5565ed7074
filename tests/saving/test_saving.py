"""A saved model is the model: built again anywhere, from data alone."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_compress import PruningPlan, apply_plan, discover
from lightning_compress.saving import load_compressed, read_manifest, save_compressed
from lightning_compress.surgery.record import record_of, records
from tests.test_theorem import call, error
from tests.zoo import MODELS


def compressed(name: str) -> nn.Module:
    example = MODELS[name]
    model, kwargs = example.model(), example.kwargs or {}
    structures = discover(model, example.args, kwargs, prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(0, s.units, 2) for s in structures})
    apply_plan(model, plan, verify=(example.args, kwargs))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_again(name: str, tmp_path: Path) -> None:
    example, model = MODELS[name], compressed(name)
    factory = None if hasattr(model, "config") else example.build
    manifest = save_compressed(model, tmp_path / "small", factory)
    assert (manifest.base is None) == (factory is not None)
    again = load_compressed(tmp_path / "small", factory)
    assert not again.training
    kwargs = example.kwargs or {}
    assert error(call(again, example.args, kwargs), call(model, example.args, kwargs)) < 1e-6
    state = again.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    shared = {id(p) for p in model.parameters()}
    assert len({id(p) for p in again.parameters()}) == len(shared)
    assert sorted(os.listdir(tmp_path / "small")) == ["compression.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["small"]


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 3)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


EXAMPLE = (torch.randn(5, 4),)


def cut(model: nn.Module, kept: Any) -> None:
    structures = discover(model, EXAMPLE, prove=True)
    apply_plan(model, PruningPlan.of(model, structures, {"ffn": kept}), verify=(EXAMPLE, {}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = Net()
    cut(model, (1, 4, 6))
    save_compressed(model, tmp_path / "model")
    return tmp_path / "model"


def test_removals_are_replayed_in_order_wherever_they_happened(tmp_path: Path) -> None:
    outer = Outer()
    cut(outer.inner, (0, 2, 3, 5, 7))
    cut(outer.inner, (1, 4))
    assert [len(r.plans) for r in records(outer).values()] == [2] and record_of(outer) is None
    save_compressed(copy.deepcopy(outer), tmp_path / "model", Outer)
    again = load_compressed(tmp_path / "model", Outer)
    assert again.inner.up.weight.shape == (2, 4)
    assert torch.equal(again(*EXAMPLE), outer(*EXAMPLE))
    assert [path for path, _ in read_manifest(tmp_path / "model").removals] == ["inner", "inner"]
    save_compressed(again, tmp_path / "again", Outer)  # a loaded model can be saved again


def test_a_dense_model_is_saved_too(tmp_path: Path) -> None:
    model = Net()
    save_compressed(model, tmp_path / "model", Net)
    assert torch.equal(load_compressed(tmp_path / "model", Net)(*EXAMPLE), model(*EXAMPLE))


def test_types_follow(tmp_path: Path) -> None:
    model = Net()
    cut(model, (1, 2))
    model.bfloat16()
    save_compressed(model, tmp_path / "model", Net)
    again = load_compressed(tmp_path / "model", Net)
    assert again.up.weight.dtype == torch.bfloat16 and isinstance(again.up.weight, nn.Parameter)


def test_a_configuration_changed_by_surgery_is_saved_as_it_was(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=50, hidden_size=16, num_heads=4, head_dim=8, state_size=4, n_groups=1, num_hidden_layers=1
    )
    assert config.time_step_limit[1] == float("inf")  # which JSON cannot say
    model = transformers.Mamba2Model(config).eval()
    save_compressed(model, tmp_path / "model")
    assert load_compressed(tmp_path / "model").config.time_step_limit[1] == float("inf")


# What is refused


def test_state_that_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    class Extra(Net):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ValueError, match=r"'_extra_state' is a dict"):
        save_compressed(Extra(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"'steps' to have values, but it lies on the meta device"):
        save_compressed(Net().to("meta"), tmp_path / "b")
    sparse = Net()
    sparse.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"Expected 'mask' to be a dense tensor of one of the types float64, "):
        save_compressed(sparse, tmp_path / "c")
    with pytest.raises(ValueError, match=r"to be built again from what is saved, .*'up.weight' .*shape \(8, 4\)"):
        save_compressed(Net(), tmp_path / "d", lambda: Net(9))
    assert os.listdir(tmp_path) == []


def test_folders_are_replaced_only_when_asked_and_only_saved_models(saved: Path) -> None:
    model = Net()
    with pytest.raises(FileExistsError, match=r"to be empty or not to exist, but it holds"):
        save_compressed(model, saved)
    save_compressed(model, saved, overwrite=True)
    assert torch.equal(load_compressed(saved, Net)(*EXAMPLE), model(*EXAMPLE))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"to hold a saved model and nothing else"):
        save_compressed(model, saved, overwrite=True)
    with pytest.raises(FileExistsError, match=r"to be a folder or not to exist, but it is something else"):
        save_compressed(model, saved / "notes.txt")
    assert (saved / "notes.txt").read_text() == "mine"


def test_an_interrupted_save_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "compression.json").read_bytes()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        save_compressed(Net(), saved, overwrite=True)
    assert (saved / "compression.json").read_bytes() == before
    assert os.listdir(saved.parent) == ["model"]


def test_the_factory_must_build_the_dense_model(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a factory for .*, because its dense model is none of transformers"):
        load_compressed(saved)
    with pytest.raises(ValueError, match=r"Expected the factory to return an nn.Module, but got NoneType"):
        load_compressed(saved, lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"This is a plan for another model"):
        load_compressed(saved, lambda: Net(9))

    class More(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"has \['extra.bias', 'extra.weight'\] \(2\) beyond them"):
        load_compressed(saved, More)
    outer = Outer()
    cut(outer.inner, (1,))
    save_compressed(outer, saved.parent / "outer")
    with pytest.raises(ValueError, match=r"Expected the dense model to have a module 'inner'"):
        load_compressed(saved.parent / "outer", Net)


def edited(folder: Path, change: Any) -> None:
    data = json.loads((folder / "compression.json").read_text())
    change(data)
    (folder / "compression.json").write_text(json.dumps(data))


def test_damaged_files_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"Expected model.safetensors to have \d+ bytes, as compression.json"):
        load_compressed(saved, Net)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"Expected model.safetensors to have the checksum .*damaged or another file"):
        load_compressed(saved, Net)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors' to exist, as compression.json says"):
        load_compressed(saved, Net)
    (saved / "compression.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"compression.json: expected text in UTF-8"):
        load_compressed(saved, Net)
    (saved / "compression.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected a saved model in .*, but it has no compression.json"):
        load_compressed(saved, Net)


def resealed(folder: Path, content: bytes) -> None:
    """Write weights and the checksum that fits them."""
    import hashlib

    (folder / "model.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edited(folder, lambda d: d["files"].update({"model.safetensors": {"bytes": len(content), "sha256": digest}}))


def test_weights_that_fit_their_checksum_are_checked_all_the_same(saved: Path) -> None:
    from safetensors.torch import save

    state = load_file(saved / "model.safetensors")
    resealed(saved, save({**state, "up.bias": state["up.bias"].double()}))
    with pytest.raises(ValueError, match=r"Expected 'up.bias' to be float32 of shape \(3,\), .* but got float64"):
        load_compressed(saved, Net)
    resealed(saved, save({"up.bias": state["up.bias"]}))
    with pytest.raises(ValueError, match=r"to hold the tensors that compression.json lists, but .* are missing"):
        load_compressed(saved, Net)
    resealed(saved, save({**state, "up.bias": state["up.bias"] * float("nan")}))
    with pytest.raises(ValueError, match=r"Expected 'up.bias' to hold numbers, but it holds NaN"):
        load_compressed(saved, Net)
    assert bool(load_compressed(saved, Net, nan=True).up.bias.isnan().all())
    resealed(saved, b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header.. ")
    with pytest.raises(ValueError, match=r"Expected model.safetensors to be a safetensors file, but it cannot be read"):
        load_compressed(saved, Net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), r"format to be one of \('lightning_compress.model',\), but got 'x'"),
        (lambda d: d.update(version=2), r"version to be 1 \(newer files need a newer lightning_compress\), but got 2"),
        (lambda d: d.update(version=True), "version to be 1 .*but got True"),
        (lambda d: d.pop("shared"), r"the keys .* but \['shared'\] are missing"),
        (lambda d: d.update(quantization={}), r"quantization to have the keys .*'weights'\] are missing"),
        (lambda d: d.update(tensors=3), "tensors to be an object, but got 3"),
        (lambda d: d["tensors"]["up.bias"].update(dtype="object"), r"tensors\['up.bias'\].dtype to be one of"),
        (lambda d: d["tensors"]["up.bias"].update(shape="3"), r"shape to be a list, but got '3'"),
        (lambda d: d["tensors"]["up.bias"].update(shape=[1] * 99), r"shape to be a list of at most 16 sizes"),
        (lambda d: d["tensors"]["up.bias"].update(shape=[-1]), r"shape\[0\] to be an integer from 0"),
        (lambda d: d["shared"].update(a="b"), r"shared\['a'\] to be the name of a stored tensor"),
        (lambda d: d["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "files to be an object"),
        (lambda d: d["files"]["model.safetensors"].update(sha256="zz"), "sha256 to be 64 hexadecimal digits"),
        (lambda d: d["files"]["model.safetensors"].update(bytes=10**30), "bytes to be an integer"),
        (lambda d: d.update(versions={"torch": 2}), r"versions\['torch'\] to be a string, but got 2"),
        (lambda d: d["removals"][0].update(module=3), r"removals\[0\].module to be a string"),
        (lambda d: d["removals"][0]["plan"].update(format="x"), r"in removals\[0\].plan: Malformed pruning plan"),
        (lambda d: d.update(base={"library": "os", "class": "A", "config": {}}), "base.library to be one of"),
        (
            lambda d: d.update(base={"library": "transformers", "class": "a.b", "config": {}}),
            "base.class to be the name of a class",
        ),
    ],
)
def test_a_malformed_manifest_is_refused_with_its_key_path(saved: Path, change: Any, message: str) -> None:
    edited(saved, change)
    with pytest.raises(ValueError, match=message):
        load_compressed(saved, Net)


def test_text_that_is_no_json_or_says_things_twice_is_refused(saved: Path) -> None:
    path = saved / "compression.json"
    for text, message in (
        ("{", "Expected a compression manifest as JSON, but it cannot be parsed"),
        ("[" * 100_000, "Expected a compression manifest as JSON, but it cannot be parsed"),
        ('{"format": 1, "format": 2}', r"expected each key once in an object, but got \['format'\] twice"),
        ('{"format": NaN}', "expected finite numbers, but got NaN"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_compressed(saved, Net)
    with open(path, "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match=r"Expected compression.json to have at most"):
        load_compressed(saved, Net)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Trainer", {}, "Expected a model of transformers .*, but it has no 'Trainer'"),
        ("BertModel", {"attn_implementation": "somebody/kernel"}, "kernels from elsewhere are not loaded"),
        ("BertModel", {"hidden_size": "x"}, "Expected the saved configuration to build a BertModel, but it raised"),
        ("BertModel", {"a": [[[]]] * 1}, None),
    ],
)
def test_a_base_that_nobody_vouches_for_is_checked(saved: Path, name: str, config: Any, message: str | None) -> None:
    pytest.importorskip("transformers")
    if message is None:
        for _ in range(40):
            config = {"a": config}
        message = "Expected a configuration at most 32 levels deep"
    edited(saved, lambda d: d.update(base={"library": "transformers", "class": name, "config": config}))
    with pytest.raises(ValueError, match=message):
        load_compressed(saved)
