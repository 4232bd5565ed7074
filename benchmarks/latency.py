"""How well a latency budget is met, for an encoder of the size of MiniLM-L6 with random weights.

    python benchmarks/latency.py                   # both batch sizes; adds to benchmarks/results/latency.json

For every batch size a table is measured, and for every target, a fraction of the dense latency, four plans are made: by
measured latency with the multiples that the table has found and without any, and by multiply-accumulates, likewise.
Then every plan is measured anew against the dense model, in several repeats: *measured* is the median of the repeats,
each the ratio of medians of interleaved runs, and *spread* their extremes. Where other work shares the cores,
`--threads 1 --cpu-time` counts what the process itself takes; seconds by the wall say little there.

Scores are random, in proportion to the multiply-accumulates of a unit, the same for all plans, so that heads and FFN
units all take part. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_compress import (
    BudgetWarning,
    Structures,
    apply_plan,
    discover,
    kept_fraction,
    make_plan,
    measure_latency,
    measure_latency_table,
    unit_costs,
)
from lightning_compress.budget import plan_for_latency
from lightning_compress.latency import LatencyGoal

RESULTS = Path(__file__).resolve().parent / "results" / "latency.json"


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False).eval()


def random_call(batch: int, tokens: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(1000, (batch, tokens)),  # (batch, tokens)
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long),  # (batch, tokens)
    }


def random_scores(structures: Structures, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    costs = unit_costs(structures)
    return {s.name: costs[s.name].macs * torch.randn(s.units, generator=generator).exp() for s in structures}


def measure(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    model = build(options.seed)
    call = random_call(batch, options.tokens)
    # costs are per sentence: the same structures serve every batch size
    structures = discover(model, (), random_call(2, options.tokens), kinds=("head", "ffn"), prove=True)
    scores = random_scores(structures, options.seed)
    started = time.perf_counter()
    timed = functools.partial(measure_latency, clock=time.process_time if options.cpu_time else time.perf_counter)
    table = measure_latency_table(model, structures, (), call, seconds=options.seconds, cache=False, measure=timed)
    seconds = time.perf_counter() - started
    print(table, flush=True)
    estimator = table.model(structures)
    plans: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    for target in options.targets:
        for metric in ("latency", "macs"):
            for rounding in (True, False):
                name = f"{metric}={target:g}, {'multiples of the table' if rounding else 'no rounding'}"
                multiples = table.multiples if rounding else 1
                goal = LatencyGoal(target, kwargs=call, max_seconds=options.seconds, measure=timed)
                rounds = 0
                started = time.perf_counter()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    if metric == "latency":
                        plan, met = plan_for_latency(model, structures, goal, table, scores, multiples)
                        rounds = met.rounds
                    else:
                        plan = make_plan(model, structures, macs=target, scores=scores, round_to=multiples)
                plans[name] = {
                    "target": target,
                    "rounds": rounds,
                    "planning_s": round(time.perf_counter() - started, 1),
                    "macs_kept": round(kept_fraction(structures, plan.counts, "macs"), 4),
                    "estimate_of_the_table": round(estimator.estimate(plan.counts), 4),
                    "kept": list(plan.counts.values()),
                    "warnings": [str(w.message) for w in caught if issubclass(w.category, BudgetWarning)],
                }
                models[name] = build(options.seed)
                apply_plan(models[name], plan, unverified=True)
                print(name, plans[name], flush=True)
    for name in plans:
        plans[name].update(measured=[], dense_ms=[])
    for _ in range(options.repeats):
        for name, plan in plans.items():
            # each against the dense model alone: more models in turn would evict each other's weights from the caches
            times = timed(
                {"dense": model, "small": models[name]}, (), call, repeats=101, max_seconds=options.seconds / 4
            )
            plan["measured"].append(times["small"].seconds / times["dense"].seconds)
            plan["dense_ms"].append(round(1e3 * times["dense"].seconds, 2))
    for name, plan in plans.items():
        ratios = plan["measured"]
        plan["measured"] = round(statistics.median(ratios), 4)
        plan["spread"] = [round(min(ratios), 4), round(max(ratios), 4)]
        plan["deviation_percent"] = round(100 * (statistics.median(ratios) / plan["target"] - 1), 1)
        print(f"{name}: {plan['measured']:.3f} ({plan['deviation_percent']:+.1f} %), {plan['spread']}", flush=True)
    return {
        "table_s": round(seconds, 1),
        "noise_of_the_table": round(table.noise, 4),
        "multiples": {row.structures[0]: row.multiple for row in table.rows},
        "together": [
            {"measured": round(y, 4), "sum_of_structures": round(estimator.added(n), 4)} for n, y in table.together
        ],
        "plans": plans,
    }


def machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores, {names[0] if names else platform.machine()}, shared with other work"


def command_line() -> str:
    """The command, without the place of its results."""
    arguments = sys.argv[1:]
    if "--results" in arguments:
        at = arguments.index("--results")
        del arguments[at : at + 2]
    return " ".join(["python", "benchmarks/latency.py", *arguments])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for the table, for each plan; a quarter in a repeat"
    )
    parser.add_argument("--repeats", type=int, default=5, help="fresh measurements of all plans")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of the process, for a machine that is shared"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for batch in options.batches:
        load = os.getloadavg()[0]
        measured = measure(options, batch)
        known = json.loads(options.results.read_text()) if options.results.exists() else {}
        clock = "CPU seconds of the process" if options.cpu_time else "seconds by the wall"
        known[f"batch of {batch}, {options.threads} thread(s), {clock}"] = {
            "command": command_line(),
            "seed": options.seed,
            "threads": options.threads,
            "machine": machine(),
            "load_average_before": round(load, 1),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "model": "BertModel, 6 layers, width 384, 12 heads, 1536 FFN units, random weights, evaluation mode",
            "call": f"{batch} x {options.tokens} tokens, float32",
            **measured,
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
