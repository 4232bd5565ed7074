"""Precision of every weight without training: all int8, searched, and what runtimes' own tools make of the same model.

    python benchmarks/precision.py --dataset sst2 --seed 0       # one run; skipped if its result is there
    python benchmarks/precision.py --all --jobs 2                # everything that is missing
    python benchmarks/precision.py --latency                     # wants an idle machine
    python benchmarks/precision.py --table                       # results/precision/table.md

The dense models are those of `python benchmarks/tokens.py --method dense`. Searches compute the divergence from the
answers of the dense model on 256 dev examples: a cross entropy with labels falls when a model that is too sure of
itself is disturbed, and would allow anything. Accuracy is that of the test examples, which no search has seen. Runtimes
calibrate with training examples.

    dense         float32
    int8          every weight, tables of embeddings too, and the inputs of products, in eight bits
    by time       float32 or eight bits for each weight of a product, by measured milliseconds
    by bytes      float32, 8 or 4 bits for each weight and table, by bytes as stored
    onnxruntime   its dynamic quantization of the exported model
    nncf          OpenVINO's post-training quantization (NNCF) of the exported model
    small, ...    the same after heads and feed-forward units were removed until 0.7 of the MACs were left
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of PyTorch that wait busily take the cores of runtimes
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import post_training, quantization, side_by_side, sst2, tokens  # noqa: E402
from lightning_compress import (  # noqa: E402
    compress_after_training,
    convert,
    export_model,
    load_compressed,
    logits_kl,
    measure_latency,
    save_compressed,
    search_precision,
)
from lightning_compress.quantization.precision import PrecisionSearch  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "precision"
RUNS = ROOT / "benchmarks" / "runs" / "precision"  # searched models, logs: ignored by git
SMALL = 0.7  # of the MACs
EXAMPLES, CALIBRATION = 256, 300  # of a search; of a runtime's tool
PARTS = {"": "whole", "small, ": "small"}  # prefixes of names, and folders
SEARCHES: dict[str, dict[str, Any]] = {
    "by time": {"precisions": ("int8",), "objective": "milliseconds", "tolerance": 0.002},  # eight bits cost 0.004
    "by bytes": {
        "precisions": ("int8", "int4"),
        "objective": "bytes",
        "modules": quantization.WITH_TABLES,
        "tolerance": 0.01,
    },
}

Found = dict[str, tuple[nn.Module, int]]  # models by name, with the bytes of their weights


@dataclass(frozen=True)
class Run:
    dataset: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        return ["--dataset", self.dataset, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def dense(self) -> tokens.Run:
        return tokens.Run(self.dataset, "dense", self.seed)


def all_runs() -> list[Run]:
    return [Run(dataset, seed) for seed in tokens.SEEDS for dataset in tokens.DATASETS]


# What is compared


def small_model(run: Run, data: Any) -> nn.Module:
    """The dense model after a compression without training."""
    model: nn.Module = sst2.new_module(weights=run.dense.dense_weights).model.eval()
    settings = {"batches": post_training.BATCHES, "repair_batches": post_training.REPAIR}
    example = (sst2.example(), {})
    compress_after_training(
        model, data.train_dataloader(), macs=SMALL, call=post_training.logits, example=example, **settings
    )
    return model


def searched(model: nn.Module, data: Any) -> dict[str, PrecisionSearch]:
    """The searches, by the divergence of answers to dev examples from those that the model gives now."""
    order = torch.randperm(len(data.splits["validation"]), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
    order = sorted(order.tolist(), key=lambda number: len(data.splits["validation"][number][0]))
    batches = list(data.loader("validation", order))

    def answers(candidate: nn.Module) -> Tensor:
        return torch.cat([post_training.logits(candidate, batch) for batch in batches])

    with torch.no_grad():
        expected = answers(model)

    def divergence(candidate: nn.Module) -> float:
        return float(logits_kl(answers(candidate), expected, temperature=1.0))

    example = (sst2.example(32), {})
    return {name: search_precision(model, divergence, example, **settings) for name, settings in SEARCHES.items()}


def kept(model: nn.Module, place: Path) -> tuple[nn.Module, int]:
    """A model after it was saved in ``place`` and loaded again, and the bytes of its weights."""
    save_compressed(model, place, factory=fresh)
    return loaded(place), (place / "model.safetensors").stat().st_size


def loaded(place: Path) -> nn.Module:
    """What lies in a place: a saved model, or a file of a runtime."""
    if place.suffix:
        return quantization.Session(place)
    return load_compressed(place, factory=fresh).eval()


def integers(model: nn.Module, prepare: Callable[[nn.Module], None], place: Path) -> tuple[nn.Module, int]:
    """A quantized copy, saved and loaded again."""
    small = copy.deepcopy(model)
    prepare(small)
    convert(small, "auto", (sst2.example(32), {}), seconds=0.2)
    return kept(small, place)


def fresh() -> nn.Module:
    model: nn.Module = sst2.new_module().model
    return model


def in_runtimes(model: nn.Module, examples: Any, folder: Path) -> Found:
    """What ONNX Runtime's dynamic and OpenVINO's static quantization make of a model, and bytes."""
    import nncf
    import openvino
    from onnx import load
    from onnxruntime.quantization import quantize_dynamic

    example: Any = (sst2.example(), {})
    names = ("input_ids", "attention_mask")
    with tempfile.TemporaryDirectory() as dense:
        onnx, xml = Path(dense) / "dense.onnx", Path(dense) / "dense.xml"
        export_model(model, onnx, "onnx", example)
        proto = load(onnx)
        del proto.graph.value_info[:]  # the quantizer turns weights round, and then contradicts these shapes
        quantize_dynamic(proto, folder / "onnxruntime.onnx", per_channel=True)
        export_model(model, xml, "openvino", example)
        calibration = nncf.Dataset(examples, lambda batch: {name: batch[name].numpy() for name in names})
        whole = openvino.Core().read_model(xml)
        small = nncf.quantize(whole, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
        openvino.save_model(small, folder / "nncf.xml")
    sizes = {"onnxruntime": folder / "onnxruntime.onnx", "nncf": folder / "nncf.bin"}
    files = {"onnxruntime": folder / "onnxruntime.onnx", "nncf": folder / "nncf.xml"}
    return {name: (loaded(files[name]), sizes[name].stat().st_size) for name in files}


def candidates(run: Run, data: Any, texts: str) -> tuple[Found, dict[str, Any]]:
    """Everything that is compared, with bytes, and what the searches found; models stay in the folder of the run."""
    alone = tokens.text_data(run.dataset, texts, run.seed, batch=1)
    calibration = list(alone.loader("train", range(CALIBRATION)))
    found: Found = {}
    notes: dict[str, Any] = {}
    shutil.rmtree(run.folder, ignore_errors=True)
    whole: nn.Module = sst2.new_module(weights=run.dense.dense_weights).model.eval()
    for prefix, part in PARTS.items():
        model = whole if part == "whole" else small_model(run, data)
        place = run.folder / part
        place.mkdir(parents=True)
        found[f"{prefix}dense"] = kept(model, place / "dense")
        prepare = {"int8": lambda copied: quantization.prepare(copied, "int8", "int8", quantization.WITH_TABLES)}
        began = time.perf_counter()
        for name, search in searched(model, data).items():
            prepare[name] = lambda copied, search=search: search.apply(copied, (sst2.example(32), {}))
            notes[f"{prefix}{name}"] = {
                "chosen": dict(search.chosen),
                "losses": dict(search.losses),
                "costs": dict(search.costs),
                "evaluations": search.evaluations,
            }
        notes[f"{prefix}searches"] = {"seconds": time.perf_counter() - began}
        for name, how in prepare.items():
            found[f"{prefix}{name}"] = integers(model, how, place / name)
        for name, result in in_runtimes(model, calibration, place).items():
            found[f"{prefix}{name}"] = result
    return found, notes


def compare(run: Run, folder: str) -> dict[str, Any]:
    L.seed_everything(run.seed, verbose=False)
    if not run.dense.dense_weights.is_file():
        raise SystemExit(f"{run.name} needs dense weights: python benchmarks/tokens.py --method dense first.")
    data = tokens.text_data(run.dataset, folder, run.seed, post_training.BATCH)
    found, notes = candidates(run, data, folder)
    rows = {
        name: {**quantization.accuracy(model, data, ("test",)), "bytes": size} for name, (model, size) in found.items()
    }
    return {"rows": rows, "searches": notes, "accuracy": {n: r["test"]["accuracy"] for n, r in rows.items()}}


# Latency


def latency(threads: int, repeats: int = 31, seconds: float = 60.0) -> None:
    """Everything of one finished run in turn, in one process."""
    torch.set_num_threads(threads)
    run = next((run for run in all_runs() if run.folder.is_dir() and run.result.is_file()), None)
    if run is None:
        raise SystemExit("A finished run is needed: python benchmarks/precision.py --dataset sst2 --seed 0 first.")
    files = {"onnxruntime": "onnxruntime.onnx", "nncf": "nncf.xml"}
    names = ("dense", "int8", *SEARCHES, *files)
    models = {
        f"{prefix}{name}": loaded(run.folder / part / files.get(name, name))
        for prefix, part in PARTS.items()
        for name in names
    }
    cells: dict[str, Any] = {}
    for batch, length in quantization.SHAPES:
        ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        load = os.getloadavg()[0]
        times = measure_latency(models, (), call, repeats=repeats, max_seconds=seconds)
        rows = {
            name: {
                "ms": 1e3 * t.seconds,
                "speedup": times["dense"].seconds / t.seconds,
                "spread": t.spread,
                "runs": t.runs,
            }
            for name, t in times.items()
        }
        cells[f"{batch} x {length}"] = {"load_average_before": round(load, 1), "rows": rows}
        print(f"{batch} x {length}", json.dumps(cells[f"{batch} x {length}"]), flush=True)
    record = {
        "command": f"python benchmarks/precision.py --latency --threads {threads}",
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "openvino", "nncf")},
        "machine": side_by_side.machine(),
        "threads": threads,
        "model": run.name,
        "cells": cells,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "latency.json").write_text(json.dumps(record, indent=2) + "\n")


def table() -> None:
    """A row for each model, seeds side by side; latencies beside them."""
    found = {run: json.loads(run.result.read_text()) for run in all_runs() if run.result.is_file()}
    lines: list[str] = []
    for dataset, title in tokens.DATASETS.items():
        records = [found[run] for seed in tokens.SEEDS if (run := Run(dataset, seed)) in found]
        if not records:
            continue
        lines += [
            f"## {title}\n",
            "| weights | test accuracy, per seed | mean | to dense | megabytes |",
            "|---|---|---|---|---|",
        ]
        base = mean(100 * r["accuracy"]["dense"] for r in records)
        for name in records[0]["rows"]:
            values = [100 * r["accuracy"][name] for r in records]
            size = mean(r["rows"][name]["bytes"] for r in records)
            seeds = " / ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {name} | {seeds} | {mean(values):.2f} | {mean(values) - base:+.2f} | {size / 1e6:.1f} |")
        lines.append("")
    path = RESULTS / "latency.json"
    if path.is_file():
        record = json.loads(path.read_text())
        cells = record["cells"]
        lines += ["## Latency\n", f"{record['machine']}, {record['threads']} threads. Batch x tokens.\n"]
        lines += [f"| weights | {' | '.join(cells)} |", f"|---|{'---|' * len(cells)}"]
        for name in next(iter(cells.values()))["rows"]:
            texts = ("{ms:.1f} ms, {speedup:.2f}x".format(**cell["rows"][name]) for cell in cells.values())
            lines.append(f"| {name} | {' | '.join(texts)} |")
        lines.append("")
    text = "\n".join(lines)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table.md").write_text(f"`python benchmarks/precision.py --table`\n\n{text}")
    print(text)


def main() -> None:
    parser, _ = side_by_side.parser(__doc__, "--dataset", tuple(tokens.DATASETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.all:
        side_by_side.run_all(__file__, (all_runs(),), arguments.jobs, arguments.data, RUNS)
    elif arguments.latency:
        latency(arguments.threads)
    elif arguments.table:
        table()
    else:
        run = Run(arguments.dataset, arguments.seed)
        settings = {"dataset": run.dataset, "seed": run.seed, "macs": SMALL, "examples": EXAMPLES}
        side_by_side.finish("precision.py", run, settings, lambda: compare(run, arguments.data))


if __name__ == "__main__":
    main()
