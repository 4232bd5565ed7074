"""The benchmark of compression after training on a tiny encoder: every method, and the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra `hf`")

from benchmarks import post_training, sst2, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Expected to keep macs=.*"),  # few units
]


@pytest.fixture
def data(pretrained: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sst2, "pretrained_folder", lambda: str(pretrained))
    monkeypatch.setattr(sst2, "TOKENS", 16)
    monkeypatch.setattr(
        sst2, "example", lambda batch=2: ((ids := sst2.torch.randint(5, 15, (batch, 16))), sst2.torch.ones_like(ids))
    )
    for module in (tokens, post_training):
        for name in ("RUNS", "RESULTS"):
            monkeypatch.setattr(module, name, tmp_path / f"{module.__name__}-{name}")
    monkeypatch.setattr(tokens, "DENSE", dict.fromkeys(tokens.DATASETS, (1, 1e-4)))
    monkeypatch.setattr(post_training, "BATCH", 8)
    shutil.copytree(sentences, tmp_path / "data" / "sst2")
    return str(tmp_path / "data")


def test_names_and_commands() -> None:
    run = post_training.Run("mrpc", "obs", 0.86, 1)
    assert run.name == "mrpc-obs-0.86-seed1"
    assert run.arguments == ["--dataset", "mrpc", "--method", "obs", "--macs", "0.86", "--seed", "1"]
    assert len(set(post_training.all_runs())) == 96


def test_every_method_runs_and_the_table_has_it(data: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="needs dense weights"):
        post_training.single(post_training.Run("sst2", "fisher", 0.7, 0), data)
    tokens.single(tokens.Run("sst2", "dense", 0), data)
    runs = [post_training.Run("sst2", method, 0.7, 0) for method in post_training.METHODS]
    for run in runs:
        post_training.single(run, data)
        record = json.loads(run.result.read_text())
        assert record["command"].startswith("python benchmarks/post_training.py --dataset sst2 --method")
        assert 0.6 < record["macs_kept"] <= 0.7 and record["error"] < 1e-6
        repaired = "repair" not in post_training.METHODS[run.method]
        assert (record["judged"] is not None) == repaired == ("repair" in record["seconds_of_parts"])
    post_training.table()
    rows = [row.split("|")[1].strip() for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert [row for row in rows if row in post_training.METHODS] == list(post_training.METHODS)
