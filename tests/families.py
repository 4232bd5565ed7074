"""The families that docs/coverage.md lists, beside those of ``zoo.py``: transformers, and modules as people write them.

Every size differs from every other where a family allows it. Nothing is downloaded: configurations are tiny, weights
random.
"""

from __future__ import annotations

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import zoo
from tests.zoo import (
    CAUSAL_CALL,
    DECODER,
    ENCODER,
    FFN,
    HEADS,
    IMAGE,
    IMAGE_CALL,
    SEQ2SEQ,
    SEQ2SEQ_CALL,
    SEQUENCE,
    TEXT_CALL,
    VISION,
    VOCABULARY,
    WIDTH,
    Example,
    SequenceClassifier,
    _ids,
    _noise,
    _transformers,
)

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TRANSFORMERS: dict[str, Example] = {
    "ALBERT": _transformers(
        "AlbertForSequenceClassification", "AlbertConfig", TEXT_CALL, **ENCODER, embedding_size=24, **SPECIAL
    ),
    "ELECTRA": _transformers(
        "ElectraForSequenceClassification", "ElectraConfig", TEXT_CALL, **ENCODER, embedding_size=24
    ),
    "DeBERTa-v2": _transformers(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT_CALL,
        **ENCODER,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
    ),
    "MPNet": _transformers("MPNetForSequenceClassification", "MPNetConfig", TEXT_CALL, **ENCODER),
    "ModernBERT": _transformers(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT_CALL,
        **ENCODER,
        **SPECIAL,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=6,
    ),
    "GPT-NeoX": _transformers(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        CAUSAL_CALL,
        **{**ENCODER, "hidden_size": 64, "num_attention_heads": 4},
        **SPECIAL,
    ),
    "OPT": _transformers(
        "OPTForCausalLM",
        "OPTConfig",
        CAUSAL_CALL,
        num_hidden_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        ffn_dim=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        word_embed_proj_dim=WIDTH,
        **SPECIAL,
    ),
    "Qwen2": _transformers("Qwen2ForCausalLM", "Qwen2Config", CAUSAL_CALL, **DECODER),
    "Qwen3": _transformers("Qwen3ForCausalLM", "Qwen3Config", CAUSAL_CALL, **DECODER, head_dim=12),
    "Mistral": _transformers("MistralForCausalLM", "MistralConfig", CAUSAL_CALL, **DECODER),
    "Gemma2": _transformers("Gemma2ForCausalLM", "Gemma2Config", CAUSAL_CALL, **DECODER, head_dim=12),
    "Phi3": _transformers("Phi3ForCausalLM", "Phi3Config", CAUSAL_CALL, **DECODER, **SPECIAL),
    "Mixtral": _transformers(
        "MixtralForCausalLM",
        "MixtralConfig",
        CAUSAL_CALL,
        **DECODER,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "Mixtral, grouped products": _transformers(
        "MixtralForCausalLM",
        "MixtralConfig",
        CAUSAL_CALL,
        **{**DECODER, "intermediate_size": 72},  # the kernel wants rows of 16 bytes
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="grouped_mm",
    ),
    "Marian": _transformers(
        "MarianMTModel", "MarianConfig", SEQ2SEQ_CALL, **SEQ2SEQ, pad_token_id=0, decoder_start_token_id=0
    ),
    "Whisper": _transformers(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"input_features": _noise(2, 20, 44), "decoder_input_ids": _ids(7), "use_cache": False},
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=20,
        max_source_positions=22,
        max_target_positions=30,
        decoder_start_token_id=1,
        **SPECIAL,
    ),
    "DeiT": _transformers("DeiTForImageClassification", "DeiTConfig", IMAGE_CALL, **VISION),
    "SegFormer": _transformers(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        IMAGE_CALL,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 3],
        mlp_ratios=[3, 3],
        decoder_hidden_size=20,
    ),
    "CLIP": _transformers(
        "CLIPModel",
        "CLIPConfig",
        {**TEXT_CALL, **IMAGE_CALL},
        text_config={**ENCODER, "eos_token_id": 2},
        vision_config=VISION,
        projection_dim=26,
    ),
    "Wav2Vec2": _transformers(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {"input_values": _noise(2, 900)},
        **{k: v for k, v in ENCODER.items() if k != "max_position_embeddings"},
        conv_dim=(22, 26),
        conv_stride=(5, 3),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    ),
    "ConvNeXt": _transformers(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        IMAGE_CALL,
        hidden_sizes=[14, 18, 22, 26],
        depths=[1, 1, 2, 1],
        image_size=32,
        patch_size=2,
    ),
    "ResNet (basic)": _transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        IMAGE_CALL,
        embedding_size=14,
        hidden_sizes=[14, 22],
        depths=[2, 2],
        layer_type="basic",
    ),
    "ResNet (bottleneck)": _transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        IMAGE_CALL,
        embedding_size=14,
        hidden_sizes=[24, 40],
        depths=[1, 2],
        layer_type="bottleneck",
    ),
}

# ------------------------------------------------------------------------------------- as people write their modules


class EinopsAttention(nn.Module):
    """Packed projection, rearrange with the number of heads only, einsum in words."""

    def __init__(self, heads: int = HEADS, head_dim: int = 14) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qkv = nn.Linear(WIDTH, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            einops.rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, -1)
        )
        scores = einops.einsum(query, key, "b h i d, b h j d -> b h i j") * self.scale
        mixed = einops.einsum(scores.softmax(-1), value, "b h i j, b h j d -> b h i d")
        return x + self.to_out(einops.rearrange(mixed, "b h n d -> b n (h d)"))


class PatchTransformer(nn.Module):
    """Patches cut out by rearrange, a class token, one packed rearrange into three with its sizes written down."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3 * 8 * 8, WIDTH), nn.LayerNorm(WIDTH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * 14), nn.Linear(HEADS * 14, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FFN), nn.GELU(), nn.Linear(FFN, WIDTH))
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(einops.rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8))
        x = torch.cat([einops.repeat(self.token, "1 1 d -> b 1 d", b=len(x)), x], 1) + self.position
        query, key, value = einops.rearrange(self.qkv(self.norm(x)), "b n (k h d) -> k b h n d", k=3, h=HEADS)
        mixed = (query @ einops.rearrange(key, "b h n d -> b h d n") * 14**-0.5).softmax(-1) @ value
        x = x + self.out(einops.rearrange(mixed, "b h n d -> b n (h d)"))
        return self.head(einops.reduce(x + self.mlp(x), "b n d -> b d", "mean"))


class ChunkedAttention(nn.Module):
    """``chunk(3)`` and ``F.scaled_dot_product_attention``, head size from the width."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.packed, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            t.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for t in self.packed(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).contiguous().view(batch, tokens, width))


class EinsumAttention(nn.Module):
    """Weights with an axis for the heads of their own, contracted by einsum."""

    def __init__(self, heads: int = HEADS, head_dim: int = 14) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(WIDTH, heads, head_dim) * 0.1) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, head_dim, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (torch.einsum("bnc,chd->bnhd", y, w) for w in (self.query, self.key, self.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 14**-0.5
        return x + torch.einsum("bhqk,bkhd,hdc->bqc", scores.softmax(-1), value, self.out)


class FunctionalWeights(nn.Module):
    """Bare parameters, ``F.linear``, ``F.layer_norm``; the packed projection is cut up by chunk.

    ``narrow``: by narrow at the width of the input, which no attribute can repair.
    """

    def __init__(self, narrow: bool) -> None:
        super().__init__()
        self.heads, self.narrow = HEADS, narrow
        self.packed, self.bias = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * 0.1), nn.Parameter(torch.zeros(3 * WIDTH))
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.up, self.down = nn.Parameter(torch.randn(WIDTH, FFN) * 0.1), nn.Parameter(torch.randn(FFN, WIDTH) * 0.1)
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        packed = F.linear(F.layer_norm(x, (width,), self.gain, self.shift), self.packed, self.bias)
        parts = packed.chunk(3, -1)
        if self.narrow:
            parts = tuple(packed.narrow(-1, i * width, width) for i in range(3))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=12**-0.5)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.out)
        return x + F.gelu(x @ self.up) @ self.down


class InPlace(nn.Module):
    """A gated network that writes into its own activations."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 34), nn.Linear(34, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate(x)
        hidden += self.up(x)
        F.silu(hidden, inplace=True)
        x = x.clone()
        x += self.down(hidden)
        other = self.wide(x)
        other.clamp_(min=-2).mul_(0.5).add_(0.1).relu_()
        out = self.narrow(other)
        out += x
        return out


class Perceptron(nn.Module):
    """The block after an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class GatedChunk(nn.Module):
    """One projection for gate and value, in the three usual spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_out = nn.Linear(WIDTH, 2 * FFN), nn.Linear(FFN, WIDTH)
        self.second, self.second_out = nn.Linear(WIDTH, 2 * 34), nn.Linear(34, WIDTH)
        self.third, self.third_out = nn.Linear(WIDTH, 2 * 26), nn.Linear(26, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        x = x + self.first_out(F.gelu(gate) * value)
        x = x + self.second_out(F.glu(self.second(x), dim=-1))
        packed = self.third(x)
        return x + self.third_out(packed[..., :26] * torch.sigmoid(packed[..., 26:]))


class AttentionList(nn.Module):
    """A list of small projections, one for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.ModuleList(nn.Linear(WIDTH, 14) for _ in range(HEADS)) for _ in range(3))
        self.out = nn.Linear(HEADS * 14, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = []
        for query, key, value in zip(self.query, self.key, self.value, strict=True):
            heads.append((query(y) @ key(y).mT * 14**-0.5).softmax(-1) @ value(y))
        return x + self.out(torch.cat(heads, dim=-1))


class CrossAttention(nn.Module):
    """Packed keys and values of a second sequence, ``split`` and ``torch.bmm`` over a merged batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.context, self.head = nn.Linear(21, WIDTH), nn.Linear(21, 44), nn.Linear(WIDTH, 7)
        self.heads, self.head_dim = HEADS, 14
        self.query, self.both = nn.Linear(WIDTH, HEADS * 14), nn.Linear(44, 2 * HEADS * 14)
        self.out = nn.Linear(HEADS * 14, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x.reshape(batch, tokens, self.heads, self.head_dim).permute(0, 2, 1, 3)
        return x.reshape(batch * self.heads, tokens, self.head_dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x, context = self.embed(x), F.relu(self.context(context))
        batch, tokens, _ = x.shape
        key, value = self.both(context).split(self.heads * self.head_dim, dim=-1)
        scores = torch.bmm(self.split(self.query(x)), self.split(key).transpose(1, 2)) / self.head_dim**0.5
        mixed = torch.bmm(scores.softmax(-1), self.split(value)).view(batch, self.heads, tokens, self.head_dim)
        mixed = mixed.permute(0, 2, 1, 3).reshape(batch, tokens, self.heads * self.head_dim)
        return self.head(x + self.out(mixed))


def convolutional() -> nn.Module:
    """A network without a class of its own."""
    return nn.Sequential(
        nn.Conv2d(3, 14, 3, padding=1, bias=False),
        nn.BatchNorm2d(14),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(14, 22, 3, stride=2), nn.GroupNorm(1, 22), nn.GELU()),
        nn.Conv2d(22, 26, 3),
        nn.PReLU(26),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(26 * 4, 34),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(34, 7),
    )


def _encoder(*parts: nn.Module) -> nn.Module:
    return SequenceClassifier(nn.Sequential(*parts))


BY_HAND: dict[str, Example] = {
    "einops": Example(lambda: _encoder(EinopsAttention(), Perceptron()), (SEQUENCE,)),
    "einops, patches": Example(PatchTransformer, (IMAGE,)),
    "chunk(3) and sdpa": Example(lambda: _encoder(ChunkedAttention(), Perceptron()), (SEQUENCE,)),
    "einsum": Example(lambda: _encoder(EinsumAttention(), Perceptron()), (SEQUENCE,)),
    "gates in one projection": Example(lambda: _encoder(GatedChunk()), (SEQUENCE,)),
    "functional weights": Example(lambda: SequenceClassifier(FunctionalWeights(narrow=True)), (SEQUENCE,)),
    "functional weights, chunk(3)": Example(lambda: SequenceClassifier(FunctionalWeights(narrow=False)), (SEQUENCE,)),
    "in-place operations": Example(lambda: _encoder(InPlace()), (SEQUENCE,)),
    "list of heads": Example(lambda: SequenceClassifier(AttentionList()), (SEQUENCE,)),
    "cross attention, bmm": Example(CrossAttention, (SEQUENCE, _noise(2, 6, 21))),
    "nn.Sequential": Example(convolutional, (IMAGE,)),
}

MODELS: dict[str, Example] = {**zoo.FAMILIES, **TRANSFORMERS, **zoo.BY_HAND, **BY_HAND}
