"""Surgery on files == surgery on the model, bit for bit; and what is refused before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.budget import make_plan
from lightning_compress.discovery import trace_structures
from lightning_compress.export import apply_plan_to_checkpoint, checkpoint_scores, safetensors_file
from lightning_compress.export import checkpoint as module
from lightning_compress.importance import unit_scores
from lightning_compress.plan import PruningPlan
from lightning_compress.surgery import apply_plan
from tests.zoo import MODELS

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 2))


def plan_of(model: nn.Module, prove: bool = True) -> PruningPlan:
    return make_plan(model, discover(model, (X,), prove=prove), units=0.5)


def write(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, total_parameters: bool = False) -> Path:
    """A checkpoint as people save it: one file, or several and an index; tensors in the order of their names."""
    folder.mkdir()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "step": "7"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    metadata = {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}
    if total_parameters:
        metadata["total_parameters"] = sum(t.numel() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as it is saved: a shared tensor under its first name."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


THEOREM = (
    "nn.TransformerEncoder",
    "packed attention, literal sizes",
    "depthwise CNN",
    "LSTM",
    "BERT",
    "GPT-2",
    "Llama",
    "T5",
)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", THEOREM)
def test_files_become_what_the_model_becomes(name: str, shards: int, tmp_path: Path) -> None:
    example = MODELS[name]
    model = example.model()
    structures = discover(model, example.args, example.kwargs, prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(0, s.units, 2) for s in structures})
    dense = write(tmp_path / "dense", state_of(model), shards)
    unsaved = sorted(set(plan.shapes) - set(model.state_dict()))  # rotary frequencies
    report = apply_plan_to_checkpoint(plan, dense, tmp_path / "small", missing=unsaved)
    apply_plan(model, plan, unverified=True)
    assert_equal(read(tmp_path / "small"), state_of(model))
    assert report.elements_after == sum(t.numel() for t in state_of(model).values()) < report.elements_before

    fresh = example.model(seed=1)
    apply_plan(fresh, PruningPlan.load(tmp_path / "small" / "pruning_plan.json"), unverified=True)
    state = fresh.state_dict()
    shared = {n: t for n, t in state.items() if n not in state_of(fresh)}
    fresh.load_state_dict({**shared, **read(tmp_path / "small")})
    with torch.no_grad():
        a, b = model(*example.args, **example.kwargs or {}), fresh(*example.args, **example.kwargs or {})
    assert torch.equal(a if isinstance(a, Tensor) else a[0], b if isinstance(b, Tensor) else b[0])


@pytest.mark.parametrize(("name", "kind"), [("BERT", "hidden"), ("Llama", "hidden"), ("LSTM", "vocab")])
def test_residual_width_and_vocabulary_are_slices_too(name: str, kind: str, tmp_path: Path) -> None:
    example = MODELS[name]
    model = example.model()
    structures = discover(model, example.args, example.kwargs, kinds=kind, prove=True)
    assert {s.kind for s in structures} == {kind}
    plan = PruningPlan.of(model, structures, {s.name: range(0, s.units, 2) for s in structures})
    dense = write(tmp_path / "dense", state_of(model), 3)
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small")
    apply_plan(model, plan, unverified=True)
    assert_equal(read(tmp_path / "small"), state_of(model))


def test_units_that_are_modules_are_refused(tmp_path: Path) -> None:
    model = mlp()
    plan = plan_of(model)
    layers = tuple(replace(s, members=tuple(f"layers.{u}" for u in range(s.units))) for s in plan.structures)
    with pytest.raises(
        ValueError, match=r"those of 'ffn' are whole modules \('layers.0', ...\), whose removal renames"
    ):
        apply_plan_to_checkpoint(
            replace(plan, structures=layers), write(tmp_path / "d", model.state_dict()), tmp_path / "s"
        )


def test_a_model_never_made_with_values(tmp_path: Path) -> None:
    """Discovery on meta, scores and surgery on files, weights assigned to a small model made on meta."""
    example = MODELS["separate attention"]
    model = example.model()
    dense = write(tmp_path / "dense", state_of(model), 3)
    with torch.device("meta"):
        skeleton = example.build().eval()
    structures = trace_structures(skeleton, example.args)
    scores = checkpoint_scores(structures, dense)
    plan = make_plan(skeleton, structures, macs=0.5, scores=scores)
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small")

    report = apply_plan(model, plan, verify=(example.args, {}))
    assert {s.tier for s in report.plan.structures} == {"native"}
    assert_equal(read(tmp_path / "small"), state_of(model))  # unproven, but cut as native
    with torch.device("meta"):
        small = example.build().eval()
    apply_plan(small, report.plan)
    small.load_state_dict(read(tmp_path / "small"), assign=True)
    assert torch.equal(small(*example.args), model(*example.args))


def test_an_unproven_plan_keeps_its_tier_open(tmp_path: Path) -> None:
    model = mlp()
    plan = plan_of(model, prove=False)
    apply_plan_to_checkpoint(plan, write(tmp_path / "dense", model.state_dict()), tmp_path / "small")
    saved = PruningPlan.load(tmp_path / "small" / "pruning_plan.json")
    assert [s.tier for s in saved.structures] == [None] and saved.kept == plan.kept


class LiteralSizes(nn.Module):
    """Literal sizes force a shim, which leaves the scale behind it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(4, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x).view(-1, 2, 4) * 1.0).reshape(-1, 8) * self.scale)


def test_an_unproven_cut_that_surgery_would_not_make_cannot_be_loaded(tmp_path: Path) -> None:
    model = LiteralSizes()
    dense = write(tmp_path / "dense", model.state_dict())
    structures = discover(model, (X,))
    plan = PruningPlan.of(model, structures, {s.name: range(s.units // 2) for s in structures})
    apply_plan_to_checkpoint(plan, dense, tmp_path / "unproven")
    report = apply_plan(model, plan, verify=((X,), {}))
    assert {s.tier for s in report.plan.structures} == {"shim"}
    with pytest.raises(RuntimeError, match=r"size mismatch for scale"):
        model.load_state_dict(read(tmp_path / "unproven"))
    apply_plan_to_checkpoint(report.plan, dense, tmp_path / "proven")
    assert_equal(read(tmp_path / "proven"), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_types_metadata_names_and_files_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = mlp()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    state["step"] = torch.tensor(3)
    state["empty"] = torch.zeros(0, 5)
    state["mask"] = torch.tensor([True, False, True])
    plan = plan_of(model)
    report = apply_plan_to_checkpoint(plan, write(tmp_path / "dense", state), tmp_path / "small")
    found = read(tmp_path / "small")
    kept = torch.tensor(plan.kept["ffn"])
    assert found.keys() == state.keys() and all(found[name].dtype == state[name].dtype for name in state)
    assert torch.equal(found["0.weight"].float(), state["0.weight"].float()[kept])
    assert torch.equal(found["2.weight"].float(), state["2.weight"].float()[:, kept])
    for name in ("step", "empty", "mask"):
        assert torch.equal(found[name], state[name])
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    assert (tmp_path / "small" / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert report.copied == ("config.json", "tokenizer.model") and report.left_out == ()
    assert set(report.cut) == {"0.weight", "0.bias", "2.weight"}
    assert f"in 1 file(s), 3 tensors cut, {report.seconds:.2f} s" in str(report)


def test_the_index_tells_the_new_sizes(tmp_path: Path) -> None:
    model = mlp()
    dense = write(tmp_path / "dense", model.state_dict(), 2, total_parameters=True)
    apply_plan_to_checkpoint(plan_of(model), dense, tmp_path / "small")
    old = json.loads((dense / "model.safetensors.index.json").read_text())
    new = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    elements = 4 * 4 + 4 + 2 * 4 + 2
    assert new["metadata"] == {"total_size": 4 * elements, "total_parameters": elements}
    assert new["weight_map"] == old["weight_map"]
    assert sorted(os.listdir(tmp_path / "small")) == sorted([*os.listdir(dense), "pruning_plan.json"])


def test_other_weights_and_folders_are_left_out(tmp_path: Path) -> None:
    model = mlp()
    dense = write(tmp_path / "dense", model.state_dict())
    (dense / "pytorch_model.bin").write_bytes(b"old")
    (dense / "original").mkdir()
    report = apply_plan_to_checkpoint(plan_of(model), dense, tmp_path / "small")
    assert report.left_out == ("original", "pytorch_model.bin")
    assert "not copied: original, pytorch_model.bin" in str(report)
    assert not (tmp_path / "small" / "original").exists()


def test_a_small_checkpoint_is_cut_again(tmp_path: Path) -> None:
    model = mlp()
    write(tmp_path / "dense", model.state_dict())
    first = plan_of(model)
    apply_plan_to_checkpoint(first, tmp_path / "dense", tmp_path / "small")
    apply_plan(model, first, unverified=True)
    second = plan_of(model)
    apply_plan_to_checkpoint(second, tmp_path / "small", tmp_path / "smaller")
    apply_plan(model, second, unverified=True)
    assert_equal(read(tmp_path / "smaller"), model.state_dict())
    both = PruningPlan.load(tmp_path / "smaller" / "pruning_plan.json")
    assert both.kept == first.compose(second).kept
    fresh = mlp()
    apply_plan(fresh, both, unverified=True)
    fresh.load_state_dict(read(tmp_path / "smaller"))


def test_shared_tensors_saved_twice_are_cut_alike(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.again = nn.Linear(4, 8, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu() + self.again(x))

    model = Shared()
    plan = plan_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = write(tmp_path / "dense", state)
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small", rename={"again.weight": "up.weight"})
    apply_plan(model, plan, unverified=True)
    assert_equal(read(tmp_path / "small"), model.state_dict())


@pytest.mark.parametrize(
    ("stored", "advice", "rename"),
    [
        (
            lambda name: f"model.{name}",
            r"behind 'model\.': pass rename=lambda name: name.removeprefix\('model\.'\)",
            lambda name: name.removeprefix("model."),
        ),
        (
            lambda name: name.removeprefix("body."),
            r"without 'body\.': pass rename=lambda name: 'body\.' \+ name",
            lambda name: "body." + name,
        ),
    ],
)
def test_prefixes_are_named_and_never_guessed(
    stored: Callable[[str], str], advice: str, rename: Callable[[str], str], tmp_path: Path
) -> None:
    model = nn.Sequential()
    model.add_module("body", mlp())
    plan = plan_of(model)
    dense = write(tmp_path / "dense", {stored(name): tensor for name, tensor in model.state_dict().items()})
    with pytest.raises(ValueError, match=rf"to have 'body.0.weight', which the plan cuts.*3 of 3 are mis.*{advice}"):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "small")
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small", rename=rename)
    apply_plan(model, plan, unverified=True)
    assert_equal(read(tmp_path / "small"), {stored(name): tensor for name, tensor in model.state_dict().items()})
    scores = checkpoint_scores(plan.structures, dense, rename=rename)
    assert scores.keys() == plan.kept.keys()


def test_what_is_missing_has_to_be_named(tmp_path: Path) -> None:
    model = mlp()
    plan = plan_of(model)
    state = model.state_dict()
    del state["0.bias"]
    dense = write(tmp_path / "dense", state)
    with pytest.raises(ValueError, match=r"'0.bias'.*1 of 3 are missing.*pass rename=.*pass missing="):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "small")
    with pytest.raises(ValueError, match="missing to name parameters or buffers of the plan, but got 'bias'"):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "small", missing=["bias"])
    with pytest.raises(ValueError, match="rename to map names of the checkpoint, but it has no 'bias'"):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "small", rename={"bias": "0.bias"})
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small", missing=["0.bias"])
    assert read(tmp_path / "small").keys() == state.keys()


def test_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = plan_of(mlp())
    dense = write(tmp_path / "dense", mlp(9).state_dict())
    with pytest.raises(ValueError, match=r"'0.bias' to have shape \(8,\).*got \(9,\). This is a plan for another"):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "small")
    apply_plan_to_checkpoint(plan, write(tmp_path / "right", mlp().state_dict()), tmp_path / "small")
    with pytest.raises(ValueError, match=r"got \(4,\). This plan was already applied"):
        apply_plan_to_checkpoint(plan, tmp_path / "small", tmp_path / "smaller")
    assert sorted(os.listdir(tmp_path)) == ["dense", "right", "small"]


def test_a_type_that_cannot_be_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    dense = write(tmp_path / "dense", model.state_dict())
    monkeypatch.delitem(safetensors_file.DTYPES, "F32")
    with pytest.raises(ValueError, match=r"to have a type that can be cut.*but got F32"):
        apply_plan_to_checkpoint(plan_of(model), dense, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_where_the_folders_must_be(tmp_path: Path) -> None:
    model = mlp()
    plan = plan_of(model)
    with pytest.raises(FileNotFoundError, match=r"Expected model.safetensors.index.json or model.safetensors in"):
        apply_plan_to_checkpoint(plan, tmp_path / "nothing", tmp_path / "small")
    dense = write(tmp_path / "dense", model.state_dict())
    with pytest.raises(FileExistsError, match="out_dir to be absent or an empty folder"):
        apply_plan_to_checkpoint(plan, dense, dense)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="out_dir to be absent or an empty folder"):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="in which out_dir is to be made"):
        apply_plan_to_checkpoint(plan, dense, tmp_path / "no" / "small")
    (tmp_path / "small").mkdir()
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small")  # empty
    assert read(tmp_path / "small")


def test_a_crash_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    dense = write(tmp_path / "dense", model.state_dict(), 2)
    written = []

    def fail_at_second(source: object, target: Path, *rest: object) -> None:
        written.append(target)
        if len(written) == 2:
            raise KeyboardInterrupt
        target.write_bytes(b"")

    monkeypatch.setattr(module, "rewrite", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        apply_plan_to_checkpoint(plan_of(model), dense, tmp_path / "small")
    assert len(written) == 2 and written[0].parent.parent == tmp_path
    assert os.listdir(tmp_path) == ["dense"]


OUTSIDE = ("../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "x.bin", "a\\b.safetensors")


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_points_into_its_own_folder(file: str, tmp_path: Path) -> None:
    model = mlp()
    dense = write(tmp_path / "dense", model.state_dict(), 2)
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    index["weight_map"]["0.weight"] = file
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"to list .safetensors files of its own folder, but got"):
        apply_plan_to_checkpoint(plan_of(model), dense, tmp_path / "small")


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    model = mlp()
    plan = plan_of(model)
    dense = write(tmp_path / "dense", model.state_dict(), 2)
    path = dense / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def refused(content: object, error: type[Exception], message: str) -> None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(error, match=message):
            apply_plan_to_checkpoint(plan, dense, tmp_path / "small")

    refused("{", ValueError, "to be JSON, but it cannot be parsed")
    refused([], ValueError, 'to have a "weight_map"')
    files = dict(index["weight_map"])
    refused({"weight_map": {**files, "0.weight": "gone.safetensors"}}, FileNotFoundError, "'gone.safetensors' in")
    del files["2.bias"]
    refused({"weight_map": files}, ValueError, r"exactly the tensors of its files, but they disagree on 1.*'2.bias'")
    refused({"weight_map": {**index["weight_map"], "more": files["0.bias"]}}, ValueError, "disagree on 1.*'more'")
    path.write_text(json.dumps(index))
    apply_plan_to_checkpoint(plan, dense, tmp_path / "small")


DAMAGE = (lambda data: data[:-5], lambda data: data[:20], lambda data: b"", lambda data: b"\xff" * 8 + data[8:])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model = mlp()
    dense = write(tmp_path / "dense", model.state_dict())
    path = dense / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"Expected a whole safetensors file, but .*model.safetensors is not"):
        apply_plan_to_checkpoint(plan_of(model), dense, tmp_path / "small")


@pytest.mark.parametrize("chunk", [7, 2**22])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "depthwise CNN", "LSTM"])
def test_scores_of_files_are_those_of_the_model(
    name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_compress.export.scores.CHUNK", chunk)
    example = MODELS[name]
    model = example.model()
    structures = trace_structures(model, example.args, example.kwargs)
    expected = unit_scores(model, structures)
    found = checkpoint_scores(structures, write(tmp_path / "dense", state_of(model), 2))
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-5)


def test_scores_need_the_tensors_of_the_structures(tmp_path: Path) -> None:
    structures = trace_structures(mlp(), (X,))
    with pytest.raises(ValueError, match=r"axis 0 of '0.bias' to have size 8.*but its shape is \(9,\)"):
        checkpoint_scores(structures, write(tmp_path / "other", mlp(9).state_dict()))
    with pytest.raises(ValueError, match=r"the checkpoint to have '0.weight' of structure 'ffn', but it has none"):
        checkpoint_scores(structures, write(tmp_path / "none", {"x": torch.zeros(1)}))
