"""Tiny LightningModules that use the Trainer in different ways, and a Trainer that is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3


class MLP(nn.Module):
    """Two hidden layers: two ffn structures of 12 and 10 units."""

    def __init__(self, first: int = 12, second: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        # (batch, tokens, width) -> (batch, heads, tokens, head_dim)
        q, k, v = (m(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks of 4 heads and 96 FFN units each."""

    def __init__(self, width: int = 16, heads: int = 4, ffn: int = 96, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width, heads, ffn) for _ in range(blocks))
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x.mean(1))


class Classifier(pl.LightningModule):
    """The usual module: a model, one optimizer, a step that calls ``self.model``; it has no forward."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-2, optimizer: str = "adamw") -> None:
        super().__init__()
        self.model = MLP() if model is None else model
        self.lr = lr
        self.kind = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> Any:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr)
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader(sequences: bool = False, examples: int = 64, batch_size: int = 8) -> DataLoader:
    """Learnable data: the class is the number of positive sums."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, *((4, 5) if sequences else (5,)), generator=generator)
    features = x.mean(1) if sequences else x
    y = (features[:, 0] > 0).long() + (features[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A silent Trainer on the CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 5,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(
    module: pl.LightningModule, *callbacks: pl.Callback, data: DataLoader | None = None, **options: Any
) -> pl.Trainer:
    """Fit the module; 8 batches of 8 examples an epoch, 5 epochs, without validation."""
    t = trainer(*callbacks, **options)
    t.fit(module, loader() if data is None else data)
    return t


class Save(pl.Callback):
    """Saves a checkpoint at the end of an epoch, and falls over in the next."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            raise RuntimeError("crash")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch - 1:
            trainer.save_checkpoint(self.path)
