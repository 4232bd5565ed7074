"""English to German with the original Transformer: pruning as TPrune, quantization, and what dies block by block.

    python benchmarks/translation.py --variant dense                     # one run; skipped when its result is there
    python benchmarks/translation.py --variant ssl-fine-20 --seed 1      # needs the dense run of the same seed
    python benchmarks/translation.py --all --jobs 2                      # everything that is missing
    python benchmarks/translation.py --all --study tprune --size base    # one study, in the size of the paper
    python benchmarks/translation.py --estimate                          # what is missing, and how long it would take
    python benchmarks/translation.py --latency                           # of what is there; wants an idle machine
    python benchmarks/translation.py --table                             # benchmarks/results/translation/table.md

The data is a folder with `multi30k/train.en.gz`, `train.de.gz`, `val.*`, `test_2016_flickr.*` and `test_2017_flickr.*`:
`--data`, or the environment variable LIGHTNING_COMPRESS_DATA. An interrupted run goes on from its last epoch.

All runs but `dense` start from the dense weights of their seed and have the same epochs, order of batches and learning
rate, which falls from where the dense training ended to zero. So does `longer`, in which nothing is compressed: it is
what the others have to be compared with, since a falling learning rate alone raises BLEU. What a variant does, say
`--help` and benchmarks/translation_variants.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# runs side by side must not wait busily for their turn; what is timed alone must, as it does by default
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE" if "--latency" in sys.argv else "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from safetensors.torch import load_model, save_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import side_by_side, translation_variants  # noqa: E402
from benchmarks.significance import TRIALS, significance  # noqa: E402
from benchmarks.translation_variants import FFN_FLOORS, VARIANTS, Variant  # noqa: E402
from lightning_compress import (  # noqa: E402
    Distillation,
    FinalizeCompression,
    PruningPlan,
    QuantizationAwareTraining,
    StructuredSparsity,
    apply_plan,
    convert,
    discover,
    measure_latency,
    save_compressed,
)
from lightning_compress.budget import cost_polynomial  # noqa: E402
from lightning_compress.quantizers.binary import SCALE_FREE_LOGITS  # noqa: E402
from lightning_compress.regularizers.blocks import block_line_norms  # noqa: E402
from lightning_compress.surgery.attention import slim_  # noqa: E402
from recipes.translation import (  # noqa: E402
    BEGIN,
    PAD,
    SIZES,
    CachedDecoder,
    ParallelText,
    Translation,
    TranslationModel,
    causal,
    noam,
)

RESULTS = ROOT / "benchmarks" / "results" / "translation"
RUNS = ROOT / "benchmarks" / "runs" / "translation"  # checkpoints, weights, logs: ignored by git
SEEDS = (0, 1)
REPEATED = (
    *("longer", "ssl-coarse-20-taylor", "ssl-coarse-45-taylor", "units-20", "units-45", "heads-units-20"),
    *("stochastic4-attention", "stochastic2-attention-early", "stochastic1-attention-early"),
)
TESTS = ("test_2016_flickr", "test_2017_flickr")
VOCABULARY = 6000
STUDIES = ("dense", "tprune", "quantization", "bssl")
BLOCKS = {"square": lambda head, width: (head, head), "slab": lambda head, width: (head, width)}  # of Q, K and V
GRIDS = {"out_proj": (2, 2), "linear1": (8, 2), "linear2": (2, 8)}  # (out, in) numbers of blocks
DEAD = 1e-4  # a line is dead whose elements are smaller than this (root of the mean square)
TOKENS = 16  # of source and target, at which MACs are stated; a sentence of Multi30k has about 16
LENGTHS = (8, 16, 32, 64)  # at which latency is measured
REMOVED_AT = 0.4  # of the fit


@dataclass(frozen=True)
class Schedule:
    """How long runs of a size are: epochs of the dense model, its warm-up, tokens of a batch, epochs of the others."""

    dense_epochs: int
    warmup: int
    batch_tokens: int
    epochs: int

    def steps(self, batches: int, dense: bool) -> int:
        return batches * (self.dense_epochs if dense else self.epochs)


SCHEDULES = {
    "tiny": Schedule(10, 500, 2048, 3),
    "small": Schedule(18, 1000, 2048, 3),
    "base": Schedule(30, 2000, 4096, 6),
}


@dataclass(frozen=True)
class Run:
    variant: str
    seed: int = 0
    size: str = "small"

    @property
    def name(self) -> str:
        return f"{self.size}-{self.variant}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        return ["--variant", self.variant, "--size", self.size, "--seed", str(self.seed)]

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def weights(self) -> Path:
        return RUNS / f"{self.name}.safetensors"

    @property
    def maps(self) -> Path:
        return RESULTS / "maps" / f"{self.name}.npz"

    @property
    def dense(self) -> Run:
        return Run("dense", self.seed, self.size)

    @property
    def reference(self) -> Run:
        return Run("longer", self.seed, self.size)

    @property
    def translations(self) -> Path:
        return RUNS / f"{self.name}.translations.json"

    @property
    def settings(self) -> Variant:
        return VARIANTS[self.variant]


def all_runs(size: str, studies: tuple[str, ...] = STUDIES) -> list[Run]:
    """Without the dense runs themselves, which come first whatever is asked for.

    All with the first seed; those that say how much seeds differ come last, with the others.
    """
    wanted = [name for name, v in VARIANTS.items() if name != "dense" and v.study in (*studies, "dense")]
    runs = [Run(name, SEEDS[0], size) for name in wanted]
    return runs + [Run(name, seed, size) for name in wanted if name in REPEATED for seed in SEEDS[1:]]


# Model, data, costs


def parallel_text(folder: str, size: str, seed: int) -> ParallelText:
    data = ParallelText(
        str(Path(folder) / "multi30k"),
        vocabulary=VOCABULARY,
        tokenizers=str(RUNS / "tokenizers"),
        batch_tokens=SCHEDULES[size].batch_tokens,
        seed=seed,
    )
    data.setup()
    missing = set(TESTS) - set(data.tests)
    if missing:
        raise SystemExit(f"Expected the test sets {list(TESTS)} in {data.hparams.dataset}, but got {data.tests}.")
    for name in set(data.tests) - set(TESTS):
        del data.texts[name], data.splits[name]
    return data


def example(length: int = TOKENS, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source and target ids of a batch without padding, and the masks that say so."""
    ids = torch.randint(3, 259, (2, batch, length), generator=torch.Generator().manual_seed(0))
    ids[1, :, 0] = BEGIN
    return ids[0], ids[1], ids[0].eq(PAD), ids[1].eq(PAD)


class Continued(Translation):
    """From where the dense training ended: its last learning rate, after a short warm-up falling to zero."""

    peak = 1e-3

    def rate(self, step: int) -> float:
        total = int(self.trainer.estimated_stepping_batches)
        return self.peak * max(0.0, min(step / 50, (total + 1 - step) / total))


def new_module(run: Run, steps: int = 0, weights: bool = True) -> Translation:
    """The dense module of the recipe, or, for all other runs, one that goes on with the dense weights."""
    schedule = SCHEDULES[run.size]
    if run.variant == "dense":
        return Translation(VOCABULARY, run.size, warmup=schedule.warmup)
    module = Continued(VOCABULARY, run.size)
    module.peak = noam(max(1, steps), SIZES[run.size].width, schedule.warmup)
    if weights:
        load_model(module.model, str(run.dense.weights))
    if run.settings.scale_free:
        for attention in (m for m in module.modules() if isinstance(m, nn.MultiheadAttention)):
            slim_(attention)
            attention.scale = 1 / (SCALE_FREE_LOGITS * attention.head_dim)
    return module


def matrix_weights(model: TranslationModel) -> int:
    """Weights of the prunable matrices: those of attention and feed-forward parts of encoder and decoder."""
    return sum(p.numel() for p in model.transformer.parameters() if p.dim() > 1)


def macs_of(model: TranslationModel, source: int = TOKENS, target: int = TOKENS) -> int:
    """MACs of encoder and decoder for a sentence, without embeddings and output layer.

    They are those of all positions at once, as in training; search with caches computes as much, step by step.
    """

    def attention(a: nn.MultiheadAttention, queries: int, keys: int) -> int:
        qk = a.num_heads * getattr(a, "qk_head_dim", a.head_dim)
        vo = a.num_heads * getattr(a, "vo_head_dim", a.head_dim)
        width = a.in_proj_weight.shape[1]
        return queries * width * (qk + vo) + keys * width * (qk + vo) + queries * keys * (qk + vo)

    def feed_forward(layer: nn.Module, tokens: int) -> int:
        return tokens * (layer.linear1.weight.numel() + layer.linear2.weight.numel())

    total = 0
    for layer in model.transformer.encoder.layers:
        total += attention(layer.self_attn, source, source) + feed_forward(layer, source)
    for layer in model.transformer.decoder.layers:
        total += attention(layer.self_attn, target, target) + attention(layer.multihead_attn, target, source)
        total += feed_forward(layer, target)
    return total


# What the runs do


def pruning(run: Run, model: TranslationModel) -> list[Callback]:
    """Sparsify from the first step, then remove; the target counts weights of all prunable matrices."""
    variant, size = run.settings, SIZES[run.size]
    if variant.strategy == "heads":
        structures = discover(model, example(), kinds=("head", "ffn"))
        polynomial = cost_polynomial(structures, "params")
        heads = cost_polynomial(structures.of_kind("head"), "params")
        whole, own = polynomial.evaluate(structures.counts), heads.evaluate(structures.counts)
        sparsity = StructuredSparsity(
            variant.regularizer, ("head",), importance=variant.importance, start=0.0, module="model"
        )
        kept = 1 - variant.sparsity / 100 * whole / own
        return [sparsity, FinalizeCompression(params=kept, at=REMOVED_AT, report=False, module="model")]
    if variant.strategy in ("units", "heads-units"):
        kept = 1 - variant.sparsity / 100
        floor = int(FFN_FLOORS[variant.sparsity] * size.ffn) if variant.strategy == "heads-units" else 1
        return [
            StructuredSparsity(
                variant.regularizer, ("head", "ffn"), importance=variant.importance, start=0.0, module="model"
            ),
            FinalizeCompression(params=kept, at=REMOVED_AT, min_units={"ffn": floor}, report=False, module="model"),
        ]
    untouched: dict[str, int] = {}
    if variant.strategy == "fine":  # in the decoder queries and keys are all that becomes narrower
        for number in range(size.layers):
            layer = f"transformer.decoder.layers.{number}"
            head = size.width // size.heads
            untouched |= {f"{layer}.ffn": size.ffn}
            untouched |= {f"{layer}.{name}.vo_dim": head for name in ("self_attn", "multihead_attn")}
    sparsity = StructuredSparsity(
        variant.regularizer,
        mode=variant.mode,
        strength="auto" if variant.strength is None else variant.strength,
        importance=variant.importance,
        strategy=variant.strategy,
        decoder="transformer.decoder",
        start=0.0,
        module="model",
    )
    finalize = FinalizeCompression(
        params=1 - variant.sparsity / 100, at=REMOVED_AT, min_units=untouched or 1, report=False, module="model"
    )
    return [sparsity, finalize]


def blocks_of(run: Run, name: str) -> dict[str, tuple[int, int]]:
    """Arguments that say the blocks of a matrix by the last part of the name of its module."""
    size = SIZES[run.size]
    if name in GRIDS:
        return {"block_grid": GRIDS[name]}
    return {"block_shape": BLOCKS[run.settings.block](size.width // size.heads, size.width)}


def block_lasso(run: Run) -> list[Callback]:
    return [
        StructuredSparsity(
            "block_group_lasso",
            mode=run.settings.mode,
            strength=run.settings.strength,
            modules=f"transformer.*{name}",
            start=0.0,
            module="model",
            **blocks_of(run, name),
        )
        for name in ("attn", *GRIDS)
    ]


def teacher_of(run: Run) -> TranslationModel | None:
    """The model of the finished run that teaches."""
    if not run.settings.teacher:
        return None
    model = TranslationModel(VOCABULARY, SIZES[run.size])
    load_model(model, str(Run(run.settings.teacher, run.seed, run.size).weights))
    return model


def callbacks_of(run: Run, module: Translation) -> list[Callback]:
    variant = run.settings
    made: list[Callback] = []
    if variant.study == "tprune":
        made += pruning(run, module.model)
    elif variant.study == "quantization":
        made.append(QuantizationAwareTraining(module="model", **variant.quantization))
    elif variant.study == "bssl":
        made += block_lasso(run)
    if variant.distillation:
        made.append(Distillation(alpha=variant.distillation, temperature=1.0, teacher=teacher_of(run), module="model"))
    return made


def matrices(model: TranslationModel) -> dict[str, tuple[str, Tensor]]:
    """Prunable matrices by name, packed ones apart, each with the last part of the name of its module."""
    found: dict[str, tuple[str, Tensor]] = {}
    for name, weight in model.transformer.named_parameters():
        if weight.dim() < 2:
            continue
        path = name.rpartition(".")[0]
        if name.endswith("in_proj_weight"):
            for part, piece in zip(("query", "key", "value"), weight.detach().chunk(3), strict=True):
                found[f"{path}.{part}"] = "attn", piece
        else:
            found[path] = path.rpartition(".")[2], weight.detach()
    return found


def living_lines(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows (out_features, blocks along in) and columns (blocks along out, in_features) are alive, by norms."""
    # elements of a line in a block: its width in a row, its height in a column
    width, height = columns.shape[1] / rows.shape[1], rows.shape[0] / columns.shape[0]
    return rows >= DEAD * width**0.5, columns >= DEAD * height**0.5


def save_maps(run: Run, model: TranslationModel) -> dict[str, Any]:
    """Write the norms of rows and columns of all blocks; shares of dead lines by matrix.

    `NAME.rows` is (out_features, blocks along in), `NAME.columns` is (blocks along out, in_features).
    """
    arrays: dict[str, Any] = {}
    dead: dict[str, Any] = {}
    for name, (kind, weight) in matrices(model).items():
        rows, columns = block_line_norms(weight.float().cpu(), **blocks_of(run, kind))
        arrays |= {f"{name}.rows": rows.half().numpy(), f"{name}.columns": columns.half().numpy()}
        gone_rows, gone_columns = (~lines for lines in living_lines(rows, columns))
        dead[name] = {
            "rows": float(gone_rows.double().mean()),  # of blocks
            "columns": float(gone_columns.double().mean()),
            "output_units": float(gone_rows.all(1).double().mean()),  # of the whole matrix
            "input_units": float(gone_columns.all(0).double().mean()),
        }
    run.maps.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(run.maps, **arrays)
    return {"dead": dead, "maps": f"maps/{run.maps.name}"}


def file_bytes(model: nn.Module) -> int:
    """Bytes of the weights on disk."""
    with tempfile.TemporaryDirectory() as folder:
        save_compressed(model, Path(folder) / "model")
        return (Path(folder) / "model" / "model.safetensors").stat().st_size


def fit(run: Run, module: Translation, data: ParallelText, callbacks: list[Callback], epochs: int) -> dict[str, float]:
    """Train, from the last checkpoint if there is one; seconds and steps of this process."""
    folder = RUNS / run.name
    checkpoint = ModelCheckpoint(dirpath=folder, filename="epoch", save_last=True, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_epochs=epochs,
        callbacks=[*callbacks, checkpoint],
        logger=CSVLogger(RUNS, name=run.name),
        num_sanity_val_steps=0,
        limit_val_batches=None if run.variant == "dense" else 0,  # BLEU of the others is measured at their end
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    last = folder / "last.ckpt"
    before = 0
    if last.is_file():
        before = torch.load(last, map_location="cpu", weights_only=False)["global_step"]
    start = time.perf_counter()
    trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None, weights_only=False)
    seconds = time.perf_counter() - start
    steps = trainer.global_step
    return {"seconds": seconds, "steps": steps, "seconds_per_step": seconds / max(1, steps - before)}


class Noted(Callback):
    """Keeps the translations of the test sets with their references, in an order that is the same in all runs."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[str, str]]] = {name: [] for name in TESTS}

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        name = trainer.datamodule.tests[dataloader_idx]
        self.pairs[name] += zip(outputs["translations"], batch["references"], strict=True)


def compared(run: Run, pairs: dict[str, list[tuple[str, str]]]) -> dict[str, dict[str, float]]:
    """Write down the translations; how significant their differences to those of the reference are, if it is there."""
    run.translations.write_text(json.dumps({name: [said for said, _ in rows] for name, rows in pairs.items()}))
    if run == run.reference or not run.reference.translations.is_file():
        return {}
    other = json.loads(run.reference.translations.read_text())
    return {
        name: significance([said for said, _ in rows], other[name], [text for _, text in rows])
        for name, rows in pairs.items()
    }


def evaluate(run: Run, module: Translation, data: ParallelText) -> dict[str, Any]:
    """BLEU in float32: greedy on the validation set, with beams on the test sets."""
    noted = Noted()
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        callbacks=[noted],
        logger=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    trainer.validate(module, data, verbose=False)
    found = {"val": float(trainer.callback_metrics["val_bleu"])}
    trainer.test(module, data, verbose=False)
    found |= {name: float(trainer.callback_metrics[f"{name}_bleu"]) for name in TESTS}
    return {"bleu": found, "to_reference": compared(run, noted.pairs)}


def train(run: Run, folder: str) -> dict[str, Any]:
    L.seed_everything(run.seed, verbose=False)
    dense, schedule = run.variant == "dense", SCHEDULES[run.size]
    if not dense and not run.dense.weights.is_file():
        raise SystemExit(
            f"{run.name} starts from the dense weights: run "
            f"`--variant dense --size {run.size} --seed {run.seed}` first."
        )
    teacher = run.settings.teacher
    if teacher and not Run(teacher, run.seed, run.size).weights.is_file():
        raise SystemExit(
            f"{run.name} learns from the weights of {teacher}: run "
            f"`--variant {teacher} --size {run.size} --seed {run.seed}` first."
        )
    data = parallel_text(folder, run.size, run.seed)
    batches = len(data.train_dataloader())
    module = new_module(run, schedule.steps(batches, dense=True))
    whole, macs = matrix_weights(module.model), macs_of(module.model)
    callbacks = callbacks_of(run, module)
    record: dict[str, Any] = fit(run, module, data, callbacks, schedule.dense_epochs if dense else schedule.epochs)
    if torch.cuda.is_available():
        record["machine"] = torch.cuda.get_device_name()
    module.cpu()
    if run.settings.study == "quantization":
        convert(module.model.eval(), "unpacked")
    else:
        save_model(module.model, str(run.weights))
        record["sparsity"] = 1 - matrix_weights(module.model) / whole
        record["macs"], record["macs_kept"] = macs_of(module.model), macs_of(module.model) / macs
    record["bytes"] = file_bytes(module.model)
    for finalize in (c for c in callbacks if isinstance(c, FinalizeCompression)):
        assert finalize.plan is not None
        record["kept"] = {name: len(units) for name, units in finalize.plan.kept.items()}
        errors = [max(r.error or 0.0, r.perturbed_error or 0.0) for r in finalize.surgery_reports]
        record["verification_error"] = max(errors, default=None)  # None: removed before an interruption
    if run.settings.study == "bssl":
        record |= save_maps(run, module.model)
    return evaluate(run, module, data) | record


def single(run: Run, folder: str) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    settings = {
        "size": run.size,
        "variant": run.variant,
        "seed": run.seed,
        "precision": "training in bfloat16 (mixed), evaluation in float32",
        "schedule": {n: v for n, v in vars(SCHEDULES[run.size]).items() if run.variant != "dense" or n != "epochs"},
    }
    side_by_side.finish("translation.py", run, settings, lambda: train(run, folder), headline="bleu")
    for checkpoint in (RUNS / run.name).glob("*.ckpt"):  # the weights are kept; a finished run is never resumed
        checkpoint.unlink()


# Time


BATCHES = 450 * 2048  # tokens of an epoch of Multi30k, padding included
CPU = 50e9  # multiply-adds count twice; of one core, mixed with bfloat16, everything included


def seconds_of(run: Run) -> float:
    """About how long a run takes on one core, or as its dense run was measured."""
    schedule, size = SCHEDULES[run.size], SIZES[run.size]
    steps = schedule.steps(BATCHES // schedule.batch_tokens, run.variant == "dense")
    if run.dense.result.is_file():
        per_step = json.loads(run.dense.result.read_text())["seconds_per_step"]
    else:
        inner = 4 * size.width * size.width, 2 * size.width * size.ffn
        encoder = size.layers * sum(inner)
        decoder = size.layers * (2 * inner[0] + inner[1]) + VOCABULARY * size.width
        per_step = 6 * schedule.batch_tokens / 2 * (encoder + decoder) / CPU
    return steps * per_step * (1.35 if run.settings.distillation else 1.1)


def estimate(dense: list[Run], runs: list[Run], jobs: int) -> None:
    """Print what is missing, and about how long it takes; the dense runs come first."""
    left = [[run for run in stage if not run.result.is_file()] for stage in (dense, runs)]
    seconds = sum(sum(map(seconds_of, stage)) / min(jobs, len(stage)) for stage in left if stage)
    measured = all(run.result.is_file() for run in dense)
    how = "if all are as fast as the dense run" if measured else f"on cores that make {CPU / 1e9:.0f} GFLOP/s each"
    missing = f"{sum(map(len, left))} of {len(dense) + len(runs)} runs are missing"
    print(f"{missing}: about {seconds / 3600:.1f} hours, {jobs} at a time, {how}.")


def queue(jobs: int, folder: str, size: str, studies: tuple[str, ...]) -> None:
    dense = [Run("dense", seed, size) for seed in SEEDS]
    runs = all_runs(size, studies)
    estimate(dense, runs, jobs)
    references = [run for run in runs if run == run.reference]
    side_by_side.run_all(__file__, (dense, references, runs), jobs, folder, RUNS)


# Latency


class Core(nn.Module):
    """Encoder and decoder on all tokens at once."""

    def __init__(self, model: TranslationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor) -> Tensor:
        embedded = self.model.embed(self.model.target, target)
        memory = self.model.encode(source, source_padding)
        return self.model.transformer.decoder(embedded, memory, tgt_mask=causal(target), tgt_is_causal=True)


class Translate(Core):
    """Greedy search with cached keys and values for as many tokens as the target has, whatever they are."""

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor) -> Tensor:
        decoder = CachedDecoder(self.model, self.model.encode(source, source_padding), source_padding, 1)
        tokens = target[:, None, :1]
        for _ in range(target.shape[1]):
            tokens = torch.cat([tokens, decoder.logits(tokens).argmax(-1, keepdim=True)], -1)
        return tokens


def of_its_size(run: Run) -> TranslationModel:
    """A model of the shape of a finished run, in evaluation mode, with other weights: time does not depend on them."""
    model = TranslationModel(VOCABULARY, SIZES[run.size]).eval()
    counts = json.loads(run.result.read_text()).get("kept", {})
    if counts:
        kinds = tuple(dict.fromkeys(name.rpartition(".")[2] for name in counts))
        structures = [s for s in discover(model, example(), kinds=kinds) if s.name in counts]
        kept = {name: range(count) for name, count in counts.items()}
        apply_plan(model, PruningPlan.of(model, structures, kept), verify=(example(), {}))
    return model


def latency(size: str, threads: int, repeats: int = 31, seconds: float = 60.0) -> None:
    """Medians of interleaved runs of every finished model that lost units, and of the dense one, at each length."""
    torch.set_num_threads(threads)
    runs = [Run("dense", SEEDS[0], size)]
    runs += [run for run in all_runs(size, ("tprune",)) if run.seed == SEEDS[0] and run.settings.study == "tprune"]
    models = {run.variant: of_its_size(run) for run in runs if run.result.is_file()}
    if "dense" not in models:
        raise SystemExit("Expected a finished dense run: python benchmarks/translation.py --variant dense first.")
    cells: dict[str, Any] = {}
    load = os.getloadavg()[0]
    for kind in (Core, Translate):
        wrapped = {name: kind(model) for name, model in models.items()}
        for batch in (1, 32):
            for length in LENGTHS:
                call = example(length, batch)
                times = measure_latency(wrapped, call, repeats=repeats, max_seconds=seconds)
                cell = f"{kind.__name__.lower()}, {batch} x {length}"
                cells[cell] = {
                    name: {"ms": 1e3 * t.seconds, "speedup": times["dense"].seconds / t.seconds, "spread": t.spread}
                    for name, t in times.items()
                }
                print(cell, {name: round(v["speedup"], 2) for name, v in cells[cell].items()}, flush=True)
    record = {
        "command": f"python benchmarks/translation.py --latency --size {size} --threads {threads}",
        "machine": side_by_side.machine(),
        "load_average_before": round(load, 1),
        "threads": threads,
        "cells": cells,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{size}-latency.json").write_text(json.dumps(record, indent=2) + "\n")


# Numbers


def records(size: str) -> dict[Run, dict[str, Any]]:
    """The results that are there."""
    runs = [*(Run("dense", seed, size) for seed in SEEDS), *all_runs(size)]
    return {run: json.loads(run.result.read_text()) for run in runs if run.result.is_file()}


def found_of(found: dict[Run, dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    return [record for run, record in found.items() if run.variant == variant]


def bleu_cells(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[str]:
    """BLEU on each test set, its mean to that of the reference, and in percent; seeds side by side.

    Each row is compared with the reference of its own seed, which started from the same weights.
    """
    cells = [" / ".join(f"{row['bleu'][name]:.2f}" for row in rows) for name in TESTS]

    def average(record: dict[str, Any]) -> float:
        return mean(record["bleu"][name] for name in TESTS)

    whole = {record["seed"]: average(record) for record in reference}
    pairs = [(average(row), whole[row["seed"]]) for row in rows if row["seed"] in whole]
    absolute = " / ".join(f"{bleu - dense:+.2f}" for bleu, dense in pairs)
    percent = " / ".join(f"{100 * (bleu / max(1e-9, dense) - 1):+.1f} %" for bleu, dense in pairs)
    found = [row.get("to_reference") for row in rows]  # none where the reference kept no translations
    chances = [", ".join(f"{one[name]['p']:.2g}" for name in TESTS) if one else "-" for one in found]
    return [*cells, absolute, percent, " / ".join(chances) if any(found) else ""]


def table(size: str) -> None:
    """TPrune's table, that of quantization and the dead lines of BSSL; runs that are missing are left out."""
    found = records(size)
    timing = RESULTS / f"{size}-latency.json"
    cells = json.loads(timing.read_text())["cells"] if timing.is_file() else {}
    reference = found_of(found, "longer")
    head = f"{' | '.join(f'BLEU {name}' for name in TESTS)} | to longer | in percent | p"
    lines = [
        f"Size {size}; `longer` is the dense model trained on for as long as the others. Seeds are side by side.\n",
        "p, for each test set: how probable so large a difference to `longer` is if both translate equally well",
        f"(approximate randomization, {TRIALS} trials; empty where a run kept no translations).\n",
        "## Structured pruning\n",
        f"| variant | {head} | sparsity | MACs kept | {''.join(f'{cell} | ' for cell in cells)}verification error |",
        f"|---|---|---|---|---|---|---|---|{'---|' * len(cells)}---|",
    ]
    for variant in (name for name, v in VARIANTS.items() if v.study in ("dense", "tprune")):
        rows = found_of(found, variant)
        if not rows:
            continue
        errors = [row["verification_error"] for row in rows if row.get("verification_error") is not None]
        speed = [f"{cell[variant]['speedup']:.2f}x" if variant in cell else "" for cell in cells.values()]
        row = [
            variant,
            *bleu_cells(rows, reference),
            f"{100 * mean(row['sparsity'] for row in rows):.1f} %",
            f"{mean(row['macs_kept'] for row in rows):.3f}",
            *speed,
            f"{max(errors):.0e}" if errors else "",
        ]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["\n## Quantization\n", f"| variant | {head} | megabytes |", "|---|---|---|---|---|---|---|"]
    for variant in (name for name, v in VARIANTS.items() if v.study in ("dense", "quantization")):
        if rows := found_of(found, variant):
            size_cell = f"{mean(row['bytes'] for row in rows) / 1e6:.2f}"
            lines.append(f"| {' | '.join([variant, *bleu_cells(rows, reference), size_cell])} |")
    lines += [
        "\n## Dead lines under the block-wise group lasso\n",
        "Percent of the rows and columns of blocks, means of the layers.\n",
        f"| variant | {head} | matrix | rows, encoder | columns, encoder | rows, decoder | columns, decoder |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in (name for name, v in VARIANTS.items() if v.study == "bssl"):
        rows = found_of(found, variant)
        kinds = dict.fromkeys(name.split(".layers.")[1].partition(".")[2] for row in rows for name in row["dead"])
        for number, kind in enumerate(kinds):
            shares = []
            for stack in ("encoder", "decoder"):
                layers = [
                    lines_of
                    for row in rows
                    for name, lines_of in row["dead"].items()
                    if name.startswith(f"{stack}.") and name.endswith(f".{kind}")
                ]
                for which in ("rows", "columns"):
                    shares.append(f"{100 * mean(layer[which] for layer in layers):.1f}" if layers else "")
            first = [variant, *bleu_cells(rows, reference)] if not number else [""] * 6
            lines.append(f"| {' | '.join([*first, kind, *shares])} |")
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "table.md" if size == "small" else f"{size}-table.md"
    (RESULTS / name).write_text(f"`python benchmarks/translation.py --table --size {size}`\n\n{text}")
    print(text)


def main() -> None:
    parser, what = side_by_side.parser(
        f"{__doc__}\n{translation_variants.__doc__}", "--variant", tuple(VARIANTS), threads=1
    )
    what.add_argument("--estimate", action="store_true", help="what is missing, and about how long it takes")
    parser.add_argument("--study", choices=STUDIES[1:], action="append", help="only this one; more than once for more")
    parser.add_argument("--size", choices=tuple(SCHEDULES), default="small")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    studies = tuple(arguments.study or STUDIES)
    if arguments.all:
        queue(arguments.jobs, arguments.data, arguments.size, studies)
    elif arguments.estimate:
        dense = [Run("dense", seed, arguments.size) for seed in SEEDS]
        estimate(dense, all_runs(arguments.size, studies), arguments.jobs)
    elif arguments.latency:
        latency(arguments.size, arguments.threads)
    elif arguments.table:
        table(arguments.size)
    else:
        single(Run(arguments.variant, arguments.seed, arguments.size), arguments.data)


if __name__ == "__main__":
    main()
