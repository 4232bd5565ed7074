"""The translation benchmark on a tiny model and a made-up language: each study, costs, maps, resume, table, latency."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

pytest.importorskip("tokenizers", reason="needs the extra `recipes`")

from benchmarks import translation
from benchmarks.significance import significance
from lightning_compress import Distillation, discover
from lightning_compress.budget import cost_polynomial
from lightning_compress.regularizers.blocks import block_line_norms
from recipes import translation as recipe
from recipes.translation import SIZES, Size, TranslationModel
from tests.recipes import toy_language

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning calls a deprecated torch function
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*strategy='naive', strength='auto'.*"),
    pytest.mark.filterwarnings("ignore:Expected to keep params"),  # units of a tiny model are large
]

RUNS = (
    *(
        "dense",
        "longer",
        "ssl-fine-20",
        "ssl-naive-45",
        "ssl-fine-45-large",
        "ssl-coarse-45-taylor-kd",
        "heads-20",
        "units-20",
        "heads-units-20",
        "heads-units-45",
    ),
    *("stochastic1-attention-nearest-taught", "binary-attention-report", "stochastic8-tables-code", "bssl-square-1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder with the files of Multi30k in a made-up language; runs write beside it, the dense one is there."""
    folder = tmp_path_factory.mktemp("translation")
    counts = {"train": 100, "val": 4, **dict.fromkeys((*translation.TESTS, "test_2018_flickr"), 4)}
    toy_language.write(folder / "data" / "multi30k", counts)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "RESULTS"):
            patch.setattr(translation, name, folder / name)
        patch.setattr(translation, "VOCABULARY", 300)
        patch.setattr(translation, "LENGTHS", (4,))
        patch.setitem(SIZES, "tiny", Size(32, 4, 2, 64, 0.1))
        patch.setitem(translation.SCHEDULES, "tiny", translation.Schedule(1, 20, 1000, 2))
        patch.setattr(recipe, "search", partial(recipe.search, extra=2))  # what has learned nothing never ends
        translation.single(run("dense"), str(folder / "data"))
        yield str(folder / "data")


def run(variant: str) -> translation.Run:
    return translation.Run(variant, 0, "tiny")


def test_names_and_commands() -> None:
    one = translation.Run("ssl-coarse-45-taylor-kd", 1, "base")
    assert one.name == "base-ssl-coarse-45-taylor-kd-seed1" and one.dense.name == "base-dense-seed1"
    assert one.arguments == ["--variant", "ssl-coarse-45-taylor-kd", "--size", "base", "--seed", "1"]
    runs = translation.all_runs("small")
    names = [r.variant for r in runs if r.seed == 0]
    assert len(names) == len(set(names)) == len(translation.VARIANTS) - 1
    assert [r.variant for r in runs[: len(names)]] == names  # other seeds come last
    assert {r.variant for r in runs[len(names) :]} == set(translation.REPEATED) and runs[-1].seed == 1
    for percent in (10, 20, 30, 45):
        assert {f"{name}-{percent}-taylor" for name in ("ssl-fine", "ssl-coarse", "shs-coarse")} <= set(names)
    for percent in (20, 45):
        assert {f"ssl-{strategy}-{percent}" for strategy in ("fine", "coarse", "naive")} <= set(names)
    assert {f"{method}-fine-45-{strength}" for method in ("ssl", "shs") for strength in ("small", "large")} <= set(
        names
    )
    quantized = [r.settings.study for r in translation.all_runs("small", ("quantization",)) if r.seed == 0]
    assert quantized == ["dense", *["quantization"] * 28]


def test_the_reference_comes_before_what_is_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[list[str]] = []
    monkeypatch.setattr(
        translation.side_by_side,
        "run_all",
        lambda _, found, *rest: stages.extend([r.variant for r in s] for s in found),
    )
    translation.queue(2, "data", "small", ("bssl",))
    assert stages[0] == ["dense"] * 2 and stages[1] == ["longer"] * 2 and "bssl-square-1" in stages[2]


def test_what_cannot_be_reached_is_not_among_the_runs() -> None:
    for size in SIZES.values():
        assert 12 / 28 * (size.heads - 1) / size.heads < 0.45  # of width^2: three attentions to two feed-forward parts
        assert size.ffn in (2 * size.width, 4 * size.width)
    assert "heads-30" in translation.VARIANTS and "heads-45" not in translation.VARIANTS
    assert "ssl-coarse-60-taylor" in translation.VARIANTS and "ssl-fine-60-taylor" not in translation.VARIANTS


def test_each_seed_is_compared_with_the_reference_of_its_own() -> None:
    def record(seed: int, first: float, second: float) -> dict[str, object]:
        return {"seed": seed, "bleu": dict(zip(translation.TESTS, (first, second), strict=True))}

    reference = [record(0, 40.0, 30.0), record(1, 30.0, 20.0)]
    both = translation.bleu_cells([record(1, 29.0, 19.0), record(0, 40.0, 31.0)], reference)
    assert both == ["29.00 / 40.00", "19.00 / 31.00", "-1.00 / +0.50", "-4.0 % / +1.4 %", ""]
    alone = translation.bleu_cells([record(0, 38.0, 30.0), record(2, 1.0, 1.0)], reference)
    assert alone[2:] == ["-1.00", "-2.9 %", ""]  # there is nothing that the last one could be compared with
    assert translation.bleu_cells([record(0, 38.0, 30.0)], [])[2:] == ["", "", ""]
    tested = record(1, 30.0, 20.0) | {"to_reference": {name: {"p": 0.251} for name in translation.TESTS}}
    assert translation.bleu_cells([record(0, 40.0, 30.0), tested], reference)[-1] == "- / 0.25, 0.25"


def test_differences_are_compared_with_what_other_sentences_would_give() -> None:
    texts = [f"the {a} cat sees the {b} dog and goes home" for a in ("old", "new", "red") for b in ("big", "sad")] * 5
    wrong = [text.replace("cat sees", "sees cat") if number % 3 == 0 else text for number, text in enumerate(texts)]
    alike = significance(list(texts), list(texts), texts)
    assert alike == {"p": 1.0, "interval": 0.0}
    worse = significance(wrong, texts, texts)
    assert worse["p"] < 0.01 and worse["interval"] > 1
    # as many mistakes, some of them elsewhere
    other = [text.replace("cat sees", "sees cat") if number % 4 == 0 else text for number, text in enumerate(texts)]
    other[1:4:2] = [text.replace("cat sees", "sees cat") for text in texts[1:4:2]]
    assert significance(other, wrong, texts)["p"] > 0.2


def test_costs_are_those_that_the_library_counts() -> None:
    model = TranslationModel(300, Size(32, 4, 2, 64, 0.0))
    structures = discover(model, translation.example(), kinds=("head", "ffn"))
    macs = cost_polynomial(structures, "macs").evaluate(structures.counts)
    assert translation.macs_of(model) == macs / 2  # of two sentences
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("in_proj_bias", "linear1.bias")))
    params = cost_polynomial(structures, "params").evaluate(structures.counts)
    assert translation.matrix_weights(model) == params - biases


def test_every_study_runs_and_the_table_has_it(data: str, capsys: pytest.CaptureFixture) -> None:
    records = {}
    for variant in RUNS:
        translation.single(run(variant), data)
        records[variant] = json.loads(run(variant).result.read_text())
        assert set(records[variant]["bleu"]) == {"val", *translation.TESTS}
        assert set(records[variant]["to_reference"]) == (set() if variant in RUNS[:2] else set(translation.TESTS))
        said = json.loads(run(variant).translations.read_text())
        assert {name: len(rows) for name, rows in said.items()} == dict.fromkeys(translation.TESTS, 4)
        assert (
            records[variant]["command"] == f"python benchmarks/translation.py --variant {variant} --size tiny --seed 0"
        )
        assert not list((translation.RUNS / run(variant).name).glob("*.ckpt"))
    translation.single(run("dense"), data)  # finished: skipped
    assert "nothing to do" in capsys.readouterr().out

    whole = TranslationModel(300, SIZES["tiny"])
    for variant in (name for name in RUNS if translation.VARIANTS[name].sparsity):
        wanted = translation.VARIANTS[variant].sparsity / 100
        assert wanted - 0.005 <= records[variant]["sparsity"] <= wanted + 0.03
        assert records[variant]["verification_error"] <= 1e-9
        small = translation.of_its_size(run(variant))
        kept = translation.matrix_weights(small) / translation.matrix_weights(whole)
        assert kept == pytest.approx(1 - records[variant]["sparsity"])
        assert records[variant]["macs_kept"] == translation.macs_of(small) / translation.macs_of(whole)
        for layer in small.transformer.decoder.layers:
            attentions = (layer.self_attn, layer.multihead_attn)
            if "fine" in variant:
                assert layer.linear1.out_features == 64 and all(a.out_proj.in_features == 32 for a in attentions)
            if variant == "heads-20":
                assert layer.linear1.out_features == 64
        if "heads-units" in variant:
            floor = {20: 60, 45: 36}[translation.VARIANTS[variant].sparsity]
            layers = (*small.transformer.encoder.layers, *small.transformer.decoder.layers)
            assert all(floor <= layer.linear1.out_features <= 64 for layer in layers)
        if variant == "heads-units-45":
            gone = 24 - sum(m.num_heads for m in small.modules() if isinstance(m, nn.MultiheadAttention))
            assert gone >= 11  # of 24, which are 60 % of the weights, where the others give 17.5 % at most
    assert {records[name]["sparsity"] for name in ("dense", "longer")} == {0}
    for variant in ("stochastic8-tables-code", "binary-attention-report"):
        assert records[variant]["bytes"] < records["longer"]["bytes"]

    translation.latency("tiny", 1, repeats=2, seconds=0.5)
    translation.table("tiny")
    text = (translation.RESULTS / "tiny-table.md").read_text()
    first = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert set(RUNS) <= set(first)
    cells = json.loads((translation.RESULTS / "tiny-latency.json").read_text())["cells"]
    assert list(cells) == ["core, 1 x 4", "core, 32 x 4", "translate, 1 x 4", "translate, 32 x 4"]
    assert all(cell["dense"]["speedup"] == 1 and "heads-20" in cell for cell in cells.values())


def test_maps_are_the_norms_of_all_matrices(data: str) -> None:
    one = run("bssl-square-loss-large")
    translation.single(one, data)
    record = json.loads(one.result.read_text())
    model = TranslationModel(300, SIZES["tiny"])
    load_model(model, str(one.weights))
    matrices = translation.matrices(model)
    assert len(matrices) == 2 * (4 + 2) + 2 * (8 + 2)
    arrays = numpy.load(translation.RESULTS / record["maps"])
    assert sorted(arrays) == sorted(f"{name}.{which}" for name in matrices for which in ("rows", "columns"))
    assert arrays["encoder.layers.0.self_attn.query.rows"].shape == (32, 4)  # blocks of 8 x 8
    assert arrays["decoder.layers.1.linear1.columns"].shape == (8, 32) and record["dead"].keys() == matrices.keys()
    weight = model.transformer.decoder.layers[1].multihead_attn.in_proj_weight[32:64]
    rows, _ = block_line_norms(weight, block_shape=(8, 8))
    stored = torch.from_numpy(arrays["decoder.layers.1.multihead_attn.key.rows"]).float()
    torch.testing.assert_close(stored, rows.detach(), rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # what is dead is counted
        matrices["encoder.layers.0.linear1"][1][:16] = 0
    dead = translation.save_maps(one, model)["dead"]["encoder.layers.0.linear1"]
    assert dead["rows"] == dead["output_units"] == 0.25 and dead["columns"] == 0.25 and dead["input_units"] == 0


def test_pictures_show_what_was_counted(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    from benchmarks import translation_pictures as pictures

    one = run("bssl-square-1")
    translation.single(one, data)
    with numpy.load(one.maps) as file:  # half of the rows of a matrix are dead
        arrays = {name: file[name] for name in file.files}
    arrays["encoder.layers.1.linear1.rows"][:] = 1
    arrays["encoder.layers.1.linear1.columns"][:] = 1
    arrays["encoder.layers.1.linear1.rows"][:32] = 0
    numpy.savez(one.maps, **arrays)
    maps = pictures.maps_of(one)
    matrix = next(m for m in maps.matrices if m.name == "encoder.layers.1.linear1")
    assert matrix.shape == (64, 32) and matrix.sparsity == 0.5 and matrix.alive.shape == (8, 2)
    assert matrix.alive[:4].eq(0).all() and matrix.alive[4:].eq(1).all()
    rows, columns = pictures.dead_shares(one)["encoder"]
    assert rows["linear1"][1] == 0.5 and columns["linear1"][1] == 0
    dead = json.loads(one.result.read_text())["dead"]
    for side, which in zip(pictures.dead_shares(one)["decoder"], ("rows", "columns"), strict=True):
        assert len(side) == 4 + 4 + 2
        for kind, values in side.items():
            assert values == pytest.approx([dead[f"decoder.layers.{n}.{kind}"][which] for n in range(2)], abs=0.05)

    monkeypatch.setattr("sys.argv", ["x", "--variant", "bssl-square-1", "--size", "tiny", "--folder", str(tmp_path)])
    pictures.main()
    for name in ("bssl_blocks", "bssl_lines"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    command = ["x", "--variant", "bssl-slab-1", "--size", "tiny", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(
        SystemExit, match=r"Expected .*npz: python benchmarks/translation.py --variant bssl-slab-1 --size"
    ):
        pictures.main()
    translation.single(run("bssl-slab-1"), data)
    pictures.main()
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"bssl_{name}.png" for name in ("blocks", "lines", "slab_1_blocks", "slab_1_lines")
    }


def test_an_interrupted_run_goes_on(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(interrupted: bool) -> dict[str, torch.Tensor]:
        one = run("shs-fine-45")
        if interrupted:
            with monkeypatch.context() as patch:
                patch.setattr(translation, "evaluate", stop)
                with pytest.raises(KeyboardInterrupt):
                    translation.single(one, data)
            assert (translation.RUNS / one.name / "last.ckpt").is_file()
        translation.single(one, data)
        one.result.unlink()
        return load_file(one.weights)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    straight, resumed = weights(False), weights(True)
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_a_finished_run_teaches(data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fitted(**settings: Any) -> tuple[list[Distillation], dict[str, Tensor]]:
        """The callbacks that teach, and the weights after a fit."""
        taught = run("heads-20-taught")
        changed = dataclasses.replace(translation.VARIANTS["heads-20-taught"], **settings)
        monkeypatch.setitem(translation.VARIANTS, "heads-20-taught", changed)
        L.seed_everything(0, verbose=False)
        module = translation.new_module(taught, 10)
        callbacks = translation.callbacks_of(taught, module)
        translation.fit(taught, module, translation.parallel_text(data, "tiny", 0), callbacks, 1)
        shutil.rmtree(translation.RUNS / taught.name)
        return [c for c in callbacks if isinstance(c, Distillation)], dict(module.model.state_dict())

    monkeypatch.setattr(translation, "RUNS", tmp_path)
    model = translation.new_module(run("dense")).model
    translation.save_model(model, str(run("dense").weights))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    translation.save_model(model, str(run("longer").weights))
    teacher = translation.teacher_of(run("heads-20-taught"))
    assert teacher is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor)
    assert translation.teacher_of(run("longer")) is None and translation.teacher_of(run("heads-20")) is None
    (with_teacher,), taught = fitted()
    _, by_itself = fitted(teacher="")
    none, alone = fitted(distillation=0.0, teacher="")
    assert with_teacher.alpha == 0.5 and none == []
    assert not torch.equal(taught["output.weight"], by_itself["output.weight"])
    assert not torch.equal(taught["output.weight"], alone["output.weight"])


def test_logits_of_literal_binary_weights_have_their_scale(data: str) -> None:
    module = translation.new_module(run("binary-all-report"), 10)
    attentions = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attentions) == 6 and all(a.scale == 1 / (25 * 8) for a in attentions)


def test_what_is_missing_is_said(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("RUNS", "RESULTS"):
        monkeypatch.setattr(translation, name, tmp_path / name)
    with pytest.raises(
        SystemExit, match=r"tiny-longer-seed0 starts from the dense weights: run `--variant dense --size"
    ):
        translation.train(run("longer"), data)
    run("dense").weights.parent.mkdir(parents=True)
    run("dense").weights.touch()
    with pytest.raises(
        SystemExit, match=r"tiny-heads-20-taught-seed0 learns from the weights of longer: run `--variant longer --size"
    ):
        translation.train(run("heads-20-taught"), data)
    with pytest.raises(SystemExit, match=r"Expected a finished dense run: python benchmarks/translation.py --variant"):
        translation.latency("tiny", 1)
    shutil.copytree(Path(data) / "multi30k", tmp_path / "multi30k")
    for language in ("en", "de"):
        (tmp_path / "multi30k" / f"test_2017_flickr.{language}").unlink()
    with pytest.raises(
        SystemExit, match=r"Expected the test sets \['test_2016_flickr', 'test_2017_flickr'\] in .* but"
    ):
        translation.train(run("dense"), str(tmp_path))
    dense, others = [run("dense")], [run("longer"), run("ssl-coarse-45-taylor-kd")]
    translation.estimate(dense, others, jobs=2)
    said = capsys.readouterr().out
    assert "3 of 3 runs are missing: about" in said and "2 at a time, on cores that make 50 GFLOP/s each" in said
    run("dense").result.parent.mkdir(parents=True)
    run("dense").result.write_text(json.dumps({"seconds_per_step": 4000.0}))
    steps = translation.SCHEDULES["tiny"].steps(translation.BATCHES // 1000, dense=False)
    assert translation.seconds_of(run("longer")) == pytest.approx(1.1 * 4000 * steps)
    translation.estimate(dense, others, jobs=2)
    hours = steps * 4000 / 3600 * (1.1 + 1.35) / 2
    said = capsys.readouterr().out
    assert said.startswith("2 of 3 runs are missing: about ")
    assert float(said.split(" about ")[1].split()[0]) == pytest.approx(hours, abs=0.1)
