"""What tokens cannot leave, and calls that need all of them: refused, with the layer and the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import prove_tokens
from tests.tokens.agreement import POLICY, proven
from tests.tokens.encoders import CALLS, LAYERS, LENGTH, WIDTH, Encoder, shaken, states, words

CAUSAL = (
    "in both directions in the layer '{}', but its tokens attend only to earlier ones.*Prune the tokens of encoders"
)


def decoder(name: str, attention: str) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "GPT2":
        sizes |= {"n_embd": WIDTH, "n_layer": 2, "n_head": 3, "n_positions": 32}
    else:
        sizes |= {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = attention
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "layer"), [("GPT2", "h.0"), ("Llama", "layers.0")])
def test_decoders(name: str, layer: str, attention: str, masked: bool) -> None:
    call = {**words(4), "use_cache": False}
    if not masked:
        del call["attention_mask"]
    model = decoder(name, attention)
    with pytest.raises(TokenPruningError, match=CAUSAL.format(layer)):
        prove_tokens(model, (), call)
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


class Attention(nn.Module):
    """A layer with one of the ways in which tokens that leave would be missed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(3, 2 * LENGTH))
        self.convolve = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (p.unflatten(2, (3, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, 2))
        places = torch.arange(x.shape[1])
        apart = places[:, None] - places
        if self.way == "relative positions":
            mask = self.table[:, apart + LENGTH][None]  # (1, heads, tokens, tokens)
        elif self.way == "a window":
            mask = apart.abs() <= 2
        elif self.way == "a convolution":
            x = x + self.convolve(x.transpose(1, 2)).transpose(1, 2)
        causal = self.way == "a causal flag"
        if self.way == "a softmax looking back":
            logits = (q @ k.transpose(2, 3)).masked_fill(apart < 0, -torch.inf)
            mixed = logits.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return x + torch.tanh(self.out(mixed.transpose(1, 2).flatten(2)))


class Stack(nn.Module):
    """Ordinary layers but for one."""

    def __init__(self, way: str, mask: Tensor | None = None, at: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(way if n == at else "ordinary") for n in range(LAYERS))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.mask is None else layer(x, self.mask.expand(len(x), 1, -1, -1))
        return x


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("way", ["relative positions", "a window", "a convolution"])
def test_the_layer_whose_positions_do_not_travel_is_named(way: str, at: int) -> None:
    message = f"the layer 'layers.{at}' to compute the same for tokens that stay.*Positions must travel"
    with pytest.raises(TokenPruningError, match=message):
        prove_tokens(Stack(way, at=at), (torch.randn(4, LENGTH, WIDTH),))


@pytest.mark.parametrize("way", ["a causal flag", "a softmax looking back"])
def test_the_layer_that_looks_back_is_named(way: str) -> None:
    with pytest.raises(TokenPruningError, match=CAUSAL.format("layers.1")):
        prove_tokens(Stack(way), (torch.randn(4, LENGTH, WIDTH),))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_causal_masks_are_refused(kind: torch.dtype) -> None:
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = allowed if kind == torch.bool else torch.zeros(LENGTH, LENGTH).masked_fill(~allowed, -1e9)
    with pytest.raises(TokenPruningError, match=CAUSAL.format("layers.0")):
        prove_tokens(Stack("ordinary", mask), (torch.randn(4, LENGTH, WIDTH),))
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    class Ordered(Encoder):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.encoder(x, mask=causal.to(x), is_causal=True)

    with pytest.raises(TokenPruningError, match=r"'encoder.layers.0' .*kwargs.src_mask has the shape \(11, 11\)"):
        prove_tokens(Ordered().eval(), (torch.randn(4, LENGTH, WIDTH),))


NEEDED = "Expected a call without {}=True, because with pruned tokens every layer has another number"


@pytest.mark.parametrize("wanted", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("name", ["bert-tags-eager", "distilbert-classes-eager", "modernbert-base-eager"])
def test_what_needs_all_tokens_is_refused_in_every_module_around_the_layers(name: str, wanted: str) -> None:
    model, proof = proven(name)
    runtime = install_tokens(model, proof.runtime(POLICY))
    call, config = CALLS[name](4), model.config
    owner = model.get_submodule(proof.stack.owner)
    parts = [m for path, m in model.named_modules() if f"{proof.stack.owner}.".startswith(f"{path}.") or not path]
    try:
        for part in parts:
            given = {"hidden_states": torch.randn(4, 11, WIDTH)} if part is owner and part is not model else call
            with pytest.raises(TokenPruningError, match=NEEDED.format(wanted)):
                part(**given, **{wanted: True})
            setattr(config, wanted, hasattr(part, "config"))
            for more in ({}, {wanted: None}) if hasattr(part, "config") else ():
                with pytest.raises(TokenPruningError, match=NEEDED.format(wanted)):
                    part(**given, **more)
            setattr(config, wanted, False)
        setattr(config, wanted, True)
        model(**call, **{wanted: False})  # the call has the last word
        setattr(config, wanted, False)
        runtime.mode = "off"
        assert len(model(**call, **{wanted: True})[wanted.removeprefix("output_")]) >= LAYERS
    finally:
        setattr(config, wanted, False)
        remove_tokens(model)
    assert len(model(**call, **{wanted: True})[wanted.removeprefix("output_")]) >= LAYERS


class Showing(nn.Module):
    """An owner that takes the wish by position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Encoder(pooled=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, output_hidden_states: bool | None = None) -> Any:
        return self.inner(x, mask)


def test_a_wish_by_position_is_refused_too() -> None:
    model = shaken(Showing())
    call = states(4)
    install_tokens(model, prove_tokens(model, (), call).runtime(POLICY))
    with pytest.raises(TokenPruningError, match=NEEDED.format("output_hidden_states")):
        model(call["x"], call["mask"], True)
    model(call["x"], call["mask"], None)
    model(call["x"], call["mask"])
