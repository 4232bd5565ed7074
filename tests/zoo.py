"""Tiny random models of many families, with an example call each: what the theorems are tested on.

Every size differs from every other where a family allows it, so that a confusion of two dimensions cannot go unnoticed.
Weights are perturbed, so that zero initialisations do not make an equality hold for nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, WIDTH, HEADS, FFN = 101, 60, 5, 70


@dataclass(frozen=True)
class Example:
    """A model factory and one call: ``model(*args, **kwargs)``."""

    build: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, with perturbed weights."""
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


def _ids(length: int = 9, batch: int = 2) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(7))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def _mask(length: int = 9) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 6:] = 0
    return mask


# ---------------------------------------------------------------------------------------------------- written by hand


class SequenceClassifier(nn.Module):
    """An input projection, a body and an output layer, so that the body's width is neither input nor output."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(21, WIDTH), body, nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x))[:, 0])


class TranslationModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(21, WIDTH), nn.Linear(WIDTH, 7)
        with warnings.catch_warnings():  # torch mentions that an odd number of heads rules out its nested tensors
            warnings.simplefilter("ignore", UserWarning)
            self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, FFN, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(source), self.embed(target)))


class AttentionBlock(nn.Module):
    """A module of somebody's own around nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


class PackedAttention(nn.Module):
    """Attention with a packed projection;

    ``literal`` writes its sizes into forward, where no attribute can repair them.
    """

    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.literal, self.heads, self.head_dim = literal, HEADS, WIDTH // HEADS
        self.norm, self.packed, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        packed = self.packed(self.norm(x))
        if self.literal:
            packed = packed.view(batch, tokens, 3, 5, 12)
        else:
            packed = packed.view(batch, tokens, 3, self.heads, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head_dim)
        mixed = (query @ key.transpose(-1, -2) / 12**0.5).softmax(-1) @ value
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class SeparateAttention(nn.Module):
    """Attention with three projections, sizes from attributes and -1."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm(x)
        query, key, value = (
            p(y).view(batch, tokens, self.heads, -1).transpose(1, 2) for p in (self.query, self.key, self.value)
        )
        mixed = (query @ key.transpose(-1, -2) * self.scale).softmax(-1) @ value
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 18, 3, 1, 1)
        self.blocks = nn.Sequential(ResidualBlock(18, 18, 1), ResidualBlock(18, 26, 2), ResidualBlock(26, 26, 1))
        self.head = nn.Linear(26, 7)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.max_pool2d(self.stem(x), 2))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class DepthwiseNet(nn.Module):
    """An inverted residual and a grouped convolution, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.bn = nn.Conv2d(3, 18, 3, 2, 1), nn.Conv2d(18, 36, 1), nn.BatchNorm2d(36)
        self.depthwise, self.project = nn.Conv2d(36, 36, 3, 1, 1, groups=36), nn.Conv2d(36, 18, 1)
        self.grouped, self.head = nn.Conv2d(18, 24, 3, 1, 1, groups=3), nn.Linear(24 * 16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.bn(self.expand(x))))))
        x = F.adaptive_avg_pool2d(self.grouped(x), 4)
        return self.head(x.view(x.size(0), -1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 22)
        self.lstm = nn.LSTM(22, 30, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(60, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0].mean(1))


def multilayer_perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(21, 50), nn.ReLU(), nn.Linear(50, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 7)
    )


SEQUENCE = _noise(2, 9, 21)
IMAGE = _noise(2, 3, 32, 32)

BY_HAND: dict[str, Example] = {
    "nn.TransformerEncoder": Example(
        lambda: SequenceClassifier(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, batch_first=True), 2, enable_nested_tensor=False
            )
        ),
        (SEQUENCE,),
    ),
    "nn.Transformer": Example(TranslationModel, (SEQUENCE, _noise(2, 6, 21))),
    "nn.MultiheadAttention": Example(lambda: SequenceClassifier(AttentionBlock()), (SEQUENCE,)),
    "packed attention, literal sizes": Example(lambda: SequenceClassifier(PackedAttention(literal=True)), (SEQUENCE,)),
    "packed attention": Example(lambda: SequenceClassifier(PackedAttention(literal=False)), (SEQUENCE,)),
    "separate attention": Example(lambda: SequenceClassifier(SeparateAttention()), (SEQUENCE,)),
    "MLP": Example(multilayer_perceptron, (_noise(4, 21),)),
    "ResNet": Example(ResNet, (IMAGE,)),
    "depthwise CNN": Example(DepthwiseNet, (IMAGE,)),
    "LSTM": Example(Recurrent, (_ids(),)),
}

# -------------------------------------------------------------------------------------------------- from transformers


def _transformers(model: str, config: str, call: dict[str, Any], **options: Any) -> Example:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Example(build, (), call)


ENCODER = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
}
DECODER = {**ENCODER, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SEQ2SEQ = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "d_model": WIDTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
}
VISION = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "image_size": 32,
    "patch_size": 8,
}
TEXT_CALL = {"input_ids": _ids(), "attention_mask": _mask()}
CAUSAL_CALL = {**TEXT_CALL, "use_cache": False}
SEQ2SEQ_CALL = {**TEXT_CALL, "decoder_input_ids": _ids(7), "use_cache": False}
IMAGE_CALL = {"pixel_values": IMAGE}

FAMILIES: dict[str, Example] = {
    "BERT": _transformers("BertForSequenceClassification", "BertConfig", TEXT_CALL, **ENCODER),
    "RoBERTa": _transformers("RobertaForSequenceClassification", "RobertaConfig", TEXT_CALL, **ENCODER),
    "DistilBERT": _transformers(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        TEXT_CALL,
        n_layers=2,
        dim=WIDTH,
        n_heads=HEADS,
        hidden_dim=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
    ),
    "GPT-2": _transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        CAUSAL_CALL,
        n_layer=2,
        n_embd=WIDTH,
        n_head=HEADS,
        n_inner=FFN,
        vocab_size=VOCABULARY,
        n_positions=40,
    ),
    "Llama": _transformers("LlamaForCausalLM", "LlamaConfig", CAUSAL_CALL, **DECODER),
    "T5": _transformers(
        "T5ForConditionalGeneration",
        "T5Config",
        SEQ2SEQ_CALL,
        num_layers=2,
        d_model=WIDTH,
        num_heads=HEADS,
        d_kv=14,
        d_ff=FFN,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    ),
    "BART": _transformers("BartForConditionalGeneration", "BartConfig", SEQ2SEQ_CALL, **SEQ2SEQ),
    "ViT": _transformers("ViTForImageClassification", "ViTConfig", IMAGE_CALL, **VISION),
    "Swin": _transformers(
        "SwinForImageClassification",
        "SwinConfig",
        IMAGE_CALL,
        image_size=32,
        patch_size=2,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
}

MODELS: dict[str, Example] = {**BY_HAND, **FAMILIES}
