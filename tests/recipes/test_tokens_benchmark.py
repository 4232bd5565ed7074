"""The benchmark of token pruning on a tiny encoder: costs, the teacher, a run of every method, table and picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `hf`")

from benchmarks import sst2, tokens
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.stack_costs import stack_costs
from recipes.text_classification import read_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning calls a deprecated torch function
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:Expected token pruning to meet macs"),  # one decision on a few short sentences
]


@pytest.fixture
def data(pretrained: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with sentences as `sst2` and their halves as pairs in `mrpc`; the runs write beside it."""
    monkeypatch.setattr(sst2, "pretrained_folder", lambda: str(pretrained))
    for name in ("RUNS", "RESULTS"):
        monkeypatch.setattr(tokens, name, tmp_path / name)
        monkeypatch.setattr(sst2, name, tmp_path / f"{name}-sst2")
    monkeypatch.setattr(tokens, "PICTURE", tmp_path / "pictures" / "tokens.png")
    monkeypatch.setattr(tokens, "DENSE", dict.fromkeys(tokens.DATASETS, (1, 1e-4)))
    shutil.copytree(sentences, tmp_path / "data" / "sst2")
    (tmp_path / "data" / "mrpc").mkdir()
    for split, (texts, labels) in read_folder(sentences).items():
        lines = [f"{label}\t{text}\t{text.split()[0]}\n" for text, label in zip(texts, labels, strict=True)]
        (tmp_path / "data" / "mrpc" / f"{split}.tsv").write_text("".join(lines))
    return str(tmp_path / "data")


def test_names_and_commands() -> None:
    run = tokens.Run("mrpc", "top_k", 1, 0.5)
    assert run.name == "mrpc-top_k-0.5-seed1"
    assert run.arguments == ["--dataset", "mrpc", "--method", "top_k", "--macs", "0.5", "--seed", "1"]
    assert tokens.Run("mrpc", "dense", 0).name == "mrpc-dense-seed0"
    assert len(set(tokens.all_runs())) == 48


def test_macs_are_those_of_the_shapes(data: str) -> None:
    model, width, inner = sst2.new_module().model, 16, 32

    def macs(n: int, behind: int) -> int:
        return n * (4 * width * width + 2 * n * width) + behind * 2 * width * inner

    assert tokens.macs_of(model, torch.tensor([3, 7])).tolist() == [2 * macs(3, 3), 2 * macs(7, 7)]
    entering = torch.tensor([[3, 7], [2, 5]])
    assert tokens.macs_of(model, entering).tolist() == [macs(3, 2) + macs(2, 2), macs(7, 5) + macs(5, 5)]


def test_the_library_counts_the_same_macs(data: str) -> None:
    model = sst2.new_module().model.eval()
    ids = torch.randint(0, model.encoder.config.vocab_size, (2, 8))
    call = {"input_ids": ids, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    proof = prove_tokens(model, (), call)
    costs = stack_costs(model, (), call, proof.stack)
    entering = torch.tensor([[3, 7], [2, 5]])
    assert torch.equal(costs.macs(entering.double()).sum(0), tokens.macs_of(model, entering))


def test_f1() -> None:
    scores = tokens.scores_of(torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1]]))
    assert scores == {"accuracy": 3 / 5, "f1": pytest.approx(2 / 3)}
    assert tokens.scores_of(torch.zeros(2, 3, dtype=torch.long)) == {"accuracy": 1.0, "f1": 0.0}


def test_every_method_runs_and_the_table_has_it(data: str, capsys: pytest.CaptureFixture) -> None:
    dense = tokens.Run("mrpc", "dense", 0)
    runs = [dense, *(tokens.Run("mrpc", method, 0, 0.7) for method in tokens.METHODS)]
    for run in runs:
        tokens.single(run, data)
        record = json.loads(run.result.read_text())
        assert record["command"].startswith("python benchmarks/tokens.py --dataset mrpc --method")
        # the ramps begin with 0, so that of two layers neither loses a token
        ramps = run.method in ("dense", "faithful", "linear")
        assert record["macs_kept"] == 1 if ramps else record["macs_kept"] < 0.9
        assert len(record["tokens_entering"]) == 2 and record["tokens_entering"][0] == 1
    tokens.single(dense, data)  # finished: skipped
    assert "nothing to do" in capsys.readouterr().out
    tokens.table()
    rows = (tokens.RESULTS / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|")] == [
        *("method", "---", "dense", *tokens.METHODS),
        *("method", "---"),
    ]


def test_the_picture_is_drawn(data: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `benchmarks`")
    tokens.single(tokens.Run("mrpc", "dense", 0), data)
    tokens.single(tokens.Run("mrpc", "top_k", 0, 0.7), data)
    tokens.picture()
    assert tokens.PICTURE.stat().st_size > 1000


def test_the_answers_of_the_teacher_are_those_of_the_model(data: str) -> None:
    run = tokens.Run("mrpc", "dense", 0)
    tokens.single(run, data)
    pairs = tokens.text_data("mrpc", data, 0)
    teacher = tokens.Teacher(run, pairs)
    model = sst2.new_module(weights=run.dense_weights).model.eval()
    for batch in pairs.train_dataloader():
        call = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad(), tokens.pooled_states(model) as pooled:
            logits = model(*call).logits
        torch.testing.assert_close(teacher(*call), (logits, pooled[0]), rtol=1e-4, atol=1e-5)
