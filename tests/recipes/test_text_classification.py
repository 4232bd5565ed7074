"""The text recipe: reading, length buckets, schedule, resume, and the command line, on a tiny random encoder."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning calls a deprecated torch function
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]

ROOT = Path(__file__).resolve().parents[2]

from recipes.text_classification import LengthBuckets, TextClassification, TextData, read_folder  # noqa: E402 (after the skip)


def make(pretrained: Path, sentences: Path, **options: float) -> tuple[TextClassification, TextData]:
    L.seed_everything(0, verbose=False)
    return TextClassification(str(pretrained), **options), TextData(str(sentences), str(pretrained), batch_size=8)


def quiet_trainer(folder: Path, **options: object) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


# Data


def test_read_folder_reads_plain_and_compressed_files(sentences: Path) -> None:
    splits = read_folder(sentences)
    assert {split: len(labels) for split, (_, labels) in splits.items()} == {"train": 96, "validation": 24, "test": 20}
    for texts, labels in splits.values():
        assert [("good" in text.split()) for text in texts] == [bool(label) for label in labels]


def test_read_folder_keeps_quotes(tmp_path: Path) -> None:
    for name in ("train.tsv", "validation.tsv", "test.tsv"):
        (tmp_path / name).write_text('"good" film\t1\n"bad\t0\n')
    assert read_folder(tmp_path)["train"] == (['"good" film', '"bad'], [1, 0])


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("good\t1\n")
    with pytest.raises(
        ValueError, match=r"Expected one of \['dev.tsv', 'dev.tsv.gz', 'validation.tsv'.*but found none"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize("line", ["good", "good\tyes", "good\t1\t2"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.tsv").write_text(f"fine\t1\n{line}\n")
    with pytest.raises(ValueError, match=r"train.tsv, line 2: expected `text TAB label`"):
        read_folder(tmp_path)


def test_batches_are_padded_and_masked(pretrained: Path, sentences: Path) -> None:
    _, data = make(pretrained, sentences)
    data.setup()
    for loader, count in ((data.train_dataloader(), 96), (data.val_dataloader(), 24), (data.test_dataloader(), 20)):
        batches = list(loader)
        assert sum(len(batch["labels"]) for batch in batches) == count
        for batch in batches:
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            assert (batch["input_ids"].eq(data.tokenizer.pad_token_id) == batch["attention_mask"].eq(0)).all()
            assert batch["attention_mask"].all(0).any() and batch["attention_mask"].any(0).all()  # no column of padding


def test_pairs_have_the_label_first(pretrained: Path, tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        (tmp_path / name).write_text('1\t"good film\tfine plot\n0\tthe\t1\n')
    assert read_folder(tmp_path)["train"] == ([('"good film', "fine plot"), ("the", "1")], [1, 0])
    _, data = make(pretrained, tmp_path)
    data.setup()
    texts = [data.tokenizer.decode(ids).split() for ids, _ in data.splits["validation"]]
    assert texts == ["[CLS] [UNK] good film [SEP] fine plot [SEP]".split(), "[CLS] the [SEP] [UNK] [SEP]".split()]


@pytest.mark.parametrize("line", ["good\t1", "good\tfilm\t1", "1\tgood", "1\tgood\tfilm\tplot"])
def test_a_bad_pair_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.tsv").write_text(f"1\tfine\tfilm\n{line}\n")
    with pytest.raises(ValueError, match=r"train.tsv, line 2: expected `label TAB text TAB text` .* form of the first"):
        read_folder(tmp_path)


def test_splits_of_two_forms_are_told(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("1\tfine\tfilm\n")
    (tmp_path / "dev.tsv").write_text("fine film\t1\n")
    with pytest.raises(ValueError, match=r"dev.tsv, line 1: expected `label TAB text TAB text`"):
        read_folder(tmp_path)


# Length buckets


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 203])
def test_buckets_are_a_permutation(count: int) -> None:
    lengths = [random.Random(number).randint(1, 60) for number in range(count)]
    assert sorted(LengthBuckets(lengths, batch_size=8, window=4)) == list(range(count))


def test_buckets_pad_less_than_random_batches_and_change_with_the_epoch() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 60) for _ in range(1003)]

    def padded(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) for batch in batches)

    sampler = LengthBuckets(lengths, batch_size=8, seed=3)
    first = list(sampler)
    assert padded(first) < 1.05 * sum(lengths) < padded(draw.sample(range(1003), 1003))
    assert list(sampler) == first  # the same epoch again, as after a resume
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert {frozenset(first[at : at + 8]) for at in range(0, 1000, 8)} != {
        frozenset(second[at : at + 8]) for at in range(0, 1000, 8)
    }


# Module


def test_padding_changes_nothing(pretrained: Path, sentences: Path) -> None:
    module, _ = make(pretrained, sentences)
    module.double().eval()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = padded.ne(0).long()
    with torch.no_grad():
        short = module.model(ids, torch.ones_like(ids), output_hidden_states=True)
        long = module.model(padded, mask, output_hidden_states=True)
    torch.testing.assert_close(short.logits, long.logits, rtol=0, atol=1e-12)
    assert len(long.hidden_states) == 3
    for a, b in zip(short.hidden_states, long.hidden_states, strict=True):
        torch.testing.assert_close(a, b[:, :5], rtol=0, atol=1e-12)
        assert not b[:, 5:].any()


def test_dropout_is_on_while_training(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    """`from_pretrained` returns a model in eval mode, which the Trainer would keep."""
    module, data = make(pretrained, sentences)
    modes: list[bool] = []
    module.model.encoder.register_forward_hook(lambda encoder, *_: modes.append(encoder.training))
    quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, enable_checkpointing=False).fit(module, data)
    assert modes == [True, True]


def test_learning_rate_rises_and_falls(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    module, data = make(pretrained, sentences, lr=0.3, warmup=0.25)
    rates: list[float] = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, enable_checkpointing=False, callbacks=[Record()]).fit(
        module, data
    )
    # 96 sentences in batches of 8 are 12 steps, 3 of them warm-up; then 9/9, 8/9, ..., 1/9 of the rate.
    expected = [0.1, 0.2, 0.3, *(0.3 * left / 9 for left in range(9, 0, -1))]
    assert rates == pytest.approx(expected)


def test_resumed_run_equals_straight_run(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    class PowerCut(Exception):
        pass

    class Crash(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise PowerCut

    def train(name: str, *callbacks: L.Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        module, data = make(pretrained, sentences, lr=1e-2)
        module.model.dropout.p = 0.0  # a resume does not restore the random state
        checkpoint = ModelCheckpoint(dirpath=tmp_path / name, save_last=True)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[checkpoint, *callbacks])
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
        return module.state_dict()

    straight = train("straight")
    with pytest.raises(PowerCut):
        train("crashed", Crash())
    resumed = train("crashed", ckpt_path=str(tmp_path / "crashed" / "last.ckpt"))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


@pytest.mark.data
def test_real_sentences_fit_the_reader() -> None:
    splits = read_folder(Path(os.environ["LIGHTNING_COMPRESS_DATA"]) / "sst2")
    assert {split: len(labels) for split, (_, labels) in splits.items()} == {
        "train": 6920,
        "validation": 872,
        "test": 1821,
    }
    assert all(set(labels) == {0, 1} for _, labels in splits.values())


@pytest.mark.data
def test_real_pairs_fit_the_reader() -> None:
    splits = read_folder(Path(os.environ["LIGHTNING_COMPRESS_DATA"]) / "mrpc")
    assert [len(splits[split][1]) for split in ("train", "validation", "test")] == [3668, 408, 1725]
    assert all(set(labels) == {0, 1} and len(texts[0]) == 2 for texts, labels in splits.values())


# From the command line


def run_recipe(pretrained: Path, sentences: Path, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Fit with the committed configuration plus `arguments`; the rows of the metrics that were logged."""
    command = [
        sys.executable,
        str(ROOT / "recipes" / "text_classification.py"),
        "fit",
        f"--config={ROOT / 'recipes' / 'text_classification.yaml'}",
        f"--model.pretrained={pretrained}",
        f"--data.dataset={sentences}",
        "--model.lr=5e-3",
        "--data.batch_size=8",
        "--trainer.max_epochs=8",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def last(rows: list[dict[str, str]], column: str) -> float:
    return [float(row[column]) for row in rows if row.get(column)][-1]


def test_command_line_learns(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    rows = run_recipe(pretrained, sentences, tmp_path)
    assert last(rows, "val_accuracy") >= 0.9


def run_command_of(page: str, pretrained: Path, sentences: Path, folder: Path, *arguments: str) -> list[str]:
    """Run the first command of `page` with the recipe, word for word but for the two paths; its words."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.strip().startswith("python recipes/text_classification.py"))
    words = line.replace("path/to/model", str(pretrained)).replace("path/to/sst2", str(sentences)).split()
    command = [sys.executable, *words[1:], "--trainer.accelerator=cpu", "--data.batch_size=8", *arguments]
    command += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.precision=32-true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Expected" not in done.stderr, done.stderr[-2000:]  # neither is a budget missed
    return words


def test_the_command_of_the_readme_runs(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    words = run_command_of("README.md", pretrained, sentences, tmp_path, "--trainer.max_epochs=2")
    assert {"callbacks/hoyer_square.yaml", "callbacks/finalize.yaml"} <= set(words)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        assert 0.3 < last(list(csv.DictReader(file)), "compression/macs_kept") <= 0.4


def test_the_command_of_token_pruning_runs(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    """In four layers: of two, the first always sees all tokens, so that half of the MACs is out of reach."""
    config = transformers.AutoConfig.from_pretrained(pretrained, num_hidden_layers=4)
    deep = tmp_path / "deep"
    transformers.BertModel(config).save_pretrained(deep)
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(deep)
    arguments = "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--model.lr=1e-3"
    words = run_command_of("docs/methods/token_pruning.md", deep, sentences, tmp_path, *arguments)
    assert [word for word in words if word.startswith("callbacks/")] == ["callbacks/token_pruning.yaml"]
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    macs = [float(row["token_pruning/macs"]) for row in rows if row["token_pruning/macs"]]
    assert macs[0] > 0.8 and sum(macs[-8:]) / 8 == pytest.approx(0.5, abs=0.05)  # of 36 steps, 12 are hard
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("TokenPruning"))
    assert state["stage"] == "hard" and state["checks"] == 2
    entering, real = (
        state["distribution"]["entering"],
        state["distribution"]["real"],
    )  # (layers, sentences), (sentences,)
    shares = (entering.sum(1) / real.sum()).tolist()
    assert len(shares) == 4 and shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 0.5


def test_presets_compress(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    presets = [f"--config={ROOT / 'callbacks' / name}.yaml" for name in ("group_lasso", "finalize", "distillation")]
    rows = run_recipe(pretrained, sentences, tmp_path, *presets)
    assert 0.3 < last(rows, "compression/macs_kept") <= 0.4
    assert last(rows, "compression/error") <= 1e-6
    weights = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)["state_dict"]
    units = [tensor.shape[0] for name, tensor in weights.items() if name.endswith("intermediate.dense.weight")]
    assert len(units) == 2 and min(units) < 32


def test_the_command_of_quantization_runs(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    words = run_command_of("docs/methods/quantization.md", pretrained, sentences, tmp_path, "--trainer.max_epochs=1")
    assert [word for word in words if word.startswith("callbacks/")] == ["callbacks/quantization_aware_training.yaml"]
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)
    (state,) = (s for key, s in checkpoint["callbacks"].items() if key.startswith("QuantizationAwareTraining"))
    kinds = {name: kept["quantizer"]["kind"] for name, kept in state["quantizers"].items()}
    assert kinds["model.encoder.encoder.layer.0.attention.self.query.weight"] == "uniform"
    assert "model.encoder.embeddings.word_embeddings.weight" not in kinds  # tables are asked for by name


def test_the_command_of_all_of_it_runs(pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    rows = run_recipe(pretrained, sentences, tmp_path, f"--config={ROOT / 'callbacks' / 'compress.yaml'}")
    assert last(rows, "compression/macs_kept") <= 0.5
    assert last(rows, "token_pruning/macs_kept") == pytest.approx(0.5, abs=0.05)
    assert last(rows, "token_pruning/macs_kept_overall") <= 0.5 * 0.55
