"""The benchmark of whole fits: turns of two processes, their own clocks, the recipe's commands, and the table."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra `hf`")

from benchmarks import fit_time

# A fit without a model: SLEEP seconds before training, then STEPS steps, of which number REMOVAL removes.
FAKE = """
import json, sys, time
path, steps, sleep, removal = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
def note(event):
    with open(path, "a") as file:
        file.write(f"{event} {time.monotonic()!r} {time.process_time()!r}\\n")
note("begin")
time.sleep(sleep)
note("train")
for step in range(steps):
    note("batch")
    end = time.process_time() + 0.01
    while time.process_time() < end:
        pass
    note("removal" if step == removal else "step")
note("end")
if removal >= 0:
    with open(path, "a") as file:
        structure = {"name": "ffn", "kept": 3}
        file.write(json.dumps({"macs_kept": 0.5, "params": [9, 5], "error": 0.0, "structures": [structure]}) + "\\n")
"""


def fake(folder: Path, steps: int, sleep: float = 0.0, removal: int = -1) -> fit_time.Fit:
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", FAKE, str(folder / "events"), str(steps), str(sleep), str(removal)]
    return fit_time.Fit(command, folder, os.environ)


def test_fits_take_turns_and_have_their_own_clocks(tmp_path: Path) -> None:
    fits = [fake(tmp_path / "dense", 20), fake(tmp_path / "compressed", 20, sleep=0.1, removal=5)]
    fit_time.take_turns(fits, seconds=0.05)
    dense, small = (fit_time.numbers(fit) for fit in fits)
    turns = sorted(turn for fit in fits for turn in fit.turns)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(turns)), "one at a time"
    assert len(fits[0].turns) > 2 and len(fits[1].turns) > 2
    for fit, found in zip(fits, (dense, small), strict=True):
        assert found["process_s"] == pytest.approx(sum(end - begin for begin, end in fit.turns))
        # the time in which it was stopped does not count
        assert found["fit_cpu_s"] <= found["fit_s"] <= found["process_s"]
        assert sum(found["steps"]) <= found["fit_s"]
    assert small["removals"] == [5] and len(small["steps"]) == 20
    record = fit_time.compared(dense, small)
    assert [part["steps"] for part in record["seconds_per_step"]] == ["0 to 4", "6 to 19"]
    assert record["ratio"]["fit"] == pytest.approx(small["fit_s"] / dense["fit_s"], abs=1e-4)
    assert set(record["steps_with_a_removal"]) == {"5"}
    assert (record["macs_kept"], record["params"], record["kept"]) == (0.5, [9, 5], {"ffn": 3})


def test_the_fit_that_is_behind_has_its_turn(tmp_path: Path) -> None:
    fits = [fake(tmp_path / "slow", 1), fake(tmp_path / "fast", 1)]
    order: list[str] = []
    counts = {"slow": iter((0, 0, 1, 2, 3)), "fast": iter((0, 5, 5, 5, 5))}

    class Turns(fit_time.Fit):
        @property
        def steps(self) -> int:
            return next(counts[self.folder.name])

        def run(self, seconds: float) -> bool:
            order.append(self.folder.name)
            self.turns.append((len(order), len(order) + seconds))
            return len(self.turns) == (1 if self.folder.name == "fast" else 3)

    fit_time.take_turns([Turns(fit.command, fit.folder, {}) for fit in reversed(fits)], 1.0)
    assert order == ["fast", "slow", "slow", "slow"]


def test_the_clock_leaves_out_what_lies_between_turns(tmp_path: Path) -> None:
    fit = fake(tmp_path / "fit", 1)
    fit.turns = [(10.0, 15.0), (20.0, 22.0)]
    assert [fit.clock(moment) for moment in (9.0, 12.0, 17.0, 21.0, float("inf"))] == [0.0, 2.0, 5.0, 6.0, 7.0]


def test_a_fit_that_fails_ends_both_and_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    fits = [
        fake(tmp_path / "dense", 1, sleep=60.0),
        fit_time.Fit([sys.executable, "-c", "raise SystemExit('no data')"], broken, os.environ),
    ]
    with pytest.raises(RuntimeError, match=r"(?s)Expected the fit to end with code 0, but got 1.*no data"):
        fit_time.take_turns(fits, seconds=0.2)
    assert all(fit.process is not None and fit.process.poll() is not None for fit in fits)


def test_fits_of_different_lengths_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="Expected fits of the same number of steps, but got 2 and 1"):
        fit_time.compared({"steps": [0.1, 0.1]}, {"steps": [0.1]})


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*", "ignore:Expected to keep.*")
def test_the_compressed_fit_is_the_recipe_with_a_clock(
    pretrained: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sst2").symlink_to(sentences)
    options = argparse.Namespace(pretrained=pretrained, data=tmp_path, epochs=1, limit_train_batches=1.0, threads=1)
    monkeypatch.chdir(fit_time.ROOT)
    arguments = [*fit_time.fit_command(options, 0, "compressed", tmp_path)[1:], "--data.batch_size=8"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(arguments[0], run_name="__main__")
    fit = fit_time.Fit([], tmp_path, {})
    fit.turns = [(0.0, float("inf"))]
    found = fit_time.numbers(fit)
    assert len(found["steps"]) == 12
    assert found["removals"] == [1, 3, 4]  # positions 0.133, 0.267 and 0.4 of the fit
    assert found["report"]["macs_kept"] <= 0.485
    assert len(list(tmp_path.glob("fit/version_0/checkpoints/*.ckpt"))) == 1


def test_a_pair_is_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[int] = []

    def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        measured.append(seed)
        accuracy = {"dev": 0.9, "test": 0.9, "pooled": 0.9}
        return {
            "seed": seed,
            "ratio": {"fit": 0.7, "process": 0.8, "fit_cpu": 0.75},
            "macs_kept": 0.48,
            "dense": {"fit_s": 100.0 + 100 * seed, "accuracy": accuracy},
            "compressed": {"fit_s": 70.0, "accuracy": accuracy},
        }

    results = tmp_path / "results.json"
    monkeypatch.setattr(fit_time, "measure", measure)
    monkeypatch.setattr(fit_time, "version", lambda name: "1.0")
    for seeds in (["0"], ["0", "1"]):
        arguments = ["x", "--pretrained", "folder", "--results", str(results), "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", arguments)
        fit_time.main()
    assert measured == [0, 1]
    assert list(json.loads(results.read_text())["pairs"]) == ["seed 0", "seed 1"]
    printed = capsys.readouterr().out
    assert "| 0 | 100 | 70 | 0.700 | 0.800 | 0.750 | 90.00 | 90.00 | 0.480 |" in printed
    assert "| mean | 150 | 70 |" in printed


def test_the_command_leaves_out_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--data", "/a", "--seeds", "0", "--results", "/b"])
    assert fit_time.command_line() == "python benchmarks/fit_time.py --seeds 0"
