"""A small encoder over padded sentences, data that it can learn, and a LightningModule around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.callbacks.modules import Classifier

WORDS, LENGTH = 24, 12


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """(ids, mask) -> logits of two classes, read from the first token."""

    def __init__(self, layers: int = 3, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.classify = nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return self.classify(x[:, 0])


class Reader(Classifier):
    """Batches are mappings with ids, mask, label and keep (tokens never to be pruned)."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        super().__init__(Encoder() if model is None else model, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch["ids"], batch["mask"]), batch["label"])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.model(batch["ids"], batch["mask"])
        self.log("accuracy", (logits.argmax(-1) == batch["label"]).float().mean())

    test_step = validation_step


def sentences(examples: int = 64, batch_size: int = 8, seed: int = 1) -> DataLoader:
    """The label says which of two words occurs; sentences have 4 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (examples, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (examples,), generator=generator)
    label = torch.randint(0, 2, (examples,), generator=generator)
    place = 1 + (torch.rand(examples, generator=generator) * (lengths - 1)).long()
    ids[torch.arange(examples), place] = 2 + label
    ids[:, 0] = 1
    mask = torch.arange(LENGTH) < lengths.unsqueeze(1)
    keep = torch.zeros_like(mask)
    keep[torch.arange(examples), lengths - 1] = True
    data = [{"ids": i * m, "mask": m, "label": y, "keep": k} for i, m, y, k in zip(ids, mask, label, keep, strict=True)]
    return DataLoader(data, batch_size)  # type: ignore[arg-type]
