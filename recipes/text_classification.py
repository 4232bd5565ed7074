"""Fine-tune a pretrained text encoder and, with the presets of `callbacks/`, make it smaller in the same fit.

Any dataset and model of the Hugging Face hub by name:

    python recipes/text_classification.py fit --config recipes/text_classification.yaml \
        --model.pretrained=bert-base-uncased --data.dataset=stanfordnlp/sst2

Offline, a local model folder, and a folder with `train.tsv`, `dev.tsv` and `test.tsv` (or `.tsv.gz`; no header; each
line is `text TAB label` or, for pairs as in MRPC, `label TAB text TAB text`):

    python recipes/text_classification.py fit --config recipes/text_classification.yaml \
        --model.pretrained=path/to/model --data.dataset=path/to/sst2 \
        --config callbacks/group_lasso.yaml --config callbacks/finalize.yaml --config callbacks/distillation.yaml

Without the last line the model is trained densely. Expected for all-MiniLM-L6-v2 and 6,920 training sentences of SST-2:
87.6 % of the dev and 89.1 % of the test sentences after 3 epochs (means of the seeds 0 and 1).
Compressed: benchmarks/results/sst2/table.md. Needs the extras `hf` and `recipes`.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

# Batches of sentences come in hundreds of shapes. For each one oneDNN compiles its bfloat16 kernels, which takes longer
# than to run them once, and it keeps 1,024 unless it is told otherwise before its first.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(2**16))

Example = tuple[list[int], int]  # token ids, label


class SentenceClassifier(nn.Module):
    """Encoder, mean over the real tokens, one linear layer: `logits = W mean_t(h_t) + b`."""

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False
    ) -> SequenceClassifierOutput:
        output = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states
        )
        hidden = output.last_hidden_state  # (batch, tokens, width)
        real = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, tokens, 1)
        pooled = (hidden * real).sum(1) / real.sum(1)  # (batch, width)
        # Padding tells nothing: zeros, so that who compares the hidden states of two models compares real tokens only.
        states = tuple(state * real for state in output.hidden_states) if output_hidden_states else None
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)), hidden_states=states)


class TextClassification(L.LightningModule):
    """Cross entropy, AdamW, linear warm-up over `warmup` of the steps and linear decay to zero."""

    def __init__(
        self, pretrained: str, num_labels: int = 2, lr: float = 5e-5, weight_decay: float = 0.01, warmup: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # `from_pretrained` returns a model in eval mode and the Trainer leaves it there: without train(), no dropout.
        self.model = SentenceClassifier(AutoModel.from_pretrained(pretrained), num_labels).train()
        self.accuracy = MulticlassAccuracy(num_labels, average="micro")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.accuracy(logits, batch["labels"])
        self.log(f"{stage}_accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay, fused=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(self.hparams.warmup * steps))
        # Step 0 already moves (1 / warmup), and the last step does too: after it the factor reaches zero.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LengthBuckets(Sampler[int]):
    """A random order in which every run of `batch_size` examples has nearly the same length.

    The shuffled examples are cut into windows of `window` batches, each window is sorted by length, and the batches are
    shuffled again: half the time of padding random batches to their longest sentence, and other batches in each epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, window: int = 50) -> None:
        self.lengths, self.batch_size, self.seed, self.window, self.epoch = lengths, batch_size, seed, window, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:  # called by the Trainer at the start of each epoch, after a resume too
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.window * self.batch_size
        order = [
            i for at in range(0, len(order), size) for i in sorted(order[at : at + size], key=self.lengths.__getitem__)
        ]
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []  # a short batch stays last
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return (i for batch in shuffled + last for i in batch)


class TextData(L.LightningDataModule):
    """Sentences and labels out of a local folder of TSV files or out of a dataset of the hub, tokenized once.

    Pairs of sentences become one sequence, `[CLS] first [SEP] second [SEP]`, without segment ids. Where a pair is too
    long, its longer sentence is cut.

    Args:
        dataset: the folder, or the name of a dataset of the hub.
        pretrained: the model whose tokenizer is used.
        config: configuration of the dataset of the hub.
        text: its column of sentences.
        label: its column of integer labels.
        batch_size: examples per batch.
        max_length: tokens after which an example is cut.
        seed: of the order of the training batches.
        pair: the column of second sentences of the dataset of the hub, for pairs.
    """

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        config: str | None = None,
        text: str = "sentence",
        label: str = "label",
        batch_size: int = 32,
        max_length: int = 128,
        seed: int = 0,
        pair: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.splits: dict[str, list[Example]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        folder = Path(self.hparams.dataset)
        read = read_folder(folder) if folder.is_dir() else read_hub(**{k: self.hparams[k] for k in HUB_ARGUMENTS})
        for split, (texts, labels) in read.items():
            ids = self.tokenizer(texts, truncation=True, max_length=self.hparams.max_length)["input_ids"]
            self.splits[split] = list(zip(ids, labels, strict=True))

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad({"input_ids": [ids for ids, _ in examples]}, return_tensors="pt")
        return {
            "input_ids": batch["input_ids"],  # (batch, tokens)
            "attention_mask": batch["attention_mask"],  # (batch, tokens), 1 = real token
            "labels": torch.tensor([label for _, label in examples]),  # (batch,)
        }

    def loader(self, split: str, sampler: Sampler[int] | Sequence[int] | None = None) -> DataLoader[Any]:
        return DataLoader(self.splits[split], self.hparams.batch_size, sampler=sampler, collate_fn=self.collate)

    def train_dataloader(self) -> DataLoader[Any]:
        lengths = [len(ids) for ids, _ in self.splits["train"]]
        return self.loader("train", LengthBuckets(lengths, self.hparams.batch_size, self.hparams.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("validation", by_length(self.splits["validation"]))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test", by_length(self.splits["test"]))


HUB_ARGUMENTS = ("dataset", "config", "text", "label", "pair")
Split = tuple[Sequence[str | tuple[str, str]], list[int]]  # sentences or pairs of them, labels


def by_length(examples: list[Example]) -> list[int]:
    """Longest first: little padding, and the largest batch shows at once whether it fits into memory."""
    return sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))


def read_folder(folder: Path) -> dict[str, Split]:
    """`{train,dev or validation,test}.tsv` or `.tsv.gz`, no header, no quoting.

    Two columns are `text TAB label`, three are `label TAB text TAB text`; all lines of a folder are alike.
    """
    splits: dict[str, Split] = {}
    columns = 0  # of the first line of all
    for split, stems in {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}.items():
        paths = [folder / f"{stem}{ending}" for stem in stems for ending in (".tsv", ".tsv.gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"Expected one of {[p.name for p in paths]} in {folder}, but found none. "
                "Give a folder with train, dev and test splits."
            )
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        columns = columns or (3 if rows and len(rows[0]) == 3 else 2)
        texts: list[str | tuple[str, str]] = []
        labels = []
        for number, row in enumerate(rows, 1):
            label = row[0 if columns == 3 else -1] if row else ""
            if len(row) != columns or not label.isdigit():
                form = "label TAB text TAB text" if columns == 3 else "text TAB label"
                raise ValueError(
                    f"{path.name}, line {number}: expected `{form}` with an integer label, got {row!r}. "
                    "All lines of all splits have the form of the first."
                )
            texts.append((row[1], row[2]) if columns == 3 else row[0])
            labels.append(int(label))
        splits[split] = texts, labels
    return splits


def read_hub(dataset: str, config: str | None, text: str, label: str, pair: str | None) -> dict[str, Split]:
    from datasets import load_dataset

    loaded = load_dataset(dataset, config)
    return {
        split: (list(zip(rows[text], rows[pair], strict=True)) if pair else list(rows[text]), list(rows[label]))
        for split, rows in loaded.items()
    }


if __name__ == "__main__":

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.link_arguments("model.pretrained", "data.pretrained")

    CLI(TextClassification, TextData, seed_everything_default=0)
