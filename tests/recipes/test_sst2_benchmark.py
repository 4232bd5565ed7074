"""The SST-2 benchmark on a tiny encoder: costs, plans, the remembered teacher, and one run of every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `hf`")

from benchmarks import sst2

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning calls a deprecated torch function
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*more than 1 % below.*"),  # few units: a budget is met roughly
]


@pytest.fixture
def workplace(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sst2, "pretrained_folder", lambda: str(pretrained))
    monkeypatch.setattr(sst2, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sst2, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sst2, "TOKENS", 16)
    monkeypatch.setattr(sst2, "example", lambda batch=2: (torch.full((batch, 16), 7), torch.ones(batch, 16).long()))
    monkeypatch.setattr(sst2, "EPOCHS", 1)
    return tmp_path


def test_names_and_commands() -> None:
    assert sst2.Run("dense", 1).name == "dense-seed1"
    assert sst2.Run("ours", 0, 0.125).name == "ours-0.125-seed0"
    assert sst2.Run("ours", 0, 0.125).arguments == ["--method", "ours", "--size", "0.125", "--seed", "0"]


def test_prunable_macs_are_those_of_the_layers(workplace: Path) -> None:
    structures = sst2.encoder_structures(sst2.new_module().model)
    width, inner, tokens, layers = 16, 32, 16, 2
    # per token: four projections, two products with the keys and values of every token, two feed-forward matrices
    per_token = 4 * width * width + 2 * tokens * width + 2 * width * inner
    assert sst2.prunable_macs(structures, structures.counts) == layers * tokens * per_token


def test_uniform_plans_keep_the_same_counts_everywhere(workplace: Path, sentences: Path) -> None:
    data = sst2.TextData(str(sentences), sst2.pretrained_folder(), batch_size=8)
    data.setup()
    (workplace / "runs").mkdir()
    module = sst2.new_module()
    taylor = sst2.baseline_plan(sst2.Run("taylor", 0, 0.5), module, data)
    small = sst2.baseline_plan(sst2.Run("small_dense", 0, 0.5), module, data)
    assert taylor.counts == small.counts
    assert set(taylor.counts.values()) == {2, 16}
    assert all(units == tuple(range(0, 2 * len(units), 2)) for units in small.kept.values())


def test_every_method_runs_and_the_table_has_it(
    workplace: Path, sentences: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = [sst2.Run("dense", 0), *(sst2.Run(method, 0, 0.5) for method in sst2.METHODS)]
    for run in runs:
        sst2.single(run, str(sentences))
        record = json.loads(run.result.read_text())
        assert record["command"].startswith("python benchmarks/sst2.py --method")
        assert not list((sst2.RUNS / run.name).glob("*.ckpt"))
        if run.method != "dense":
            assert record["verification_error"] <= 1e-6
            assert 0.4 < record["encoder_macs_kept"] <= 0.5
            assert record["params"] == sum(p.numel() for p in sst2.smaller_model(run).parameters())
    sst2.single(runs[0], str(sentences))  # finished: skipped
    assert "nothing to do" in capsys.readouterr().out
    sst2.latency(rounds=1)
    sst2.table()
    rows = (sst2.RESULTS / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|")][2:] == ["dense", *sst2.METHODS]


def test_remembered_teacher_answers_like_the_model(workplace: Path, sentences: Path) -> None:
    dense = sst2.Run("dense", 0)
    sst2.single(dense, str(sentences))
    data = sst2.TextData(str(sentences), sst2.pretrained_folder(), batch_size=8)
    data.setup()
    teacher = sst2.RememberedTeacher(0, data)
    model = sst2.new_module(weights=dense.weights).model.eval()
    for batch in data.train_dataloader():
        with torch.no_grad():
            expected = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        answer = teacher(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-5, atol=1e-5)
        for own, other in zip(answer.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)  # kept in half precision
