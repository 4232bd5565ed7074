"""The recipe of compression after training, on small models: digits, and sentences from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs the extra `recipes`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from recipes import post_training

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*shuffle.*"),  # of the loader that calibrates
]


def test_digits(tmp_path: Path) -> None:
    arguments = ["--epochs", "1", "--width", "32", "--macs", "0.6", "--batches", "3", "--tune", "1"]
    rows = post_training.main(post_training.parser().parse_args([*arguments, "--results", str(tmp_path / "r.json")]))
    assert rows == json.loads((tmp_path / "r.json").read_text())
    small = rows["0.6"]
    assert small["compression/macs_kept"] <= 0.6 and small["compression/error"] < 1e-9
    assert small["accuracy"] > rows["dense"]["accuracy"] - 40  # an epoch of a narrow model is no model yet
    assert small["tuned"] > 10


def test_sentences(pretrained: Path, sentences: Path) -> None:
    arguments = ["--dataset", str(sentences), "--pretrained", str(pretrained), "--epochs", "1", "--macs", "0.5"]
    rows = post_training.main(post_training.parser().parse_args([*arguments, "--importance", "obs"]))
    assert rows["0.5"]["compression/macs_kept"] <= 0.5
