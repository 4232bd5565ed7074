"""Sizes that agree by chance, at the proof and in a call: dims that run over tokens are told from all others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.proof import prove_tokens
from tests.tokens.agreement import agree
from tests.tokens.encoders import CALLS, HEADS, LAYERS, WIDTH, built, shaken
from tests.tokens.test_inputs import Layer

HEAD_DIM = WIDTH // HEADS
SIZES = {  # (batch, tokens)
    "ordinary": (4, 11),
    "batch": (11, 11),
    "width": (5, WIDTH),
    "all": (WIDTH, WIDTH),
    "head_dim": (4, HEAD_DIM),
    "batch times heads": (4, 4 * HEADS),
    "one row": (1, 11),
    "one row of the width": (1, WIDTH),
}


class Positions(nn.Module):
    """Layers that get a mask, positions for every row, and a scale of each head or channel: many dims to mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(LAYERS))
        self.scale = nn.Parameter(torch.rand(1, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1, keepdim=True).to(x.dtype)  # (batch, 1), none of the tokens
        places = torch.arange(x.shape[1], dtype=x.dtype).expand(x.shape[:2])
        for layer in self.layers:
            x = layer(x, mask, places, self.scale, count)
        return x


class Scaled(Layer):
    def forward(self, x: Tensor, mask: Tensor, places: Tensor, scale: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale[:, None] + torch.sin(places / count)[..., None], mask)


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", ["bert-tags-eager", "torch-post-all-padded"])
def test_any_size_proves_and_any_other_runs(name: str, size: str) -> None:
    model = built(name)
    proof = prove_tokens(model, (), CALLS[name](*SIZES[size], seed=7))
    removed = 0.0
    calls = [*SIZES.values(), (3, HEADS), (2, 3 * HEADS)]
    start = list(SIZES).index(size)
    for batch, tokens in calls[start::3] if size != "ordinary" else calls:
        counts = agree(model, proof, CALLS[name](batch, tokens, seed=2))
        removed += float(counts.real.sum() - counts.entering[-1].sum())
    assert removed > 0


@pytest.mark.parametrize("size", list(SIZES))
def test_dims_of_many_arguments(size: str) -> None:
    torch.manual_seed(0)
    model = shaken(Positions())

    def call(batch: int, tokens: int) -> dict[str, Tensor]:
        x = torch.randn(batch, tokens, WIDTH, dtype=torch.float64)
        lengths = torch.randint(2, tokens + 1, (batch, 1)) if batch > 1 else torch.full((1, 1), tokens)
        lengths[0] = tokens
        return {"x": x, "mask": torch.arange(tokens) < lengths}

    proof = prove_tokens(model, (), call(*SIZES[size]))
    assert proof.stack.dims["args.1"] == proof.stack.dims["args.2"] == (-1,)
    assert proof.stack.dims["args.3"] == proof.stack.dims["args.4"] == ()
    for batch, tokens in ((5, 11), (WIDTH, WIDTH), (9, 9)):
        agree(model, proof, call(batch, tokens))


def test_tokens_before_rows_are_refused_also_where_both_are_as_many() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    with pytest.raises(TokenPruningError, match="It has the tokens first: build it with batch_first=True"):
        prove_tokens(model, (torch.randn(11, 3, WIDTH),))
    with pytest.raises(TokenPruningError, match=r"the layer 'layers.2' to compute the same for tokens that stay"):
        prove_tokens(model, (torch.randn(11, 11, WIDTH),))
