"""The benchmark of backends on a tiny encoder: a cell, the table, and that what is there is not measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers", reason="needs the extra `hf`")
pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
pytest.importorskip("onnxscript", reason="needs the extra `onnx`")

from transformers import BertConfig, BertModel

from benchmarks import backends


class Tiny(backends.Encoder):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        config = BertConfig(num_hidden_layers=2, hidden_size=48, num_attention_heads=4, intermediate_size=96)
        self.bert = BertModel(config, add_pooling_layer=False)


def test_a_cell_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "Encoder", Tiny)
    monkeypatch.setattr(backends.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(backends, "version", lambda name: "1.0")
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    arguments = [
        "--backends",
        "eager",
        "onnxruntime",
        "--batches",
        "1",
        "--lengths",
        "8",
        "--repeats",
        "3",
        "--threads",
        "1",
    ]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--results", str(results), "--markdown", str(page)])
    backends.main()
    known: dict[str, Any] = json.loads(results.read_text())
    (cell,) = known["cells"].values()
    assert set(cell["rows"]) == {
        f"{b}, float32, {m}" for b in ("eager", "onnxruntime") for m in ("dense", "half", "uniform")
    }
    assert cell["rows"][backends.BASE]["speedup"] == 1.0
    assert cell["command"] == " ".join(["python", "benchmarks/backends.py", *arguments])
    assert known["models"]["uniform"] == {**known["models"]["uniform"], "heads": [2, 2], "ffn": [48, 48]}
    assert all(e["largest_relative_error"] < 1e-4 for e in known["exported"].values())
    assert "| eager | float32 | dense | 1.00x (" in page.read_text()
    monkeypatch.setattr(backends, "run", None)  # nothing is missing: it would fail
    backends.main()
    assert "| onnxruntime | float32 | half |" in capsys.readouterr().out
