"""A dense and a half-size encoder of the shape of MiniLM-L6 in PyTorch, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/backends.py                          # every cell that has no result yet, then the table
    python benchmarks/backends.py --table                  # only the table, from the results that are there
    python benchmarks/backends.py --table --markdown docs/backends.md

Models, all with random weights (latency does not depend on them):

    dense       6 layers, width 384, 12 heads, 1536 FFN units
    half        `make_plan(macs=0.5)`: heads and FFN units compete; half of the MACs of the encoder layers
    uniform     the same share of every layer with round widths: 6 heads and 768 FFN units

A cell is a batch size and a length. In a cell everything is measured in turn, forwards and backwards (a b c c b a ...):
each model in each backend, at float32 and at the precision that the backend chooses by default. What is stated is the
median, and its ratio to eager PyTorch at float32 with the dense model *in the same cell*. Cells are kept in
`results/backends.json`, one by one; a cell that is there is skipped unless `--again`.

Every exported file is checked against PyTorch by `export_model`; results have the errors. Needs the extras `hf`, `onnx`
and `openvino`, and a C++ compiler for torch.compile (left out with `--backends`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from benchmarks import side_by_side  # noqa: E402
from lightning_compress import (  # noqa: E402
    PruningPlan,
    apply_plan,
    discover,
    export_model,
    kept_fraction,
    make_plan,
    unit_costs,
)
from lightning_compress.timing import Latency  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "backends.json"
MODELS = ("dense", "half", "uniform")
BACKENDS = ("eager", "compile", "onnxruntime", "openvino")
BASE = "eager, float32, dense"
CALL_TOKENS = 16  # of the example that models are traced with

Call = Callable[[], Any]


class Encoder(nn.Module):
    """The mean of the token states over real tokens: sentence embeddings."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask).last_hidden_state  # (batch, length, width)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)  # (batch, width)


def call(batch: int, tokens: int, seed: int, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def build(seed: int, length: int) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The models by name, and what they keep. MACs are those at ``length`` tokens."""
    torch.manual_seed(seed)
    dense = Encoder().eval()
    structures = discover(dense, (), call(2, length, seed), kinds=("head", "ffn"), prove=True)
    generator = torch.Generator().manual_seed(seed)
    costs = unit_costs(structures)
    # scores in proportion to the work of a unit, so that heads and FFN units all take part
    scores = {s.name: costs[s.name].macs * torch.randn(s.units, generator=generator).exp() for s in structures}
    uniform = {s.name: range(s.units // 2) for s in structures}
    plans = {
        "half": make_plan(dense, structures, macs=0.5, scores=scores),
        "uniform": PruningPlan.of(dense, structures, uniform),
    }
    models: dict[str, nn.Module] = {"dense": dense}
    kept: dict[str, Any] = {}
    for name, plan in plans.items():
        torch.manual_seed(seed)
        models[name] = Encoder().eval()
        models[name].load_state_dict(dense.state_dict())
        apply_plan(models[name], plan, verify=((), call(2, CALL_TOKENS, seed)))
        counts = dict(plan.counts)
        kept[name] = {
            "macs_of_the_encoder_layers": round(kept_fraction(structures, plan.counts, "macs"), 4),
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "heads": [n for s, n in counts.items() if structures[s].kind == "head"],
            "ffn": [n for s, n in counts.items() if structures[s].kind == "ffn"],
        }
    kept["dense"] = {"parameters": sum(p.numel() for p in dense.parameters())}
    return models, kept


def export_all(models: dict[str, nn.Module], backends: list[str], folder: Path, seed: int) -> dict[str, Any]:
    """Files of every model for the runtimes; returns sizes and errors."""
    formats = {"onnxruntime": ("onnx", ".onnx"), "openvino": ("openvino", ".xml")}
    exported: dict[str, Any] = {}
    for backend in backends:
        if backend not in formats:
            continue
        format, suffix = formats[backend]
        for name, model in models.items():
            path = folder / f"{name}{suffix}"
            result = export_model(model, path, format, ((), call(2, CALL_TOKENS, seed, padded=True)))  # type: ignore[arg-type]
            exported[f"{backend}, {name}"] = {
                "megabytes": round(result.bytes / 1e6, 1),
                "largest_relative_error": result.error,
                "calls_tried": len(result.tried),
            }
            print(result, flush=True)
    return exported


def runners(
    models: dict[str, nn.Module], backends: list[str], folder: Path, inputs: dict[str, Tensor], threads: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """What is timed, by "backend, precision, model", and the precisions that backends choose by themselves."""
    found: dict[str, Call] = {}
    defaults: dict[str, str] = {}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    for backend in backends:
        for name, model in models.items():
            if backend in ("eager", "compile"):
                defaults[backend] = "float32"  # what the weights are; one row serves both
                forward = model if backend == "eager" else torch.compile(model, dynamic=False)
                found[f"{backend}, float32, {name}"] = lambda f=forward: f(**inputs)  # type: ignore[misc]
            elif backend == "onnxruntime":
                import onnxruntime

                defaults[backend] = "float32"
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                session = onnxruntime.InferenceSession(
                    str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
                )
                found[f"{backend}, float32, {name}"] = lambda s=session: s.run(None, arrays)  # type: ignore[misc]
            else:
                import openvino

                for hint in ("float32", "default"):
                    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
                    if hint == "float32":
                        properties["INFERENCE_PRECISION_HINT"] = "f32"
                    compiled = openvino.Core().compile_model(str(folder / f"{name}.xml"), "CPU", properties)
                    if hint == "default":
                        kind = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
                        defaults[backend] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(kind, kind)
                        if defaults[backend] == "float32":
                            continue  # the same as the other row
                    request = compiled.create_infer_request()
                    found[f"{backend}, {hint}, {name}"] = lambda r=request: r.infer(arrays)  # type: ignore[misc]
    return found, defaults


def interleaved(calls: dict[str, Call], repeats: int, seconds: float) -> dict[str, Latency]:
    """Median times, measured in turn."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(2):
            for name in names:
                calls[name]()
        begin = time.perf_counter()
        for repeat in range(repeats):
            for name in names if repeat % 2 == 0 else reversed(names):
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)
            if time.perf_counter() - begin > seconds:
                break
    return {name: Latency.of(t) for name, t in times.items()}


def measure(options: argparse.Namespace, models: dict[str, nn.Module], folder: Path, batch: int, tokens: int) -> Any:
    load = os.getloadavg()[0]
    inputs = call(batch, tokens, options.seed)
    calls, defaults = runners(models, options.backends, folder, inputs, options.threads)
    times = interleaved(calls, options.repeats, options.seconds)
    base = times[BASE].seconds
    rows = {
        name: {
            "ms": round(1e3 * t.seconds, 3),
            "speedup": round(base / t.seconds, 3),
            "spread": round(t.spread, 4),
            "runs": t.runs,
        }
        for name, t in times.items()
    }
    for name, row in rows.items():
        print(f"batch {batch}, length {tokens}: {name}: {row['ms']} ms, {row['speedup']}x", flush=True)
    torch._dynamo.reset()
    gc.collect()
    return {
        "command": command_line(),
        "load_average_before": round(load, 1),
        "default_precision": defaults,
        "rows": rows,
    }


def command_line() -> str:
    """The command, without the places of its results."""
    arguments = sys.argv[1:]
    for name in {"--results", "--markdown"} & set(arguments):
        at = arguments.index(name)
        del arguments[at : at + 2]
    return " ".join(["python", "benchmarks/backends.py", *arguments])


def table(known: dict[str, Any]) -> str:
    """Markdown: a row per backend, precision and model, a column per cell; speed-up (milliseconds)."""
    cells = known["cells"]
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["rows"]))
    lines = [
        "| backend | precision | model | " + " | ".join(cells) + " |",
        "|---|---|---|" + "---|" * len(cells),
    ]
    for name in names:
        backend, precision, model = name.split(", ")
        if precision == "default":
            chosen = {cell["default_precision"][backend] for cell in cells.values()}
            precision = f"default: {' or '.join(sorted(chosen))}"
        values = [cell["rows"].get(name) for cell in cells.values()]
        texts = ["" if v is None else f"{v['speedup']:.2f}x ({v['ms']:.1f} ms)" for v in values]
        lines.append(f"| {backend} | {precision} | {model} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def page(known: dict[str, Any]) -> str:
    """The table with what it needs to be read."""
    kept, versions = known["models"], ", ".join(f"{name} {v}" for name, v in known["versions"].items())
    commands = dict.fromkeys(cell["command"] for cell in known["cells"].values())
    loads = [cell["load_average_before"] for cell in known["cells"].values()]
    counts = "; ".join(
        f"{name}: {k['parameters'] / 1e6:.1f} million parameters"
        + (
            f", {' '.join(map(str, k['heads']))} heads and {' '.join(map(str, k['ffn']))} FFN units"
            if "ffn" in k
            else ""
        )
        for name, k in sorted(kept.items(), key=lambda item: MODELS.index(item[0]))
    )
    worst = max((e["largest_relative_error"] for e in known["exported"].values()), default=0.0)
    return (
        "# Backends\n\n"
        "An encoder of the shape of MiniLM-L6 (6 layers, width 384, 12 heads, 1536 FFN units, random weights): dense;\n"
        "with half of the multiply-accumulates of its encoder layers by `make_plan(macs=0.5)` (`half`); and with half\n"
        "of every layer at round widths (`uniform`). Speed-up over eager PyTorch in float32 with the dense model in\n"
        "the same run, and the median time of a call; everything in a cell is measured in turn. A second row shows a\n"
        "backend whose own choice of precision is not float32.\n\n"
        f"{table(known)}\n"
        f"{counts}.\n\n"
        f"{known['machine']}, {known['threads']} threads; load average before a cell {min(loads)} to {max(loads)}; "
        f"seed {known['seed']}; {versions}. Largest relative error of an exported file: {worst:.1e}.\n\n"
        + "".join(f"    {command}\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--repeats", type=int, default=101, help="runs of each in a cell, at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="stop a cell after about so long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure cells anew that have results")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--markdown", type=Path, help="write the page with the table to this file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    known: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {"cells": {}}
    cells = {f"batch {b}, length {n}": (b, n) for b in options.batches for n in options.lengths}
    missing = {name: cell for name, cell in cells.items() if options.again or name not in known["cells"]}
    if not options.table and missing:
        run(options, known, missing)
    print(table(known))
    if options.markdown:
        options.markdown.write_text(page(known), encoding="utf-8")


def run(options: argparse.Namespace, known: dict[str, Any], missing: dict[str, tuple[int, int]]) -> None:
    """Measure the missing cells, and keep each as soon as it is there."""
    if BACKENDS[0] not in options.backends:
        raise SystemExit("Expected eager among --backends: ratios are to its time with the dense model.")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        models, kept = build(options.seed, 128)
        print(json.dumps(kept), flush=True)
        exported = export_all(models, options.backends, Path(folder), options.seed)
        known |= {
            "seed": options.seed,
            "threads": options.threads,
            "machine": side_by_side.machine(),
            "versions": {
                name: version(name)
                for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")
            },
            "models": kept,
            "exported": known.get("exported", {}) | exported,
        }
        for name, (batch, tokens) in missing.items():
            known["cells"][name] = measure(options, models, Path(folder), batch, tokens)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
