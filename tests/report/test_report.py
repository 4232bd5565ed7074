"""Numbers that can be counted by hand, and a report that says them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_compress.report import (
    CompressionReport,
    Latency,
    StructureCount,
    count_parameters,
    file_size,
    measure_latency,
)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    return model


def test_shared_parameters_count_once() -> None:
    assert count_parameters(tied()) == 9 + 3 + 3 + 3


def test_the_file_size_is_that_of_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert file_size(model) == (tmp_path / "model.safetensors").stat().st_size
    assert file_size(model.half()) < file_size(model.float())
    assert file_size(tied()) < file_size(tied()[0]) + file_size(tied()[1]) + file_size(tied()[2])


class Sleeper(nn.Module):
    """Counts its calls, in a list that tells who was called when."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.calls.append(self.name)
        return self.dropout(x)


def test_runs_are_interleaved_and_leave_no_trace() -> None:
    calls: list[str] = []
    models = {name: Sleeper(name, calls) for name in "ab"}
    state = torch.get_rng_state()
    times = measure_latency(models, (torch.zeros(1),), repeats=4, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert times["a"].runs == times["b"].runs == 4
    assert 0 < times["a"].best <= times["a"].seconds
    assert all(m.training for m in models.values())
    assert torch.equal(state, torch.get_rng_state())


def test_time_is_limited() -> None:
    calls: list[str] = []
    times = measure_latency({"a": Sleeper("a", calls)}, (torch.zeros(1),), repeats=10**6, max_seconds=0.0)
    assert times["a"].runs == 1


def test_bad_measurements() -> None:
    with pytest.raises(ValueError, match="Expected at least one model to measure, but got none"):
        measure_latency({})
    with pytest.raises(ValueError, match="Expected repeats to be at least 1, but got 0"):
        measure_latency({"a": nn.Identity()}, (torch.zeros(1),), repeats=0)


def report(**changes: object) -> CompressionReport:
    values = {
        "params": (2_000_000, 500_000),
        "macs": (4e9, 1e9),
        "prunable_macs": (2e9, 0.5e9),
        "bytes": (8_000_000, 2_000_000),
        "structures": (StructureCount("layer.0.head", "head", 12, 3, "native"),),
        "error": 2e-9,
        "latency": {
            "batch of 2": (Latency(0.1, 0.1, 5), Latency(0.05, 0.05, 5)),
            "batch of 8": (Latency(0.4, 0.4, 5), Latency(0.1, 0.1, 5)),
        },
        "pinned": 2,
        "module": "model",
        "step": 600,
    }
    return CompressionReport(**{**values, **changes})  # type: ignore[arg-type]


def test_the_report_reads_as_a_table() -> None:
    lines = str(report()).splitlines()
    assert lines[0] == "Compression of 'model' after 600 optimizer steps: 25.0% of the prunable MACs are left"
    assert lines[2].split() == ["parameters", "2,000,000", "500,000", "4.00x"]
    assert any(
        line.split() == ["latency,", "batch", "of", "8", "400.00", "ms", "100.00", "ms", "4.00x"] for line in lines
    )
    assert any(line.split() == ["layer.0.head", "head", "3", "of", "12", "native"] for line in lines)
    assert "2.0e-09" in str(report())


def test_the_report_as_data() -> None:
    data = json.loads(report().to_json())
    assert CompressionReport.from_json(report().to_json()) == report()
    assert data["params"] == [2_000_000, 500_000]
    assert data["macs_kept"] == 0.25
    assert data["speedup"] == 4.0
    assert data["structures"][0]["kept"] == 3
    assert report().metrics()["compression/speedup"] == 4.0
    assert "compression/speedup" not in report(latency={}).metrics()
    assert report(latency={}).speedup is None
