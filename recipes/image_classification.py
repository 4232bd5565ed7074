"""Train a vision transformer twice from the same seed, densely and with compression in the fit, and compare the two.

    python recipes/image_classification.py            # `make demo`: scikit-learn's digits, from scratch
    python recipes/image_classification.py --check    # the same, with exit status 1 if a bound of `compare` is missed

Expected, with seed 0 (another processor rounds differently, and another seed moves the accuracies by a few tenths):

                               dense  compressed
    test accuracy, %           98.52       98.15   0.37 points lost
    MACs of an image, M        12.86        4.13   3.12x less
    ms for a batch of 64       12.73        5.98   2.13x less
    error of the removal                   3e-16   float64, against the zeroed model

Both fits together take under three minutes on two cores. With --epochs 50 --macs 0.36, fine-tuning was too short to be
sure of the accuracy: between 0.2 and 1.3 points were lost, depending on seed and number of threads.

    python recipes/image_classification.py --tokens  # after the removal tokens leave: 0.8 of the MACs of the layers

prints what is left and draws which patches stay (digits_tokens.png). With seed 0: 98.70 % dense, 97.96 % compressed,
3.88 times fewer MACs (3.12 with all tokens). The layers have only 16 tokens, too few to pay for the decisions: a batch
of 64 takes 18.6 ms dense, 9.6 with all tokens and 14.7 with those that stay.

    python recipes/image_classification.py --maps digits_maps  # and digits_maps/report.html: what died, and where

Other images: a folder with a sub-folder for each class (or with `train` and `test`, and those inside), or the hub;
other models: any image classifier of transformers, by name or folder.

    python recipes/image_classification.py --data path/to/folder --size 32 --patch 4
    python recipes/image_classification.py --config recipes/image_classification.yaml

Needs the extra `recipes`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import (
    Distillation,
    FinalizeCompression,
    SparsityMaps,
    StructuredSparsity,
    TokenPruning,
    token_runtime,
    tokens_off,
)
from lightning_compress.report import CompressionReport, Latency, measure_latency
from lightning_compress.tokens.distribution import TokenDistribution

Split = tuple[Sequence[Any], list[int]]  # images (paths, or decoded ones), labels
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads  # the removal of heads lowers it; the width of a head stays
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1)  # (batch, tokens, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, head_dim) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (batch, tokens, heads, head_dim)
        return self.out(mixed.flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class VisionTransformer(nn.Module):
    """Patches that overlap by a pixel, learned positions, pre-norm blocks, mean over the tokens, one linear layer."""

    def __init__(self, classes: int, channels: int, size: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if patch < 2 or size % patch:
            raise ValueError(f"Expected patch to be at least 2 and to divide size={size}, but got {patch}.")
        if width % heads:
            raise ValueError(f"Expected heads to divide width={width}, but got {heads}.")
        self.embed = nn.Conv2d(channels, width, patch + 1, stride=patch, padding=patch // 2)
        # As large as what `embed` returns: at the usual 0.02 it takes dozens of epochs until the order is noticed.
        self.positions = nn.Parameter(0.5 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.positions  # (batch, tokens, width)
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))  # (batch, classes)


class ImageClassification(L.LightningModule):
    """Cross entropy, AdamW, one cycle of the learning rate; training images move by up to `shift` pixels."""

    def __init__(self, model: nn.Module, classes: int, lr: float, shift: int) -> None:
        super().__init__()
        self.model, self.lr, self.shift = model, lr, shift
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits  # transformers return a record

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        logits = self(shifted(batch[0], self.shift))
        loss = F.cross_entropy(logits, batch[1])
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", (logits.argmax(dim=1) == batch[1]).float().mean(), on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.15)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def shifted(images: Tensor, most: int) -> Tensor:
    """Move each image by a draw of its own, up to `most` pixels along both axes; the border repeats itself."""
    batch, _, height, width = images.shape
    offsets = torch.randint(-most, most + 1, (2, batch, 1), device=images.device)
    rows = (torch.arange(height, device=images.device) + offsets[0]).clamp(0, height - 1)  # (batch, height)
    columns = (torch.arange(width, device=images.device) + offsets[1]).clamp(0, width - 1)  # (batch, width)
    which = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]]  # (batch, height, width, channels)
    return moved.movedim(-1, 1)


class Images(Dataset[tuple[Tensor, int]]):
    """Images of shape (channels, size, size) in [-1, 1], decoded and resized when asked for."""

    def __init__(self, split: Split, size: int, mode: str) -> None:
        (self.images, self.labels), self.size, self.mode = split, size, mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        image = Image.open(image) if isinstance(image, Path) else image
        pixels = np.array(image.convert(self.mode).resize((self.size, self.size)), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).view(self.size, self.size, -1).permute(2, 0, 1), self.labels[index]


def read(data: str, image: str, label: str, seed: int) -> tuple[Split, Split]:
    """Training and test images; where there is no test split, 30 % are held out, as many of each class."""
    if data == "digits":
        pixels, digits = load_digits(return_X_y=True)  # (images, 64), from 0 to 16
        splits = {"train": ([Image.fromarray(np.uint8(15 * p.reshape(8, 8))) for p in pixels], digits.tolist())}
    elif Path(data).is_dir():
        splits = read_folder(Path(data))
    else:
        splits = read_hub(data, image, label)
    if "test" in splits:
        return splits["train"], splits["test"]
    images, labels = splits["train"]
    parts = train_test_split(range(len(labels)), test_size=0.3, stratify=labels, random_state=seed)
    train, test = (([images[i] for i in part], [labels[i] for i in part]) for part in parts)
    return train, test


def read_folder(folder: Path) -> dict[str, Split]:
    roots = {s: folder / s for s in ("train", "test")} if (folder / "train").is_dir() else {"train": folder}
    classes = sorted(path.name for path in roots["train"].iterdir() if path.is_dir())
    splits = {}
    for split, root in roots.items():
        paths = [p for name in classes for p in sorted((root / name).rglob("*")) if p.suffix.lower() in ENDINGS]
        labels = [classes.index(p.relative_to(root).parts[0]) for p in paths]
        if len(set(labels)) < 2:
            raise ValueError(
                f"Expected images ({', '.join(ENDINGS)}) of at least two classes in sub-folders of {root}, "
                f"but got {len(paths)} images in {classes}. Make one sub-folder for each class."
            )
        splits[split] = paths, labels
    return splits


def read_hub(name: str, image: str, label: str) -> dict[str, Split]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as error:
        raise ValueError(f"Expected 'digits', a folder or a dataset of the hub, but got {name!r}: {error}") from error
    names = {"train": ["train"], "test": ["test", "validation"]}
    splits: dict[str, Split] = {}
    for split, theirs in names.items():
        for rows in [loaded[n] for n in theirs if n in loaded][:1]:
            if missing := {image, label} - set(rows.column_names):
                raise ValueError(f"Expected columns {sorted(missing)} in {name!r}, but it has {rows.column_names}.")
            splits[split] = rows[image], list(rows[label])
    number = {name: n for n, name in enumerate(sorted(set(splits["train"][1])))}
    for split, (images, labels) in splits.items():
        if unknown := set(labels) - set(number):
            raise ValueError(f"Expected labels of {name!r} among {sorted(number)}, but got {unknown} in {split!r}.")
        splits[split] = images, [number[label] for label in labels]
    return splits


@dataclass(frozen=True)
class Tokens:
    """What token pruning left of the test images."""

    relative_macs: float  # of the layers, relative to all tokens
    kept_per_layer: tuple[float, ...]  # fraction of the tokens that entered each layer
    macs: float  # of an image, the mean, whatever is no layer included
    layers: Tensor  # that each token went through, (images, tokens)


def tokens_left(module: nn.Module, pruning: TokenPruning, images: DataLoader[Any], macs: float) -> Tokens:
    """Count in the runtime of `module`; with all tokens, an image takes `macs`."""
    (runtime,) = filter(None, map(token_runtime, module.modules()))
    assert pruning.distribution is not None
    costs = pruning.distribution.costs  # of the layers as they are after the removal
    parts, layers = [], []
    module.eval()
    for batch, _ in images:
        with torch.no_grad():
            module(batch.to(next(module.parameters()).device))
        assert runtime.counts is not None
        parts.append(TokenDistribution(runtime.counts.entering.cpu(), runtime.counts.real.cpu(), costs))
        layers.append(runtime.counts.layers_of_tokens().cpu())
    left = TokenDistribution.together(parts)
    all_tokens = costs.macs(left.real).sum(0).mean().item()  # of the layers
    total = macs - (1 - left.relative_macs) * all_tokens
    return Tokens(left.relative_macs, left.kept_per_layer, total, torch.cat(layers))


class AllTokens(nn.Module):
    """`module` as it would be if no token left."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        with tokens_off():
            return self.module(images)


def patches(layers: Tensor) -> Tensor:
    """Layers that each patch went through, (images, side, side); tokens that are no patches come before them."""
    side = math.isqrt(layers.shape[1])
    return layers[:, layers.shape[1] - side**2 :].view(-1, side, side)


def draw(path: Path, images: Images, tokens: Tokens, rows: int = 2) -> None:
    """Images of the first ten classes, and below each the same with its patches shaded by the layer they left at."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window, no state that others share
    from matplotlib.patches import Patch

    through, depth = patches(tokens.layers).numpy(), len(tokens.kept_per_layer)
    side = through.shape[1]
    classes = sorted(set(images.labels))[:10]
    columns = [[n for n, label in enumerate(images.labels) if label == c][:rows] for c in classes]
    shades = colormaps["viridis"](np.linspace(0.2, 1.0, depth))  # (depth, 4), of patches that went through 1, 2, ...
    shades[:, 3] = [0.65] * (depth - 1) + [0.0]
    figure = Figure(figsize=(max(5, len(classes)), 2.1 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(classes), squeeze=False)
    plain, shaded = (0.0, side, side, 0.0), (0.0, side, 2.1 * side, 1.1 * side)  # left, right, bottom, top
    for axis in axes.flat:
        axis.set(xlim=(0, side), ylim=(2.1 * side, 0))
        axis.set_axis_off()
    for column, numbers in zip(axes.T, columns, strict=True):
        for axis, number in zip(column, numbers, strict=False):  # a class may have fewer images
            pixels = (images[number][0].permute(1, 2, 0).numpy() + 1) / 2  # (height, width, channels)
            for extent in (plain, shaded):
                axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent)
            axis.imshow(shades[through[number] - 1], interpolation="nearest", extent=shaded)
    handles = [Patch(color=shades[n], label=f"left at layer {n + 1}") for n in range(depth - 1)]
    handles.append(Patch(facecolor="none", edgecolor="black", label="stayed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def compare(
    accuracy: dict[str, float],
    seconds: dict[str, float],
    latency: dict[str, Latency],
    report: CompressionReport,
    tokens: Tokens | None = None,
) -> dict[str, Any]:
    """Print dense against compressed; the bounds are those that the defaults keep."""
    ms = {name: 1000 * measured.seconds for name, measured in latency.items()}
    lost = accuracy["dense"] - accuracy["compressed"]
    left = report.macs[1] if tokens is None else tokens.macs
    macs, speed = report.macs[0] / left, ms["dense"] / ms["compressed"]
    fewer = 2.5 if tokens is None else 3.5  # structures alone leave 3.1 times fewer
    # 16 tokens leave the computation too late to pay for the decisions: the bound is that of the structures
    faster = speed if tokens is None else ms["dense"] / ms["all tokens"]
    kept = {
        "at most 1.0 points of accuracy lost": lost <= 1.0,
        f"at least {fewer} times fewer MACs": macs >= fewer,
        f"at least 1.8 times faster{'' if tokens is None else ' with all tokens'}": faster >= 1.8,
        "error of the removal at most 1e-6": report.error <= 1e-6,
    }
    print(f"\n{'':24}{'dense':>10}{'compressed':>12}")
    print(f"{'test accuracy, %':24}{accuracy['dense']:10.2f}{accuracy['compressed']:12.2f}   {lost:.2f} points lost")
    for title, dense, compressed in (
        ("MACs of an image, M", report.macs[0] / 1e6, left / 1e6),
        *([("  with all tokens", report.macs[0] / 1e6, report.macs[1] / 1e6)] if tokens else []),
        ("ms for a batch of 64", ms["dense"], ms["compressed"]),
        *([("  with all tokens", ms["dense"], ms["all tokens"])] if tokens else []),
        ("parameters, thousands", report.params[0] / 1e3, report.params[1] / 1e3),
        ("file, kB", report.bytes[0] / 1e3, report.bytes[1] / 1e3),
        ("training, s", seconds["dense"], seconds["compressed"]),
    ):
        print(f"{title:24}{dense:10.2f}{compressed:12.2f}   {dense / compressed:.2f}x less")
    print(f"{'error of the removal':24}{'':10}{report.error:12.1e}   float64, against the zeroed model")
    if tokens is not None:
        entering = ", ".join(f"{share:.0%}" for share in tokens.kept_per_layer)
        print(f"tokens that enter the layers: {entering}; {tokens.relative_macs:.3f} of the MACs of the layers")
    print()
    for bound, holds in kept.items():
        print(f"{'kept  ' if holds else 'MISSED'}  {bound}")
    comparison = {
        "accuracy_percent": accuracy,
        "milliseconds_at_batch_64": ms,
        "fit_seconds": seconds,
        "macs_ratio": macs,
        "speedup": speed,
        "kept": kept,
        "report": report.to_dict(),
    }
    if tokens is not None:
        shares = {"relative_macs": tokens.relative_macs, "kept_per_layer": tokens.kept_per_layer}
        comparison["tokens"] = {**shares, "macs_ratio": report.macs[1] / tokens.macs}
    return comparison


def check_drawing() -> None:
    """Before minutes of training, not after them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Expected 'matplotlib' to be installed for the picture of --tokens, but it cannot be imported ({error}). "
            "Install the extra: pip install 'lightning-compress[recipes]'."
        ) from error


def parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", action="config", help="a YAML file of these options")
    add("--data", default="digits", help="'digits', a folder of images, or a dataset of the hub")
    add("--image", default="image", help="column of the images in a dataset of the hub")
    add("--label", default="label", help="column of the labels in a dataset of the hub")
    add("--size", type=int, default=8, help="images are resized to size x size pixels")
    add("--color", action="store_true", help="three channels instead of one")
    add("--pretrained", default=None, help="a model of transformers, instead of the transformer of this file")
    add("--width", type=int, default=128, help="width of the transformer; its FFNs have four times as many units")
    add("--depth", type=int, default=4, help="blocks of the transformer")
    add("--heads", type=int, default=8, help="attention heads of each block")
    add("--patch", type=int, default=2, help="pixels from one patch to the next")
    add("--shift", type=int, default=1, help="training images move by up to so many pixels")
    add("--epochs", type=int, default=80, help="epochs of each of the two fits")
    add("--batch_size", type=int, default=32, help="images in a training batch")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--regularizer", default="group_lasso", help="what drives heads and FFN units to zero")
    add("--importance", default="taylor", help="how heads and FFN units are ranked: 'taylor' or 'norm'")
    add("--macs", type=float, default=0.32, help="kept fraction of the multiply-accumulates of the prunable part")
    add("--start", type=float, default=0.1, help="fraction of the fit at which sparsifying begins")
    add("--at", type=float, default=0.4, help="fraction of the fit at which units are removed")
    add(
        "--distill", type=float, default=0.0, help="weight of the answers of the model as it was when sparsifying began"
    )
    add(
        "--tokens",
        type=float,
        nargs="?",
        const=0.8,
        help="after the removal tokens leave, until this fraction of the MACs of the layers is left (alone: 0.8)",
    )
    add("--picture", default="digits_tokens.png", help="with --tokens: file for the picture of the patches that stayed")
    add("--maps", default=None, help="folder for pictures of what is alive, dead or gone, and for report.html")
    add("--seed", type=int, default=0, help="of weights, order and split")
    add("--results", default=None, help="JSON file for the comparison")
    add("--check", action="store_true", help="exit with status 1 if a bound is missed")
    return parser


def main(o: Namespace) -> dict[str, Any]:
    """Train both models, compare them."""
    if o.tokens is not None:
        check_drawing()
    train, test = read(o.data, o.image, o.label, o.seed)
    classes, mode = len(set(train[1])), "RGB" if o.color else "L"
    training = DataLoader(Images(train, o.size, mode), o.batch_size, shuffle=True, drop_last=True)
    testing = DataLoader(Images(test, o.size, mode), 256)
    sparsity = StructuredSparsity(o.regularizer, kinds=("head", "ffn"), importance=o.importance, start=o.start)
    finalize = FinalizeCompression(macs=o.macs, at=o.at)
    # A model that has hardly learned is no teacher: for one that comes pretrained.
    distillation = [Distillation(alpha=o.distill, temperature=2.0)] if o.distill else []
    # The transformer of this file takes the mean of all tokens, so that none has to stay; others read the first.
    pruning = TokenPruning(macs=o.tokens, protected=None if o.pretrained else ()) if o.tokens is not None else None
    maps = [SparsityMaps(folder=o.maps)] if o.maps else []
    compression = [sparsity, finalize, *distillation, *([pruning] if pruning else []), *maps]
    fits: dict[str, list[L.Callback]] = {"dense": [], "compressed": compression}
    modules: dict[str, nn.Module] = {}
    accuracy: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, callbacks in fits.items():
        L.seed_everything(o.seed, verbose=False)  # both begin with the same weights
        if o.pretrained is None:
            model: nn.Module = VisionTransformer(classes, len(mode), o.size, o.patch, o.width, o.depth, o.heads)
        else:  # it comes in evaluation mode, and the Trainer would leave it there
            from transformers import AutoModelForImageClassification as Pretrained

            model = Pretrained.from_pretrained(o.pretrained, num_labels=classes, ignore_mismatched_sizes=True).train()
        module = modules[name] = ImageClassification(model, classes, o.lr, o.shift)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=o.epochs, gradient_clip_val=1.0, callbacks=callbacks, **quiet)
        began = time.perf_counter()
        trainer.fit(module, training)
        seconds[name] = time.perf_counter() - began
        accuracy[name] = 100 * trainer.test(module, testing, verbose=False)[0]["test_accuracy"]
    batch = torch.cat([images for images, _ in testing])[:64].to(modules["dense"].device)
    timed: dict[str, nn.Module] = {**modules, **({"all tokens": AllTokens(modules["compressed"])} if pruning else {})}
    latency = measure_latency(timed, (batch,), repeats=100)
    assert finalize.report is not None
    tokens = tokens_left(modules["compressed"], pruning, testing, finalize.report.macs[1]) if pruning else None
    comparison = compare(accuracy, seconds, latency, finalize.report, tokens)
    if tokens is not None:
        draw(Path(o.picture), testing.dataset, tokens)
        print(f"\nWhich patches stayed: {o.picture}")
    for drawn in maps:
        print(f"\nWhat died, and where: {drawn.report_path}")
    if o.results is not None:
        Path(o.results).write_text(json.dumps(comparison, indent=2) + "\n")
    return comparison


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what Lightning notes about every Trainer
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning 2.6 calls what torch has deprecated
    options = parser().parse_args()
    comparison = main(options)
    sys.exit(options.check and not all(comparison["kept"].values()))
