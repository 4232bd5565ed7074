"""Compress a trained model without training it any further, and compare: the digits, or a text classifier.

    python recipes/post_training.py                                   # scikit-learn's digits: trained densely, then cut
    python recipes/post_training.py --pretrained path/to/model --dataset path/to/sst2 --checkpoint path/to/checkpoint

The second form takes a checkpoint of recipes/text_classification.py; without one it trains for `--epochs`. Batches
of the training data calibrate, and accuracy is that of the test split. `--tune 1` goes on with an epoch of distillation
from the dense model. Needs the extra `recipes`, and `hf` for text.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import PostTrainingCompression, logits_kl
from recipes import image_classification as images

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


class Digits(images.ImageClassification):
    """The recipe's module, which can be validated; calibration images stay where they are."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean(), on_epoch=True)


def digits(o: Namespace) -> tuple[L.LightningModule, DataLoader[Any], DataLoader[Any]]:
    """A dense vision transformer, training and test images."""
    train, test = images.read("digits", "", "", o.seed)
    training = DataLoader(images.Images(train, 8, "L"), 32, shuffle=True, drop_last=True)
    model = images.VisionTransformer(10, 1, 8, 2, o.width, 4, 8)
    module = Digits(model, 10, 2e-3, 1)
    L.Trainer(max_epochs=o.epochs or 40, gradient_clip_val=1.0, **QUIET).fit(module, training)
    module.shift = 0
    return module, training, DataLoader(images.Images(test, 8, "L"), 256)


def sentences(o: Namespace) -> tuple[L.LightningModule, DataLoader[Any], DataLoader[Any]]:
    """A text classifier, training and test sentences."""
    from recipes.text_classification import TextClassification, TextData

    data = TextData(o.dataset, o.pretrained, seed=o.seed)
    data.setup()
    if o.checkpoint is not None:
        module = TextClassification.load_from_checkpoint(o.checkpoint, pretrained=o.pretrained)
    else:
        module = TextClassification(o.pretrained)
        L.Trainer(max_epochs=o.epochs or 3, limit_val_batches=0, **QUIET).fit(module, data)
    return module, data.train_dataloader(), data.test_dataloader()


def taught(module: L.LightningModule, teacher: nn.Module) -> Callable[[Any, int], Tensor]:
    """A training step that only imitates the dense model."""
    teacher.eval().requires_grad_(False)

    def step(batch: Any, batch_idx: int) -> Tensor:
        inputs = (batch["input_ids"], batch["attention_mask"]) if isinstance(batch, dict) else batch[:1]
        return logits_kl(module(*inputs), teacher(*inputs), 2.0)

    return step


def main(o: Namespace) -> dict[str, Any]:
    """Accuracy, size and time of the dense model and of the smaller ones."""
    L.seed_everything(o.seed, verbose=False)
    module, training, testing = digits(o) if o.dataset == "digits" else sentences(o)

    def accuracy(of: L.LightningModule) -> float:
        return 100 * L.Trainer(**QUIET).test(of, testing, verbose=False)[0]["test_accuracy"]

    rows: dict[str, Any] = {"dense": {"accuracy": accuracy(module)}}
    for macs in o.macs:
        small = copy.deepcopy(module)
        compression = PostTrainingCompression(macs=macs, importance=o.importance, batches=o.batches)
        began = time.perf_counter()
        trainer = L.Trainer(callbacks=[compression], limit_val_batches=o.batches, **QUIET)
        trainer.validate(small, training, verbose=False)
        seconds = time.perf_counter() - began
        assert compression.report is not None
        row = rows[f"{macs:g}"] = {"accuracy": accuracy(small), "seconds": seconds, **compression.report.metrics()}
        if o.tune:
            small.training_step = taught(small, copy.deepcopy(module))  # type: ignore[method-assign]
            L.Trainer(max_epochs=o.tune, limit_val_batches=0, gradient_clip_val=1.0, **QUIET).fit(small, training)
            row["tuned"] = accuracy(small)
    print("\nMACs    test accuracy, %    after tuning    seconds")
    for name, row in rows.items():
        print(f"{name:<8}{row['accuracy']:>16.2f}{row.get('tuned', float('nan')):>16.2f}{row.get('seconds', 0):>11.1f}")
    if o.results is not None:
        Path(o.results).write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", help="'digits', or a folder or dataset as recipes/text_classification.py takes")
    add("--pretrained", default=None, help="for text: the model whose tokenizer and shape are used")
    add("--checkpoint", default=None, help="for text: a checkpoint of the dense model")
    add("--macs", type=float, nargs="+", default=[0.7, 0.5], help="kept fractions of the MACs of heads and FFN units")
    add("--importance", default="outputs", help="what ranks the units")
    add("--batches", type=int, default=32, help="calibration batches")
    add("--epochs", type=int, default=None, help="of the dense fit")
    add("--width", type=int, default=128, help="of the transformer for the digits")
    add("--tune", type=int, default=0, help="epochs of distillation afterwards")
    add("--seed", type=int, default=0, help="of weights, order and split")
    add("--results", default=None, help="JSON file for the numbers")
    return parser


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning 2.6 calls what torch has deprecated
    main(parser().parse_args())
