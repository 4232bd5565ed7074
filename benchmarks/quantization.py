"""Quantization on SST-2 and MRPC with a pretrained MiniLM-L6: accuracy, bytes on disk, and latency of every backend.

    python benchmarks/quantization.py --variant int8 --dataset sst2 --seed 0   # one run; skipped if its result is there
    python benchmarks/quantization.py --all --jobs 2                           # everything that is missing
    python benchmarks/quantization.py --long --jobs 2                          # two bits and fewer for several epochs
    python benchmarks/quantization.py --latency                                # all backends; wants an idle machine
    python benchmarks/quantization.py --table                                  # results/quantization/table.md

The dense models are those of `python benchmarks/tokens.py --method dense`, and so are data, steps, learning rate, order
of batches and the distillation from the dense model. `int8-after` is not trained. Accuracy is that of the model after
it was saved with its integers and loaded again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of PyTorch that wait busily take the cores of runtimes
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import side_by_side, sst2, tokens  # noqa: E402
from lightning_compress import (  # noqa: E402
    ObservedRange,
    QuantizationAwareTraining,
    Stochastic,
    attach_input_quantizers,
    attach_quantizers,
    convert,
    export_model,
    load_compressed,
    measure_latency,
    save_compressed,
    select_weights,
    weight_kinds,
)
from lightning_compress.quantization import activation_named, select_inputs  # noqa: E402
from lightning_compress.quantization.selection import PRODUCTS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quantization"
RUNS = ROOT / "benchmarks" / "runs" / "quantization"
WITH_TABLES = (*(kind for kind in PRODUCTS if kind not in ("channel", "other")), "embedding")
SHAPES = ((1, 32), (1, 128), (32, 32), (32, 128))  # batch and tokens at which latency is measured

PRECISION = "bfloat16 autocast in training, float32 and integers in evaluation"
GENTLE = (
    2e-5  # learning rate for eight bits, which have little to recover from; others have that of the token benchmark
)
HARD: dict[str, Any] = {"start": 0.05, "full_at": 0.4}  # settings of the callback for fewer than eight bits
VARIANTS: dict[str, dict[str, Any]] = {  # in the order in which they are run
    "int8-after": {"weights": "int8", "activations": "int8"},
    "int8": {"weights": "int8", "activations": "int8"},
    "stochastic4-products": {"weights": Stochastic(4, norm="mse"), **HARD},
    "stochastic2-products": {"weights": Stochastic(2, norm="mse"), **HARD},
    "lsq4": {"weights": "lsq4", **HARD},
    "lsq2": {"weights": "lsq2", **HARD},
    "binary": {"weights": "binary", **HARD},
    "stochastic1-products": {"weights": Stochastic(1, norm="mse"), **HARD},
    "int8-observed": {"weights": "int8", "activations": ObservedRange()},
    **{
        f"stochastic{bits}-{where}": {"weights": Stochastic(bits, norm="mse"), "modules": modules, **HARD}
        for where, modules in (("attention", "attention"), ("tables", WITH_TABLES))
        for bits in (4, 2, 1)
    },
}
HARDEST = ("lsq2", "stochastic2-products", "binary", "stochastic1-products")
LONG = {"sst2": 3, "mrpc": 8}  # epochs of `--long`: one to two thousand steps


@dataclass(frozen=True)
class Run:
    dataset: str
    variant: str
    seed: int
    epochs: int = 1

    @property
    def label(self) -> str:
        """The variant, and how long it is trained."""
        return self.variant if self.epochs == 1 else f"{self.variant}-{self.epochs}epochs"

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.label}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        length = [] if self.epochs == 1 else ["--epochs", str(self.epochs)]
        return ["--dataset", self.dataset, "--variant", self.variant, *length, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def dense(self) -> tokens.Run:
        return tokens.Run(self.dataset, "dense", self.seed)


def all_runs() -> list[Run]:
    """All products first, then parts of the model; whoever breaks off has both seeds of what there is."""
    whole = [variant for variant in VARIANTS if "attention" not in variant and "tables" not in variant]
    parts = [variant for variant in VARIANTS if variant not in whole]
    datasets = sorted(tokens.DATASETS, reverse=True)  # the one with the shorter sentences first
    return [Run(d, v, seed) for some in (whole, parts) for d in datasets for v in some for seed in tokens.SEEDS]


def long_runs() -> list[Run]:
    """What more training is worth where most is lost."""
    datasets = sorted(tokens.DATASETS, reverse=True)
    return [Run(d, v, seed, LONG[d]) for v in HARDEST for d in datasets for seed in tokens.SEEDS]


def prepare(model: nn.Module, weights: Any, activations: str | None = None, modules: Any = None) -> None:
    """Quantizers on a model, without training."""
    kinds = weight_kinds(model, sst2.example())
    chosen = select_weights(kinds, weights, modules)
    attach_quantizers(model, chosen)
    if activations is not None:
        attach_input_quantizers(model, select_inputs(model, kinds, chosen, activation_named(activations)))


def without_dropout(module: nn.Module) -> None:
    """Switch dropout off, in training too."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def stored(model: nn.Module, backend: str) -> tuple[nn.Module, int]:
    """The model after it was converted, saved and loaded again, and the bytes of its file."""
    convert(model.eval(), backend)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        save_compressed(model, place, factory=lambda: sst2.new_module().model)
        size = (place / "model.safetensors").stat().st_size
        return load_compressed(place, factory=lambda: sst2.new_module().model), size


def train(run: Run, folder: str) -> dict[str, Any]:
    L.seed_everything(run.seed, verbose=False)
    if not run.dense.dense_weights.is_file():
        raise SystemExit(f"{run.name} needs dense weights: python benchmarks/tokens.py --method dense first.")
    settings = VARIANTS[run.variant]
    data = tokens.text_data(run.dataset, folder, run.seed)
    seconds = 0.0
    if run.variant.endswith("after"):
        module = sst2.new_module(weights=run.dense.dense_weights)
        prepare(module.model, **settings)
    else:
        rate = GENTLE if run.variant.startswith("int8") else tokens.RATE
        module = sst2.new_module(tokens.Taught, lr=rate, weights=run.dense.dense_weights)
        if run.variant.startswith("int8"):
            without_dropout(module)  # eight bits only have to follow their teacher: there is nothing to overfit
        module.teacher = [tokens.Teacher(run.dense, data)]
        module.model.encoder.embeddings.requires_grad_("embedding" in (settings.get("modules") or ()))
        callback = QuantizationAwareTraining(module="model", **settings)
        steps = {"max_epochs": -1, "max_steps": run.epochs * tokens.STEPS[run.dataset]}
        seconds = tokens.fit(module, data, [callback], "bf16-mixed", **steps)
    dense = sum(p.numel() * p.element_size() for p in module.model.parameters())
    small, size = stored(module.model, "native" if settings.get("activations") == "int8" else "unpacked")
    return {**tokens.evaluate(small, data), "bytes": size, "bytes_of_dense_parameters": dense, "seconds": seconds}


# Latency, which does not depend on what was learned


class Session(nn.Module):
    """A file in a runtime, which is called like the model."""

    def __init__(self, path: Path, precision: str = "f32") -> None:
        super().__init__()
        threads = torch.get_num_threads()
        self.run: Any
        if path.suffix == ".onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.run = lambda arrays: session.run(None, arrays)
        else:
            import openvino

            properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            properties["INFERENCE_PRECISION_HINT"] = precision
            request = openvino.Core().compile_model(str(path), "CPU", properties).create_infer_request()
            self.run = lambda arrays: request.infer(arrays)

    def forward(self, **call: Tensor) -> Any:
        return self.run({name: tensor.numpy() for name, tensor in call.items()})


def answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, also of a runtime."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    if hasattr(output, "logits"):
        return output.logits  # type: ignore[no-any-return]
    first = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return torch.from_numpy(first)


@torch.no_grad()
def accuracy(model: nn.Module, data: Any, names: Sequence[str] = ("dev", "test")) -> dict[str, Any]:
    """On dev, test and both; also of a file in a runtime."""
    found, every = {}, []
    for name in names:
        split = "validation" if name == "dev" else name
        batches = data.loader(split, tokens.by_length(data, split))
        every.append(torch.cat([torch.stack([answers(model, b).argmax(-1), b["labels"]]) for b in batches], 1))
        found[name] = tokens.scores_of(every[-1])
    return found | {"pooled": tokens.scores_of(torch.cat(every, 1))}


def ways(folder: Path) -> Iterator[tuple[str, nn.Module, int]]:
    """Models by "weights, backend", with the bytes of their files: what the weights of each variant can become.

    Weights and ranges are those before training; time does not depend on them.
    """

    def made(weights: str | None, activations: Any) -> nn.Module:
        model: nn.Module = sst2.new_module().model.eval()
        if weights is not None:
            prepare(model, weights, activations)
            if isinstance(activations, ObservedRange):
                with torch.no_grad():
                    model.train()(*sst2.example())
        return model.eval()

    dense = made(None, None)
    save_model(dense, str(folder / "dense.safetensors"))
    yield "fp32, eager", dense, (folder / "dense.safetensors").stat().st_size
    for bits in ("int8", "int4", "int2", "binary"):
        for backend in ("native", "packed", "unpacked"):
            if bits != "binary" or backend != "native":
                yield f"{bits}, {backend}", *stored(made(bits, "int8" if backend == "native" else None), backend)
    for weights, activations, words in (
        (None, None, "fp32"),
        ("int8", "int8", "int8, ranges of the call"),
        ("int8", ObservedRange(), "int8, observed ranges"),
    ):
        model = made(weights, activations)
        if weights is not None:
            convert(model, "unpacked")
        for runtime, suffix, precisions in (("onnx", ".onnx", ("f32",)), ("openvino", ".xml", ("f32", "bf16"))):
            path = folder / f"{words}{suffix}"
            size = export_model(model, path, runtime, (sst2.example(), {}), tolerance=math.inf).bytes  # type: ignore[arg-type]
            for precision in precisions:
                title = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[runtime]
                rest = ", rest bfloat16" if precision == "bf16" else ""
                yield f"{words}, {title}{rest}", Session(path, precision), size


def latency(threads: int, repeats: int = 31, seconds: float = 40.0) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        found = list(ways(Path(folder)))
    models = {name: model for name, model, _ in found}
    base = next(iter(models))
    cells: dict[str, Any] = {}
    for batch, length in SHAPES:
        ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        load = os.getloadavg()[0]
        times = measure_latency(models, (), call, repeats=repeats, max_seconds=seconds)
        rows = {
            name: {
                "ms": 1e3 * t.seconds,
                "speedup": times[base].seconds / t.seconds,
                "spread": t.spread,
                "runs": t.runs,
            }
            for name, t in times.items()
        }
        cells[f"{batch} x {length}"] = {"load_average_before": round(load, 1), "rows": rows}
        print(f"{batch} x {length}", json.dumps(cells[f"{batch} x {length}"]), flush=True)
    record = {
        "command": f"python benchmarks/quantization.py --latency --threads {threads}",
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "openvino")},
        "machine": side_by_side.machine(),
        "threads": torch.get_num_threads(),
        "bytes": {name: size for name, _, size in found},
        "cells": cells,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "latency.json").write_text(json.dumps(record, indent=2) + "\n")


# Numbers


def table() -> None:
    """A row for each variant, seeds side by side, and the latencies; what was not run is left out."""
    dense = tokens.records()
    lines: list[str] = []
    for dataset, title in tokens.DATASETS.items():
        lines += [
            f"## {title}\n",
            "| variant | dev + test, per seed | mean | to dense | megabytes | times less |",
            "|---|---|---|---|---|---|",
        ]
        for variant, epochs in product(VARIANTS, (1, LONG[dataset])):
            runs = [run for seed in tokens.SEEDS if (run := Run(dataset, variant, seed, epochs)).result.is_file()]
            if not runs:
                continue
            found = [json.loads(run.result.read_text()) for run in runs]
            values = tokens.percents(found, "pooled")
            loss = mean(values) - mean(tokens.percents([dense[run.dense] for run in runs], "pooled"))
            size = mean(record["bytes"] for record in found)
            less = found[0]["bytes_of_dense_parameters"] / size
            seeds = " / ".join(f"{value:.2f}" for value in values)
            lines.append(
                f"| {runs[0].label} | {seeds} | {mean(values):.2f} | {loss:+.2f} | {size / 1e6:.1f} | {less:.2f} |"
            )
        lines.append("")
    for path in sorted(RESULTS.glob("latency*.json")):  # of this machine, and what was kept of others
        record = json.loads(path.read_text())
        cells, sizes = record["cells"], record["bytes"]
        lines += [
            "## Latency\n",
            f"{record['machine']}, {record['threads']} threads. Batch x tokens, median and speed-up.\n",
        ]
        lines += [f"| weights, backend | megabytes | {' | '.join(cells)} |", f"|---|---|{'---|' * len(cells)}"]
        for name, size in sizes.items():
            texts = ("{ms:.1f} ms, {speedup:.2f}x".format(**cell["rows"][name]) for cell in cells.values())
            lines.append(f"| {name} | {size / 1e6:.1f} | {' | '.join(texts)} |")
        lines.append("")
    text = "\n".join(lines)
    (RESULTS / "table.md").write_text(f"`python benchmarks/quantization.py --table`\n\n{text}")
    print(text)


def main() -> None:
    parser, what = side_by_side.parser(__doc__, "--variant", tuple(VARIANTS))
    what.add_argument("--long", action="store_true", help="the same for some longer runs")
    parser.add_argument("--epochs", type=int, default=1, help="of the run")
    parser.add_argument("--dataset", choices=tuple(tokens.DATASETS), default="sst2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.all or arguments.long:
        runs = long_runs() if arguments.long else all_runs()
        side_by_side.run_all(__file__, (runs,), arguments.jobs, arguments.data, RUNS)
    elif arguments.latency:
        latency(arguments.threads)
    elif arguments.table:
        table()
    else:
        run = Run(arguments.dataset, arguments.variant, arguments.seed, arguments.epochs)
        settings = {"dataset": run.dataset, "variant": run.variant, "seed": run.seed}
        settings |= {"epochs": run.epochs, "precision": PRECISION}
        RUNS.mkdir(parents=True, exist_ok=True)
        side_by_side.finish("quantization.py", run, settings, lambda: train(run, arguments.data))


if __name__ == "__main__":
    main()
