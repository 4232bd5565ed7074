"""All of it in one fit: structures removed, tokens pruned and int8, against the dense model and each alone.

    python benchmarks/product.py --dataset sst2 --seed 0         # one run; skipped if its result is there
    python benchmarks/product.py --all --jobs 2                  # everything that is missing
    python benchmarks/product.py --latency                       # finished models; wants an idle machine
    python benchmarks/product.py --latency --openvino            # those in OpenVINO
    python benchmarks/product.py --table                         # results/product/table.md

A run starts from the dense weights of `python benchmarks/tokens.py --method dense`, has the data, teacher and loss of
that benchmark, and is one `trainer.fit`: group lasso from the first step, removal of heads and feed-forward units,
learned thresholds of tokens, then eight bits for all products. Accuracy is that of the model after it was saved and
loaded again. Without token pruning (tokens 1) ranges of inputs are those that training observed, and the model is
exported to OpenVINO, which runs int8 with such ranges; accuracy is that of the file. Latencies are measured in turn in
one process, those of single stages with the same removal and the same thresholds.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

# threads of PyTorch that wait busily are faster between small products, and take the cores of other runtimes
BUSY = "--latency" in sys.argv and "--openvino" not in sys.argv
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE" if BUSY else "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import quantization, side_by_side, sst2, tokens  # noqa: E402
from lightning_compress import (  # noqa: E402
    FinalizeCompression,
    ObservedRange,
    PruningPlan,
    QuantizationAwareTraining,
    StructuredSparsity,
    TokenPruning,
    apply_plan,
    convert,
    export_model,
    load_compressed,
    measure_latency,
    save_compressed,
)
from lightning_compress.tokens.install import install_tokens, token_runtime  # noqa: E402
from lightning_compress.tokens.proof import prove_tokens  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "product"
RUNS = ROOT / "benchmarks" / "runs" / "product"  # models, logs: ignored by git
# kept MACs of structures, and by tokens; with all tokens in OpenVINO
SIZES = {"sst2": ((0.125, 0.85), (0.125, 1.0)), "mrpc": ((0.5, 0.75), (0.5, 1.0))}
EPOCHS = 10
RATES = {0.5: 1e-4, 0.25: 2e-4, 0.125: 3e-4}  # what has lost more must move further
REMOVAL, HARD, INTEGERS = 0.2, 0.4, 0.5  # moments of the fit


@dataclass(frozen=True)
class Run:
    dataset: str
    macs: float
    tokens: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.macs:g}-{self.tokens:g}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        size = ["--macs", f"{self.macs:g}", "--tokens", f"{self.tokens:g}"]
        return ["--dataset", self.dataset, *size, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def model(self) -> Path:
        return RUNS / self.name

    @property
    def exported(self) -> Path | None:
        """The file of OpenVINO."""
        return RUNS / f"{self.name}.xml" if self.tokens == 1 else None

    @property
    def plan(self) -> Path:
        return RUNS / f"{self.name}.plan.json"

    @property
    def dense(self) -> tokens.Run:
        return tokens.Run(self.dataset, "dense", self.seed)


def all_runs() -> list[Run]:
    return [Run(d, m, t, seed) for d, sizes in SIZES.items() for m, t in sizes for seed in tokens.SEEDS]


def fresh() -> nn.Module:
    model: nn.Module = sst2.new_module().model
    return model


def train(run: Run, folder: str) -> dict[str, Any]:
    L.seed_everything(run.seed, verbose=False)
    if not run.dense.dense_weights.is_file():
        raise SystemExit(f"{run.name} needs dense weights: python benchmarks/tokens.py --method dense first.")
    data = tokens.text_data(run.dataset, folder, run.seed)
    module = sst2.new_module(tokens.Taught, lr=RATES[run.macs], weights=run.dense.dense_weights)
    module.teacher = [tokens.Teacher(run.dense, data)]
    module.model.encoder.embeddings.requires_grad_(False)
    finalize = FinalizeCompression(macs=0.97 * run.macs, at=REMOVAL, module="model", report=False)
    prune = TokenPruning(macs=run.tokens, hard_at=HARD, module="model")
    integers: dict[str, Any] = {"activations": "int8", "backend": "native"}
    if run.exported is not None:
        integers = {"activations": ObservedRange(), "backend": "unpacked"}
    quantize = QuantizationAwareTraining("int8", start=INTEGERS, module="model", **integers)
    callbacks = [
        StructuredSparsity("group_lasso", ("head", "ffn"), importance="taylor", start=0.0, module="model"),
        finalize,
        *([prune] if run.exported is None else []),
        quantize,
    ]
    seconds = tokens.fit(module, data, callbacks, "bf16-mixed", max_epochs=EPOCHS)
    assert finalize.plan is not None and quantize.report is not None
    RUNS.mkdir(parents=True, exist_ok=True)
    finalize.plan.save(run.plan)
    save_compressed(module.model, run.model, factory=fresh, overwrite=True)  # of a run whose result was taken away
    small = load_compressed(run.model, factory=fresh).eval()
    found = tokens.evaluate(small, data)
    if run.exported is not None:
        example: Any = (sst2.example(), {})
        exported = export_model(small, run.exported, "openvino", example, tolerance=math.inf)
        found["accuracy_in_pytorch"] = found["accuracy"]
        for rest, name in (("f32", "accuracy"), ("bf16", "accuracy_with_rest_in_bfloat16")):
            found[name] = quantization.accuracy(quantization.Session(run.exported, rest), data)
        found["bytes_of_export"] = exported.bytes
    found["macs_kept_by_tokens"] = found.pop("macs_kept")  # of the small layers, at real lengths
    structures = sst2.encoder_structures(fresh())
    kept = sst2.prunable_macs(structures, {name: len(units) for name, units in finalize.plan.kept.items()})
    return {
        **found,
        "macs_kept_of_structures": kept / sst2.prunable_macs(structures, structures.counts),
        "kept": finalize.plan.counts,
        "verification_error": finalize.surgery_reports[-1].error,
        "policy": None if prune.policy is None else prune.policy.state(),
        "bytes": sum(file.stat().st_size for file in run.model.iterdir()),
        "bytes_of_dense_parameters": sum(p.numel() * p.element_size() for p in fresh().parameters()),
        "epochs": EPOCHS,
        "seconds": seconds,
    }


# Latency


def stages(run: Run) -> dict[str, nn.Module]:
    """The dense model, what each stage alone makes of it, two of them, and all; by name."""

    def dense() -> nn.Module:
        model: nn.Module = sst2.new_module(weights=run.dense.dense_weights).model
        return model.eval()

    plan = PruningPlan.load(run.plan)

    def without_units(model: nn.Module) -> nn.Module:
        apply_plan(model, plan, verify=(sst2.example(), {}))
        return model

    if run.exported is not None:
        return stages_in_openvino(run, dense, without_units)
    product = load_compressed(run.model, factory=fresh).eval()
    trained = token_runtime(product)
    assert trained is not None

    def without_tokens(model: nn.Module) -> nn.Module:
        install_tokens(model, prove_tokens(model, sst2.example()).runtime(copy.deepcopy(trained.policy)))
        return model

    def of_integers(model: nn.Module) -> nn.Module:
        quantization.prepare(model, "int8", "int8")
        convert(model, "native")
        return model

    return {
        "dense": dense(),
        "structures": without_units(dense()),
        "tokens": without_tokens(dense()),
        "int8": of_integers(dense()),
        "structures, tokens": without_tokens(without_units(dense())),
        "structures, int8": of_integers(without_units(dense())),
        "product": product,
    }


def stages_in_openvino(
    run: Run, dense: Callable[[], nn.Module], without_units: Callable[[nn.Module], nn.Module]
) -> dict[str, nn.Module]:
    """Dense in both runtimes, structures and eight bits alone, and both; "bfloat16": of what is not in eight bits."""
    assert run.exported is not None
    example: Any = (sst2.example(), {})

    def exported(name: str, model: nn.Module) -> Path:
        path = RUNS / f"{run.name} {name}.xml"
        export_model(model, path, "openvino", example, tolerance=math.inf)
        return path

    def observed(model: nn.Module) -> nn.Module:
        quantization.prepare(model, "int8", ObservedRange())
        with torch.no_grad():
            model.train()(*sst2.example())
        convert(model.eval(), "unpacked")
        return model

    whole, small = exported("dense", dense()), exported("structures", without_units(dense()))
    integers = exported("int8", observed(dense()))
    return {
        "dense": dense(),
        "structures": without_units(dense()),
        "dense, OpenVINO": quantization.Session(whole),
        "structures, OpenVINO": quantization.Session(small),
        "int8, OpenVINO": quantization.Session(integers),
        "int8, OpenVINO, bfloat16": quantization.Session(integers, "bf16"),
        "product, OpenVINO": quantization.Session(run.exported),
        "product, OpenVINO, bfloat16": quantization.Session(run.exported, "bf16"),
    }


def latency(folder: str, threads: int, openvino: bool, seconds: float = 12.0) -> None:
    """Time of all stages of finished runs in every cell, interleaved; of runs in OpenVINO, or of the others."""
    torch.set_num_threads(threads)
    data = {name: tokens.text_data(name, folder, 0, 32) for name in tokens.DATASETS}
    path = RESULTS / "latency.json"
    measured: dict[str, Any] = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for run in all_runs():
        if not run.model.is_dir() or (run.exported is not None) != openvino:
            continue
        models = stages(run)
        measured[run.name] = {}
        for cell, call in tokens.cells(data).items():
            load = os.getloadavg()[0]
            times = measure_latency(models, (), call, repeats=41, max_seconds=seconds)
            entering: list[float] | None = None
            if not openvino:
                entered, real = tokens.tokens_of_last_forward(models["product"], call["attention_mask"])
                entering = (entered.double().sum(1) / real.sum()).tolist()
            measured[run.name][cell] = {
                "load_average_before": round(load, 1),
                "tokens_entering": entering,
                "stages": {
                    name: {
                        "ms": 1e3 * t.seconds,
                        "speedup": times["dense"].seconds / t.seconds,
                        "spread": t.spread,
                        "runs": t.runs,
                    }
                    for name, t in times.items()
                },
            }
            print(run.name, cell, json.dumps(measured[run.name][cell]), flush=True)
    record = {
        "command": f"python benchmarks/product.py --latency --threads {threads}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": side_by_side.machine(),
        "threads": threads,
        "runs": measured,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def table() -> None:
    """Accuracy of the runs, and the speed-ups of the stages."""
    dense = tokens.records()
    lines = [
        "| data | MACs by structures, by tokens | dev + test, per seed | mean | to dense | megabytes | times less |",
        "|---|---|---|---|---|---|---|",
    ]
    for dataset, sizes in SIZES.items():
        for macs, kept in sizes:
            runs = [run for seed in tokens.SEEDS if (run := Run(dataset, macs, kept, seed)).result.is_file()]
            if not runs:
                continue
            found = [json.loads(run.result.read_text()) for run in runs]
            values = tokens.percents(found, "pooled")
            loss = mean(values) - mean(tokens.percents([dense[run.dense] for run in runs], "pooled"))
            size = mean(record["bytes"] for record in found)
            shares = [mean(record[f"macs_kept_{what}"] for record in found) for what in ("of_structures", "by_tokens")]
            lines.append(
                f"| {tokens.DATASETS[dataset]} | {shares[0]:.3f}, {shares[1]:.3f} | "
                f"{' / '.join(f'{value:.2f}' for value in values)} | {mean(values):.2f} | {loss:+.2f} | "
                f"{size / 1e6:.1f} | {found[0]['bytes_of_dense_parameters'] / size:.2f} |"
            )
    path = RESULTS / "latency.json"
    if path.is_file():
        for name, cells in json.loads(path.read_text())["runs"].items():
            lines += ["", f"## {name}", "", f"| stage | {' | '.join(cells)} |", f"|---|{'---|' * len(cells)}"]
            for stage in next(iter(cells.values()))["stages"]:
                texts = ("{ms:.1f} ms, {speedup:.2f}x".format(**cell["stages"][stage]) for cell in cells.values())
                lines.append(f"| {stage} | {' | '.join(texts)} |")
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table.md").write_text(f"`python benchmarks/product.py --table`\n\n{text}")
    print(text)


def main() -> None:
    parser, _ = side_by_side.parser(__doc__, "--dataset", tuple(SIZES))
    parser.add_argument("--macs", type=float, choices=tuple(RATES), default=0.25, help="that structures leave")
    parser.add_argument("--openvino", action="store_true", help="with --latency: of the runs in OpenVINO")
    parser.add_argument("--tokens", type=float, default=0.5, help="MACs that tokens leave of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.all:
        side_by_side.run_all(__file__, (all_runs(),), arguments.jobs, arguments.data, RUNS)
    elif arguments.latency:
        latency(arguments.data, arguments.threads, arguments.openvino)
    elif arguments.table:
        table()
    else:
        run = Run(arguments.dataset, arguments.macs, arguments.tokens, arguments.seed)
        settings = {
            "dataset": run.dataset,
            "macs": run.macs,
            "tokens": run.tokens,
            "seed": run.seed,
            "precision": quantization.PRECISION,
        }
        side_by_side.finish("product.py", run, settings, lambda: train(run, arguments.data))


if __name__ == "__main__":
    main()
