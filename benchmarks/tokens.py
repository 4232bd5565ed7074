"""Token pruning on SST-2 and MRPC with a pretrained MiniLM-L6: learned thresholds against top-k and fixed thresholds.

    python benchmarks/tokens.py --method dense --dataset mrpc --seed 0     # one run; skipped when its result is there
    python benchmarks/tokens.py --method recommended --dataset sst2 --macs 0.5 --seed 1     # needs the dense weights
    python benchmarks/tokens.py --all --jobs 2                             # everything that is missing
    python benchmarks/tokens.py --long --jobs 2                            # some runs of three epochs
    python benchmarks/tokens.py --latency                                  # throughput; wants an idle machine
    python benchmarks/tokens.py --table                                    # benchmarks/results/tokens/table.md
    python benchmarks/tokens.py --picture                                  # docs/pictures/token_pruning.png

The data is a folder with `sst2` and `mrpc`, each with {train,dev,test}.tsv.gz: `--data`, or the environment variable
LIGHTNING_COMPRESS_DATA.

Every compressed run starts from the dense weights of its seed and has the same number of steps, learning rate, order of
batches and distillation from the logits of the dense model. They differ in who decides which tokens leave:

    faithful     thresholds learn as published: soft masks after the layer, a fixed strength, then hard
    recommended  thresholds learn towards the MACs, in cumulative soft masks that the next attention sees, then hard
    top_k        no learning: a falling share of the tokens of each example stays, by the scores of the layer
    linear       no learning: thresholds that rise linearly over the layers

MACs are those of the encoder layers on the sentences that accuracy is stated for, with the tokens that really entered
each layer, over the same with all real tokens; padding counts nowhere.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Literal
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# runs side by side must not wait busily for their turn; what is timed alone must, as it does by default
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE" if "--latency" in sys.argv else "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from safetensors.torch import load_file, save_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import side_by_side, sst2  # noqa: E402
from lightning_compress import TokenPruning, apply_plan, logits_kl, make_plan, measure_latency  # noqa: E402
from lightning_compress.token_policies import KeepAll, Thresholds  # noqa: E402
from lightning_compress.token_scores import linear_ramp  # noqa: E402
from lightning_compress.tokens import tap  # noqa: E402
from lightning_compress.tokens.calibration import bisect_shift  # noqa: E402
from lightning_compress.tokens.install import install_tokens, token_runtime  # noqa: E402
from lightning_compress.tokens.proof import prove_tokens  # noqa: E402
from recipes.text_classification import TextClassification, TextData  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "tokens"
RUNS = ROOT / "benchmarks" / "runs" / "tokens"  # weights, logs: ignored by git
PICTURE = ROOT / "docs" / "pictures" / "token_pruning.png"
DATASETS = {"mrpc": "MRPC", "sst2": "SST-2"}
METHODS = ("recommended", "top_k", "linear", "faithful")
MACS = (0.5, 0.35, 0.7)  # in the order in which they are run
SEEDS = (0, 1)
DENSE = {"mrpc": (5, 1e-4), "sst2": (3, 5e-5)}  # epochs and learning rate of the dense models
DENSE_BATCH = 32
STEPS = {"mrpc": 230, "sst2": 432}  # one epoch: optimizer steps of everything but the dense models
LONG = 3  # epochs of `--long`
RATE, BATCH = 1e-4, 16  # their learning rate and batch
ALPHA, TEMPERATURE, POOLED = 0.9, 2.0, 10.0  # weights of the distillation, see `Taught`


@dataclass(frozen=True)
class Run:
    dataset: str
    method: str
    seed: int
    macs: float = 1.0
    epochs: int = 1  # of everything but the dense models

    @property
    def name(self) -> str:
        size = "" if self.method == "dense" else f"-{self.macs:g}"
        length = "" if self.epochs == 1 else f"-{self.epochs}epochs"
        return f"{self.dataset}-{self.method}{size}{length}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        size = [] if self.method == "dense" else ["--macs", f"{self.macs:g}"]
        length = [] if self.epochs == 1 else ["--epochs", str(self.epochs)]
        return ["--dataset", self.dataset, "--method", self.method, *size, *length, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def dense_weights(self) -> Path:
        """Weights of the dense model of this seed: the start and the teacher of the others."""
        return RUNS / f"{Run(self.dataset, 'dense', self.seed).name}.safetensors"


def dense_runs() -> list[Run]:
    return [Run(dataset, "dense", seed) for dataset in DATASETS for seed in SEEDS]


def all_runs() -> list[Run]:
    """The compressed runs; whoever breaks off half-way has both seeds of one target."""
    return [Run(d, method, seed, macs) for macs in MACS for seed in SEEDS for d in DATASETS for method in METHODS]


def long_runs() -> list[Run]:
    """What more training is worth, at one target."""
    return [
        Run(d, m, seed, MACS[0], LONG) for d in ("sst2", "mrpc") for seed in SEEDS for m in ("recommended", "top_k")
    ]


# Data, model, teacher


def text_data(dataset: str, folder: str, seed: int, batch: int = BATCH) -> TextData:
    data = TextData(str(Path(folder) / dataset), sst2.pretrained_folder(), batch_size=batch, seed=seed)
    data.setup()
    return data


class Teacher:
    """What the dense model answers to the training sentences, computed once and kept in a file."""

    def __init__(self, run: Run, data: TextData) -> None:
        path = RUNS / f"{run.dataset}-teacher-seed{run.seed}.safetensors"
        if not path.is_file():
            sst2.save_whole(answers(sst2.new_module(weights=run.dense_weights).model.eval(), data), path)
        self.answers = load_file(str(path))  # logits (examples, labels), pooled (examples, width)
        self.places = {tuple(ids): number for number, (ids, _) in enumerate(data.splits["train"])}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, labels) and pooled states (batch, width)."""
        rows = zip(input_ids, attention_mask, strict=True)
        places = [self.places[tuple(ids[mask.bool()].tolist())] for ids, mask in rows]
        return self.answers["logits"][places], self.answers["pooled"][places]


@contextmanager
def pooled_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """The mean states (batch, width) of every call, before dropout."""
    seen: list[Tensor] = []
    handle = model.dropout.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def answers(model: nn.Module, data: TextData) -> dict[str, Tensor]:
    """Logits and pooled states in the order of the training sentences."""
    order = by_length(data, "train")
    with pooled_states(model) as pooled:
        logits = [model(batch["input_ids"], batch["attention_mask"]).logits for batch in data.loader("train", order)]
    back = torch.tensor(order).argsort()
    return {"logits": torch.cat(logits)[back], "pooled": torch.cat(pooled)[back]}


class Taught(TextClassification):
    """The recipe's module with the loss that every compressed run shares.

    L = (1 - ALPHA) cross entropy + ALPHA T^2 KL(teacher || student) at temperature T
        + POOLED * mean squared difference of the pooled states
    """

    teacher: list[Teacher]  # in a list: no sub-module, neither trained nor saved nor moved

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with pooled_states(self.model) as pooled:
            logits = self.model(ids, mask).logits
        answer, state = self.teacher[0](ids, mask)
        task = nn.functional.cross_entropy(logits, batch["labels"])
        return (
            (1 - ALPHA) * task
            + ALPHA * logits_kl(logits, answer, TEMPERATURE)
            + POOLED * ((pooled[0] - state).square().mean())
        )


def by_length(data: TextData, split: str) -> list[int]:
    return sorted(range(len(data.splits[split])), key=lambda number: len(data.splits[split][number][0]))


# Costs and accuracy


def attention_macs(layer: nn.Module, tokens: Tensor) -> Tensor:
    """MACs of the projections and of the products with all keys, for examples of so many tokens."""
    query, tokens = layer.attention.self.query, tokens.double()
    return 2 * query.out_features * tokens.square() + 4 * query.in_features * query.out_features * tokens


def ffn_macs(layer: nn.Module) -> int:
    """MACs of the FFN for a token."""
    return 2 * layer.intermediate.dense.in_features * layer.intermediate.dense.out_features


def macs_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """MACs of the encoder layers for each example; into the FFN of a layer go the tokens that enter the next layer.

    Args:
        model: the classifier.
        tokens: those that enter each layer, (layers, examples), or (examples,) for all layers.
    """
    layers = list(model.encoder.encoder.layer)
    tokens = tokens.double().expand(len(layers), -1)
    behind = torch.cat([tokens[1:], tokens[-1:]])
    parts = zip(layers, tokens, behind, strict=True)
    return torch.stack([attention_macs(layer, n) + ffn_macs(layer) * went for layer, n, went in parts]).sum(0)


def evaluate(model: nn.Module, data: TextData) -> dict[str, Any]:
    """Accuracy (for pairs, F1 too) in float32 on dev, test and both, and the tokens and MACs that it took."""
    model.eval()
    splits: dict[str, Any] = {}
    every, entering, real = [], [], []
    for name, split in (("dev", "validation"), ("test", "test")):
        order = by_length(data, split)
        chunks = []
        for batch in data.loader(split, order):
            with torch.no_grad():
                logits = model(batch["input_ids"], batch["attention_mask"]).logits
            chunks.append(torch.stack([logits.argmax(-1), batch["labels"]]))
            present, all_real = tokens_of_last_forward(model, batch["attention_mask"])
            entering.append(present)
            real.append(all_real)
        pairs = torch.cat(chunks, 1)  # (2, examples): prediction, label
        every.append(pairs)
        splits[name] = scores_of(pairs)
    entered, whole = torch.cat(entering, 1), torch.cat(real)  # (layers, examples), (examples,)
    macs, dense = macs_of(model, entered), macs_of(model, whole)
    shares = (macs / dense).sort().values
    return {
        "accuracy": splits | {"pooled": scores_of(torch.cat(every, 1))},
        "macs_kept": float(macs.sum() / dense.sum()),
        "macs_kept_of_examples": {f"{q:g}": float(torch.quantile(shares, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "tokens_entering": (entered.double().sum(1) / whole.sum()).tolist(),  # by layer, as a share of the real ones
    }


def scores_of(pairs: Tensor) -> dict[str, float]:
    """Accuracy, and F1 of label 1."""
    predicted, label = pairs
    f1 = 2 * int((predicted * label).sum()) / max(1, int(predicted.sum() + label.sum()))
    return {"accuracy": float((predicted == label).double().mean()), "f1": f1}


def tokens_of_last_forward(model: nn.Module, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that entered each layer (layers, batch), and real tokens (batch,)."""
    real = mask.sum(1)
    runtime = token_runtime(model)
    if runtime is None:
        return real.expand(model.encoder.config.num_hidden_layers, -1), real
    assert runtime.counts is not None and torch.equal(runtime.counts.real.long(), real)
    return runtime.counts.entering.detach(), real


# Runs


SETTINGS: dict[str, dict[str, Any]] = {
    "faithful": {"mode": "faithful", "hard_at": 0.4},
    "recommended": {"hard_at": 0.1},
    "top_k": {"method": "top_k"},
    "linear": {"method": "linear"},
}


def fit(
    module: TextClassification,
    data: TextData,
    callbacks: list[Callback],
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    **length: int,
) -> float:
    """Train for ``max_epochs`` or ``max_steps``; seconds of this process."""
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        **length,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    return time.perf_counter() - start


def train(run: Run, folder: str) -> dict[str, Any]:
    L.seed_everything(run.seed, verbose=False)
    if run.method == "dense":
        data = text_data(run.dataset, folder, run.seed, DENSE_BATCH)
        epochs, rate = DENSE[run.dataset]
        module = sst2.new_module(lr=rate)
        seconds = fit(module, data, [], max_epochs=epochs)
        save_model(module.model, str(run.dense_weights))
        return evaluate(module.model, data) | {"seconds": seconds}
    if not run.dense_weights.is_file():
        raise SystemExit(f"{run.name} starts from dense weights: make {run.dense_weights.name} first (see --help).")
    data = text_data(run.dataset, folder, run.seed)
    module = sst2.new_module(Taught, lr=RATE, weights=run.dense_weights)
    module.teacher = [Teacher(run, data)]
    # half of the weights, and the least to learn; the first layer sees all tokens, so its backward costs the most
    module.model.encoder.embeddings.requires_grad_(False)
    module.model.encoder.encoder.layer[0].requires_grad_(False)
    callback = TokenPruning(macs=run.macs, module="model", **SETTINGS[run.method])
    seconds = fit(module, data, [callback], max_epochs=-1, max_steps=run.epochs * STEPS[run.dataset])
    assert callback.policy is not None
    return evaluate(module.model, data) | {"policy": callback.policy.state(), "seconds": seconds}


def single(run: Run, folder: str) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    settings = {"dataset": run.dataset, "method": run.method, "macs": run.macs, "seed": run.seed, "epochs": run.epochs}
    side_by_side.finish("tokens.py", run, {**settings, "precision": "float32"}, lambda: train(run, folder))


def queue(jobs: int, folder: str, long: bool = False) -> None:
    """Every run without a result, the dense ones first."""
    side_by_side.run_all(__file__, (dense_runs(), long_runs() if long else all_runs()), jobs, folder, RUNS)


# Numbers


def records() -> dict[Run, dict[str, Any]]:
    """The results that are there."""
    runs = dense_runs() + all_runs() + long_runs()
    return {run: json.loads(run.result.read_text()) for run in runs if run.result.is_file()}


def rows() -> Iterator[tuple[Run, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Runs of the first seed, the results of all seeds, and those of the dense models of these seeds."""
    found = records()
    for first in dict.fromkeys(replace(run, seed=SEEDS[0]) for run in found):
        runs = [run for seed in SEEDS if (run := replace(first, seed=seed)) in found]
        yield first, [found[run] for run in runs], [found[Run(first.dataset, "dense", run.seed)] for run in runs]


def percents(found: list[dict[str, Any]], split: str, measure: str = "accuracy") -> list[float]:
    return [100 * record["accuracy"][split][measure] for record in found]


def table() -> None:
    """One row for each method and target, with the seeds side by side; runs that are missing are left out."""
    lines = []
    for dataset, title in DATASETS.items():
        pairs = dataset == "mrpc"
        lines += [
            f"## {title}\n",
            "| method | target | MACs kept, per seed | dev, per seed | test, per seed | dev + test, per seed | mean "
            f"| to dense |{' F1, dev + test | to dense |' if pairs else ''} tokens entering each layer |",
            f"|---|---|---|---|---|---|---|---|{'---|---|' if pairs else ''}---|",
        ]
        order = {method: number for number, method in enumerate(("dense", *METHODS))}
        for run, found, dense in sorted(rows(), key=lambda row: (row[0].epochs, -row[0].macs, order[row[0].method])):
            if run.dataset != dataset:
                continue
            method = run.method
            cells = [
                method if run.epochs == 1 else f"{method}, {run.epochs} epochs",
                "" if method == "dense" else f"{run.macs:g}",
                " / ".join(f"{record['macs_kept']:.3f}" for record in found),
                *(" / ".join(f"{p:.2f}" for p in percents(found, split)) for split in ("dev", "test", "pooled")),
            ]
            for measure in ("accuracy", "f1") if pairs else ("accuracy",):
                value = mean(percents(found, "pooled", measure))
                loss = value - mean(percents(dense, "pooled", measure))
                cells += [f"{value:.2f}", "" if method == "dense" else f"{loss:+.2f}"]
            entering = zip(*(record["tokens_entering"] for record in found), strict=True)
            cells.append(" ".join(f"{mean(layer):.2f}" for layer in entering))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    text = "\n".join(lines + throughput_table())
    (RESULTS / "table.md").write_text(f"`python benchmarks/tokens.py --table`\n\n{text}")
    print(text)


def picture() -> None:
    """Accuracy over relative MACs: means of the seeds as lines, the seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(DATASETS), figsize=(5 * len(DATASETS), 4), layout="constrained")
    colours = dict(zip(METHODS, ("#ff7f0e", "#1f77b4", "#2ca02c", "#9467bd"), strict=True))
    for axis, (dataset, title) in zip(axes, DATASETS.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for run, found, _ in sorted(rows(), key=lambda row: -row[0].macs):
            method = run.method
            if run.dataset != dataset or run.epochs > 1:
                continue
            accuracy, macs = percents(found, "pooled"), [record["macs_kept"] for record in found]
            if method == "dense":
                axis.axhline(mean(accuracy), color="black", linestyle="--", linewidth=1, label="dense")
                continue
            axis.scatter(macs, accuracy, s=12, alpha=0.5, color=colours[method])
            lines.setdefault(method, []).append((mean(macs), mean(accuracy)))
        for method, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", color=colours[method], label=method)
        axis.set(title=title, xlabel="MACs of the encoder layers at real lengths, to dense")
        axis.set_ylabel("accuracy on dev + test, %")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120, metadata={"Software": None})
    print(PICTURE)


# Throughput


Call = dict[str, Tensor]


def cells(data: dict[str, TextData]) -> dict[str, Call]:
    """What throughput is measured on, by name."""
    draw = torch.Generator().manual_seed(0)

    def some(dataset: str, count: int) -> list[list[int]]:
        examples = data[dataset].splits["test"]
        return [examples[i][0] for i in torch.randperm(len(examples), generator=draw)[:count].tolist()]

    def padded(sentences: list[list[int]], length: int = 0) -> Call:
        length = max(length, *map(len, sentences))
        ids, mask = torch.zeros(len(sentences), length, dtype=torch.long), torch.zeros(len(sentences), length).long()
        for row, sentence in enumerate(sentences):
            ids[row, : len(sentence)], mask[row, : len(sentence)] = torch.tensor(sentence), 1
        return {"input_ids": ids, "attention_mask": mask}

    def joined(length: int) -> list[int]:
        """Pairs one after another, cut to the length."""
        return [token for sentence in some("mrpc", length // 10) for token in sentence][:length]

    mix = some("mrpc", 16) + some("sst2", 16)
    pair = next(sentence for sentence in mix if len(sentence) >= 53)
    return {
        "32, MRPC and SST-2, padded to the longest": padded(mix),
        "32, MRPC and SST-2, padded to 128": padded(mix, 128),
        "32 x 128, no padding": padded([joined(128) for _ in range(32)]),
        "8 x 256, no padding": padded([joined(256) for _ in range(8)]),
        "1 x 128": padded([joined(128)]),
        f"1 x {len(pair)}, a pair of MRPC": padded([pair]),
    }


class GivenScores(nn.Module):
    """A model with token pruning that is told the scores that it found before: the same decisions, for nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scores: list[Tensor] = []

    def forward(self, **call: Tensor) -> Any:
        given = iter(self.scores)

        def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            bias, key_bias = options["bias"], options["key_bias"]
            if key_bias is not None:
                wide = key_bias[:, None, None]
                masks = bias is not None and bias.dtype == torch.bool
                bias = wide.masked_fill(~bias, -torch.inf) if masks else wide if bias is None else bias + wide
            output = nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=options["scale"])
            return output, next(given)

        with mock.patch.object(tap, "attention_with_scores", attention):
            return self.model(**call)

    def remember(self, call: Call) -> None:
        """Find the scores of a call."""
        self.scores, found = [], tap.attention_with_scores

        def attention(*args: Any, **options: Any) -> Any:
            output, scores = found(*args, **options)
            self.scores.append(scores)
            return output, scores

        with torch.inference_mode(), mock.patch.object(tap, "attention_with_scores", attention):
            self.model(**call)


class CutBefore(nn.Module):
    """The same layers on as many tokens, which are known before: no scores, no decisions, nothing to put back.

    What is left between its gain and the ratio of MACs is due to smaller matrices, not to token pruning.
    """

    def __init__(self, model: nn.Module, entering: list[int]) -> None:
        super().__init__()
        self.encoder, self.entering = model.encoder, entering  # tokens of a row that enter each layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder.embeddings(input_ids)
        behind = [*self.entering[1:], self.entering[-1]]
        for layer, tokens in zip(self.encoder.encoder.layer, behind, strict=True):
            hidden = layer.attention(hidden)[0][:, :tokens].contiguous()
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return hidden.mean(1)


@torch.inference_mode()
def executed(model: nn.Module, call: Call) -> tuple[float, float, list[float]]:
    """MACs of the layers for the tokens that take part, MACs for all slots that are computed, and slots per row."""
    layers = list(model.encoder.encoder.layer)
    slots: list[list[int]] = [[] for _ in layers]  # rows may be computed in several groups
    through = [0] * len(layers)

    def noted(number: int) -> Any:
        return lambda _, args: slots[number].extend([args[0].shape[1]] * args[0].shape[0])

    def went(number: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            through[number] += args[0].shape[0] * args[0].shape[1]

        return hook

    handles = [layer.attention.self.register_forward_pre_hook(noted(n)) for n, layer in enumerate(layers)]
    handles += [layer.intermediate.dense.register_forward_pre_hook(went(n)) for n, layer in enumerate(layers)]
    model(**call)
    for handle in handles:
        handle.remove()
    entered, _ = tokens_of_last_forward(model, call["attention_mask"])
    computed = sum(float(attention_macs(layer, torch.tensor(n)).sum()) for layer, n in zip(layers, slots, strict=True))
    computed += sum(ffn_macs(layer) * tokens for layer, tokens in zip(layers, through, strict=True))
    return float(macs_of(model, entered).sum()), computed, [mean(rows) for rows in slots]


def with_tokens(model: nn.Module, calls: list[Call], macs: float) -> None:
    """Install thresholds that rise linearly, so high that this fraction of the MACs is left in the calls.

    The first layer lets every token through, as learned thresholds have it at this budget.
    """
    stack = prove_tokens(model, (), {name: tensor[:2] for name, tensor in calls[0].items()})
    ramp = linear_ramp(1.0, len(stack.stack.layers) - 1)
    assert ramp[0] == 0
    runtime = install_tokens(model, stack.runtime(KeepAll()))

    @torch.inference_mode()
    def measured(final: float) -> float:
        runtime.policy = Thresholds(tuple(final * value for value in ramp))
        kept = whole = 0.0
        for call in calls:
            model(**call)
            entered, real = tokens_of_last_forward(model, call["attention_mask"])
            kept, whole = kept + float(macs_of(model, entered).sum()), whole + float(macs_of(model, real).sum())
        return kept / whole

    final, _ = bisect_shift(measured, macs, 0.0, 5.0)
    runtime.policy = Thresholds(tuple(final * value for value in ramp))


def throughput_models(data: dict[str, TextData]) -> dict[str, nn.Module]:
    """The dense model and half of it, each without and with token pruning; time does not depend on weights."""
    calls = [
        {name: tensor for name, tensor in batch.items() if name != "labels"}
        for one in data.values()
        for batch in list(one.val_dataloader())[::4]
    ]
    models: dict[str, nn.Module] = {}
    for name in ("dense", "half"):
        models[name] = sst2.new_module(weights=Run("sst2", "dense", 0).dense_weights).model.eval()
        if name == "half":
            structures = sst2.encoder_structures(models[name])
            plan = make_plan(models[name], structures, macs=0.5, per_layer=True)
            apply_plan(models[name], plan, verify=(sst2.example(), {}))
        models[f"{name}, tokens"] = copy.deepcopy(models[name])
        with_tokens(models[f"{name}, tokens"], calls, macs=0.5)
        models[f"{name}, tokens, scores given"] = GivenScores(models[f"{name}, tokens"])
    return models


def latency(folder: str, threads: int, cpu_time: bool = False, rounds: int = 41, seconds: float = 20.0) -> None:
    """Time of the models in every cell, interleaved."""
    torch.set_num_threads(threads)
    data = {name: text_data(name, folder, 0, 32) for name in DATASETS}
    models = throughput_models(data)
    clock = time.process_time if cpu_time else time.perf_counter
    measured: dict[str, Any] = {}
    for cell, call in cells(data).items():
        for model in models.values():
            if isinstance(model, GivenScores):
                model.remember(call)
        cut: dict[str, nn.Module] = {}
        if bool(call["attention_mask"].all()):  # where rows differ in length there is no one cut
            for name in ("dense", "half"):
                entering = executed(models[f"{name}, tokens"], call)[2]
                cut[f"{name}, cut"] = CutBefore(models[name], [round(slots) for slots in entering])
        times = measure_latency(models | cut, (), call, repeats=rounds, max_seconds=seconds, clock=clock)
        dense_real, dense_slots, _ = executed(models["dense"], call)
        measured[cell] = {}
        for name in ("dense", "half"):
            without, pruned, given = (times[f"{name}{kind}"] for kind in ("", ", tokens", ", tokens, scores given"))
            base_real, base_slots, before = executed(models[name], call)
            real, computed, slots = executed(models[f"{name}, tokens"], call)
            gain = without.seconds / pruned.seconds
            measured[cell][name] = {
                "ms": {
                    "without": 1e3 * without.seconds,
                    "tokens": 1e3 * pruned.seconds,
                    "tokens_scores_given": 1e3 * given.seconds,
                    **({"cut_before": 1e3 * times[f"{name}, cut"].seconds} if cut else {}),
                },
                "spread": {"without": without.spread, "tokens": pruned.spread},
                "rounds": pruned.runs,
                "gain": gain,
                "macs_ratio_executed": base_slots / computed,
                "macs_ratio_real": base_real / real,
                "gain_to_executed": gain * computed / base_slots,
                "gain_to_real": gain * real / base_real,
                "score_share": 1 - given.seconds / pruned.seconds,
                "gain_to_dense": times["dense"].seconds / pruned.seconds,
                "macs_ratio_executed_to_dense": dense_slots / computed,
                "macs_ratio_real_to_dense": dense_real / real,
                "slots": {"without": before, "tokens": slots},
            }
            print(cell, name, json.dumps(measured[cell][name]), flush=True)
    record = {
        "command": f"python benchmarks/tokens.py --latency --threads {threads}{' --cpu-time' if cpu_time else ''}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "cells": measured,
    }
    (RESULTS / "latency.json").write_text(json.dumps(record, indent=2) + "\n")


def throughput_table() -> list[str]:
    """Lines of the table of what `latency` measured."""
    path = RESULTS / "latency.json"
    if not path.is_file():
        return []
    lines = [
        "## Throughput\n",
        "| batch | model | ms | with tokens pruned, ms | gain | MACs executed, ratio | gain / ratio "
        "| MACs at real lengths, ratio | gain / ratio | tokens cut before, gain / ratio | share of the scores "
        "| gain to dense | executed, to dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, models in json.loads(path.read_text())["cells"].items():
        for name, found in models.items():
            before = found["ms"].get("cut_before")
            cells = [
                cell,
                name,
                *(f"{found['ms'][kind]:.1f}" for kind in ("without", "tokens")),
                f"{found['gain']:.2f}x",
                f"{found['macs_ratio_executed']:.2f}",
                f"{found['gain_to_executed']:.2f}",
                f"{found['macs_ratio_real']:.2f}",
                f"{found['gain_to_real']:.2f}",
                f"{found['ms']['without'] / before / found['macs_ratio_real']:.2f}" if before else "",
                f"{100 * found['score_share']:.1f} %",
                f"{found['gain_to_dense']:.2f}x",
                f"{found['macs_ratio_executed_to_dense']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser, what = side_by_side.parser(__doc__, "--method", ("dense", *METHODS))
    what.add_argument("--long", action="store_true", help=f"the same for some runs of {LONG} epochs")
    what.add_argument("--picture", action="store_true", help="draw accuracy over MACs; needs matplotlib")
    parser.add_argument("--dataset", choices=tuple(DATASETS), default="sst2")
    parser.add_argument("--macs", type=float, choices=MACS, help="target: kept fraction of the MACs of the layers")
    parser.add_argument("--epochs", type=int, default=1, help="of the compressed run")
    parser.add_argument("--cpu-time", action="store_true", help="--latency counts what the process takes itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.all or arguments.long:
        queue(arguments.jobs, arguments.data, arguments.long)
    elif arguments.latency:
        latency(arguments.data, arguments.threads, arguments.cpu_time)
    elif arguments.table:
        table()
    elif arguments.picture:
        picture()
    elif arguments.method != "dense" and arguments.macs is None:
        parser.error(f"--method {arguments.method} needs --macs")
    else:
        run = Run(arguments.dataset, arguments.method, arguments.seed, arguments.macs or 1.0, arguments.epochs)
        single(run, arguments.data)


if __name__ == "__main__":
    main()
