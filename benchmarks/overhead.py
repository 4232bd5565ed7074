"""What compression costs while it happens, for a model of the size of BERT-base with random weights.

    python benchmarks/overhead.py                  # everything; writes benchmarks/results/overhead.json

- **step**: a training step with and without `StructuredSparsity`, in one fit of one model, taking turns step by step.
- **removal**: wall time of discovery, planning and surgery.
- **memory**: high-water mark of the resident memory (`ru_maxrss`), each figure in a process of its own: a fit with the
  callback against one without; and what the removal adds to the mark of a model that has been run once.

Goals: at most 3 % per step, at most 5 s for the removal. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from operator import sub
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress import FinalizeCompression, StructuredSparsity, apply_plan, discover, make_plan

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
FIT_STEPS = 10_000  # the fit of which the measured steps are the beginning: how often the callback looks at its budget


class Sentences(IterableDataset[dict[str, Tensor]]):
    """One random batch, over and over: reading data is no part of the question."""

    def __init__(self, batch: int, tokens: int, vocabulary: int) -> None:
        self.batch = random_batch(batch, tokens, vocabulary)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch


def random_batch(batch: int, tokens: int, vocabulary: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(vocabulary, (batch, tokens)),  # (batch, tokens)
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long),  # (batch, tokens)
        "labels": torch.randint(2, (batch,)),  # (batch,)
    }


def build(options: argparse.Namespace) -> BertForSequenceClassification:
    torch.manual_seed(options.seed)
    config = BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.width,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
    )
    return BertForSequenceClassification(config).train()


class Classifier(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-5)


def clock() -> Tensor:
    """Seconds by the wall, and CPU seconds of this process, which do not count what others do meanwhile."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Timed(StructuredSparsity):
    """Notes in `seconds` what each of its calls after a step takes."""

    seconds: list[Tensor]

    def on_fit_start(self, *args: Any) -> None:
        self.seconds = []
        super().on_fit_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        started = clock()
        super().on_train_batch_end(*args)
        self.seconds.append(clock() - started)


class EverySecondStep(Timed):
    """Acts after every second step only."""

    acts = False

    def on_train_batch_end(self, *args: Any) -> None:
        self.acts = not self.acts
        if self.acts:
            super().on_train_batch_end(*args)


class StepTimer(L.Callback):
    """Last of the callbacks: from the start of a training batch until every callback has seen its end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: list[Tensor] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = clock()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seconds.append(clock() - self.started)
        trainer.should_stop = len(self.seconds) >= self.steps


def fit(options: argparse.Namespace, callbacks: list[L.Callback]) -> None:
    model = build(options)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=FIT_STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Sentences(options.batch, options.tokens, model.config.vocab_size)
    trainer.fit(Classifier(model), DataLoader(data, batch_size=None))


def finalize() -> FinalizeCompression:
    return FinalizeCompression(macs=0.4, at=0.5)  # half a long fit away: only its first steps are run


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    # With a strength of its own it exempts no unit: all heads and FFN units are shrunk, the most work there is.
    sparsity = EverySecondStep("group_lasso", kinds=("head", "ffn"), strength=1e-4, start=0.0)
    timer = StepTimer(2 * (options.steps + 1))
    fit(options, [sparsity, finalize(), timer])
    # The first pair traces the model and allocates the optimizer's state.
    acting, resting = torch.stack(timer.seconds[2::2]), torch.stack(timer.seconds[3::2])  # (steps, wall and CPU)
    own = torch.stack(sparsity.seconds)
    measured = {
        "without_s": resting.median(0).values,
        "with_s": acting.median(0).values,
        "ratio_of_medians": acting.median(0).values / resting.median(0).values,
        "median_of_pairwise_ratios": (acting / resting).median(0).values,
        "callback_s": own[1:].median(0).values,
        "callback_share": own[1:].median(0).values / resting.median(0).values,
    }
    return {"steps_of_each": len(acting), **{k: {"wall": float(v[0]), "cpu": float(v[1])} for k, v in measured.items()}}


def measure_removal(options: argparse.Namespace) -> dict[str, Any]:
    model = build(options).eval()
    example = random_batch(options.example, options.tokens, model.config.vocab_size)
    with torch.no_grad():
        model(**example)
    before = peak_mib()
    marks = [clock()]
    discover(model, (), example, kinds=("head", "ffn"))
    marks.append(clock())
    structures = discover(model, (), example, kinds=("head", "ffn"), prove=True)
    marks.append(clock())
    plan = make_plan(model, structures, macs=0.4)
    marks.append(clock())
    apply_plan(model, plan, verify=((), example))
    marks.append(clock())
    names = ("discovery_s", "discovery_with_proof_s", "planning_s", "surgery_with_verification_s")
    spent = dict(zip(names, map(sub, marks[1:], marks), strict=True))
    rest = spent["planning_s"] + spent["surgery_with_verification_s"]
    spent["total_s"] = spent["discovery_s"] + rest
    spent["total_with_proof_s"] = spent["discovery_with_proof_s"] + rest
    return {
        "structures": len(structures),
        "example": f"{options.example} x {options.tokens} tokens",
        **{name: {"wall": float(s[0]), "cpu": float(s[1])} for name, s in spent.items()},
        "peak_extra_mib": peak_mib() - before,
    }


def measure_dense_fit(options: argparse.Namespace) -> dict[str, Any]:
    fit(options, [StepTimer(3)])
    return {"peak_mib": peak_mib()}


def measure_sparse_fit(options: argparse.Namespace) -> dict[str, Any]:
    sparsity = Timed("group_lasso", kinds=("head", "ffn"), start=0.0)
    fit(options, [sparsity, finalize(), StepTimer(3)])
    wall, cpu = sparsity.seconds[0].tolist()  # the first step looks at the budget, as do 50 in a fit
    return {"peak_mib": peak_mib(), "look_at_the_budget_s": {"wall": wall, "cpu": cpu}}


def peak_mib() -> float:
    """High-water mark of this process; `ru_maxrss` counts KiB on Linux and bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


PARTS = {
    "step": measure_step,
    "removal": measure_removal,
    "dense_fit": measure_dense_fit,
    "sparse_fit": measure_sparse_fit,
}


def machine() -> str:
    names = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}, {memory:.0f} GiB"


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64, the width of a head")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--example", type=int, default=2, help="sentences that discovery and verification run on")
    parser.add_argument("--steps", type=int, default=15, help="measured steps with, and as many without")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=list(PARTS), help="measure one part in this process and print it as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "The fit ended after")  # on purpose
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return
    load = os.getloadavg()[0]  # above 0.5 or so something else runs, and only CPU seconds mean much
    parts: dict[str, Any] = {}
    for part in PARTS:  # each in a process of its own, so that its high-water mark is its own
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--part", part], stdout=subprocess.PIPE, check=True
        )
        parts[part] = json.loads(child.stdout.splitlines()[-1])
        print(part, json.dumps(parts[part], indent=2), flush=True)
    memory = {
        "dense_fit_peak_mib": parts["dense_fit"]["peak_mib"],
        "sparse_fit_peak_mib": parts["sparse_fit"]["peak_mib"],
        "sparse_fit_extra_mib": parts["sparse_fit"]["peak_mib"] - parts["dense_fit"]["peak_mib"],
        "removal_extra_mib": parts["removal"].pop("peak_extra_mib"),
        "how": "ru_maxrss of separate processes; three training steps each",
    }
    result = {
        "command": " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "seed": options.seed,
        "threads": options.threads,
        "machine": machine(),
        "load_average_before": round(load, 1),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "model": f"BertForSequenceClassification, {options.layers} layers, width {options.width}, random weights",
        "batch": f"{options.batch} x {options.tokens} tokens",
        "step": {**parts["step"], "look_at_the_budget_s": parts["sparse_fit"]["look_at_the_budget_s"]},
        "removal": parts["removal"],
        "memory": memory,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
