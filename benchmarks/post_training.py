"""Compression after training of MiniLM-L6 on SST-2 and MRPC: accuracy at several sizes without a gradient step.

    python benchmarks/post_training.py --method repaired --dataset mrpc --macs 0.7 --seed 0    # one run
    python benchmarks/post_training.py --all --jobs 2                  # every run that has no result yet
    python benchmarks/post_training.py --latency                       # of the sizes; wants an idle machine
    python benchmarks/post_training.py --table                         # benchmarks/results/post_training/table.md

The dense models are those of `python benchmarks/tokens.py --method dense`, and so are the data. Calibration takes 32
batches of 32 training examples; nothing is trained. MACs are the fraction that is left of those in heads and
feed-forward units, on sentences of 128 tokens.

    outputs          how far units, alone and together, move the outputs; rearranged
    repaired         the same, and repaired by least squares: the default of the library
    fisher           diagonal Fisher information of examples
    fisher-repaired  full Fisher information: what units cost together, rearranged, and repaired by least squares
    taylor           first-order Taylor scores of batches
    magnitude        squared norms
    svd              Fisher information times the relative residual of half of the singular directions
    obs              second order, in units of the loss, repaired by least squares
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import side_by_side, sst2, tokens  # noqa: E402
from lightning_compress import compress_after_training, measure_latency  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "post_training"
RUNS = ROOT / "benchmarks" / "runs" / "post_training"  # logs: ignored by git
SIZES = (0.7, 0.5, 0.86)  # in the order in which they are run
BATCH, BATCHES, REPAIR = 32, 32, 32
GOALS = {0.7: 1.0, 0.5: 3.0}  # points of accuracy that may be lost
METHODS: dict[str, dict[str, Any]] = {
    "outputs": {"importance": "outputs", "repair": None},
    "repaired": {"importance": "outputs"},
    "fisher-repaired": {"importance": "fisher"},
    "fisher": {"importance": "fisher", "rearrange": False, "repair": None},
    "obs": {"importance": "obs_loss"},
    "magnitude": {"importance": "norm", "repair": None},
    "taylor": {"importance": "taylor", "repair": None},
    "svd": {"importance": "low_rank_fisher", "repair": None},
}


@dataclass(frozen=True)
class Run:
    dataset: str
    method: str
    macs: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.method}-{self.macs:g}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        chosen = ["--dataset", self.dataset, "--method", self.method]
        return [*chosen, "--macs", f"{self.macs:g}", "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def dense(self) -> tokens.Run:
        return tokens.Run(self.dataset, "dense", self.seed)


def all_runs() -> list[Run]:
    """Whoever breaks off half-way has the methods that matter most, of both data sets."""
    return [Run(d, m, size, s) for size in SIZES for m in METHODS for s in tokens.SEEDS for d in tokens.DATASETS]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], batch["attention_mask"]).logits


def compress(run: Run, folder: str) -> dict[str, Any]:
    """Compress the dense model of a run, and look at what is left."""
    L.seed_everything(run.seed, verbose=False)
    if not run.dense.dense_weights.is_file():
        raise SystemExit(f"{run.name} needs dense weights: python benchmarks/tokens.py --method dense first.")
    data = tokens.text_data(run.dataset, folder, run.seed, BATCH)
    model = sst2.new_module(weights=run.dense.dense_weights).model.eval()
    wall, own = time.perf_counter(), time.process_time()
    result = compress_after_training(
        model,
        data.train_dataloader(),
        macs=run.macs,
        batches=BATCHES,
        repair_batches=REPAIR,
        call=logits,
        example=(sst2.example(), {}),
        **METHODS[run.method],
    )
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - own}
    return {
        **accuracy(model, data),
        "macs_kept": result.report.macs_kept,
        "params": result.report.params[1],
        "kept": result.plan.counts,
        "error": result.report.error,
        "repairs": {r.parameter: [r.before, r.after] for r in result.repairs},
        "notes": result.notes,
        "judged": result.judged,
        "seconds": seconds,
        "seconds_of_parts": dict(result.seconds),
    }


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> dict[str, Any]:
    """Accuracy and F1 on dev, test and both."""
    found, every = {}, []
    for name, split in (("dev", "validation"), ("test", "test")):
        batches = data.loader(split, tokens.by_length(data, split))
        pairs = torch.cat([torch.stack([logits(model, b).argmax(-1), b["labels"]]) for b in batches], 1)
        every.append(pairs)
        found[name] = tokens.scores_of(pairs)
    return {"accuracy": found | {"pooled": tokens.scores_of(torch.cat(every, 1))}}


def single(run: Run, folder: str) -> None:
    settings = {"dataset": run.dataset, "method": run.method, "macs": run.macs, "seed": run.seed}
    settings |= {"batches": BATCHES, "batch": BATCH, "repair_batches": REPAIR, "precision": "float32"}
    RUNS.mkdir(parents=True, exist_ok=True)
    side_by_side.finish("post_training.py", run, settings, lambda: compress(run, folder))


# Numbers


def records() -> dict[Run, dict[str, Any]]:
    """The results that are there."""
    return {run: json.loads(run.result.read_text()) for run in all_runs() if run.result.is_file()}


def table() -> None:
    """A row for each method and size, seeds side by side; what was not run is left out."""
    found, dense = records(), tokens.records()
    lines: list[str] = []
    for dataset, title in tokens.DATASETS.items():
        lines += [
            f"## {title}\n",
            "| method | target | MACs kept | dev + test, per seed | mean | to dense | goal | processor s (repair) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for size in sorted(SIZES, reverse=True):
            for method in METHODS:
                runs = [run for seed in tokens.SEEDS if (run := Run(dataset, method, size, seed)) in found]
                if not runs:
                    continue
                own = [found[run] for run in runs]
                values = tokens.percents(own, "pooled")
                loss = mean(values) - mean(tokens.percents([dense[run.dense] for run in runs], "pooled"))
                goal = f"{-GOALS[size]:+.1f}" if size in GOALS else ""
                seconds = mean(r["seconds"]["processor"] for r in own)
                cells = [
                    method,
                    f"{size:g}",
                    f"{mean(r['macs_kept'] for r in own):.3f}",
                    " / ".join(f"{value:.2f}" for value in values),
                    f"{mean(values):.2f}",
                    f"{loss:+.2f}",
                    goal,
                    f"{seconds:.0f} ({mean(r['seconds_of_parts'].get('repair', 0.0) for r in own):.0f})",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    path = RESULTS / "latency.json"
    if path.is_file():
        cells = json.loads(path.read_text())["cells"]
        lines += ["## Latency\n", "| call | " + " | ".join(next(iter(cells.values()))) + " |"]
        lines.append("|---|" + "---|" * len(next(iter(cells.values()))))
        for call, models in cells.items():
            texts = (f"{m['ms']:.1f} ms, {m['speedup']:.2f}x" for m in models.values())
            lines.append(f"| {call} | {' | '.join(texts)} |")
        lines.append("")
    text = "\n".join(lines)
    (RESULTS / "table.md").write_text(f"`python benchmarks/post_training.py --table`\n\n{text}")
    print(text)


def latency(threads: int, folder: str, repeats: int = 31, seconds: float = 30.0) -> None:
    """Time of the models of one seed, dense and after a removal by `outputs`, interleaved."""
    torch.set_num_threads(threads)
    data = tokens.text_data("mrpc", folder, 0, BATCH)

    def dense() -> nn.Module:
        return sst2.new_module(weights=tokens.Run("mrpc", "dense", 0).dense_weights).model.eval()

    models = {"dense": dense()}
    for size in sorted(SIZES, reverse=True):
        models[f"{size:g}"] = dense()
        options = {**METHODS["outputs"], "batches": 4, "call": logits, "example": (sst2.example(), {})}
        compress_after_training(models[f"{size:g}"], data.train_dataloader(), macs=size, **options)
    cells = {}
    for batch in (1, 32):
        times = measure_latency(models, sst2.example(batch), repeats=repeats, max_seconds=seconds)
        cells[f"{batch} x {sst2.TOKENS}"] = {
            name: {"ms": 1e3 * t.seconds, "speedup": times["dense"].seconds / t.seconds, "spread": t.spread}
            for name, t in times.items()
        }
    record = {
        "command": f"python benchmarks/post_training.py --latency --threads {threads}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": side_by_side.machine(),
        "threads": threads,
        "cells": cells,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "latency.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser, _ = side_by_side.parser(__doc__, "--method", tuple(METHODS))
    parser.add_argument("--dataset", choices=tuple(tokens.DATASETS), default="sst2")
    parser.add_argument("--macs", type=float, choices=SIZES, default=SIZES[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.all:
        side_by_side.run_all(__file__, (all_runs(),), arguments.jobs, arguments.data, RUNS)
    elif arguments.latency:
        latency(arguments.threads, arguments.data)
    elif arguments.table:
        table()
    else:
        single(Run(arguments.dataset, arguments.method, arguments.macs, arguments.seed), arguments.data)


if __name__ == "__main__":
    main()
