"""Tiny encoders of every family whose tokens can be pruned, with random batches of random lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.token_policies import TokenPolicy
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import ProvenTokens
from lightning_compress.tokens.runtime import TokenRuntime

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 60, 24, 3, 3, 11
Call = dict[str, Any]
ARGUMENTS = ("protected", "min_keep", "scatter", "train_mode", "fill")  # of `ProvenTokens.runtime`


class Encoder(nn.Module):
    """nn.TransformerEncoder over given states, read at the first token or at all."""

    def __init__(self, pooled: bool = True, layers: int = LAYERS, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, "dropout": 0.0, **options}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **options)
        self.encoder = nn.TransformerEncoder(
            layer, layers, enable_nested_tensor=not options.get("norm_first") and HEADS % 2 == 0
        )
        self.head = nn.Linear(WIDTH, 2)
        self.pooled = pooled

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        states = self.encoder(x, src_key_padding_mask=mask)
        return self.head(states[:, 0] if self.pooled else states)


def lengths(batch: int, tokens: int = LENGTH, seed: int = 0) -> Tensor:
    """Random numbers of tokens, at least one row full."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, tokens + 1, (batch,), generator=generator)
    numbers[0] = tokens
    return numbers


def states(
    batch: int = 3, tokens: int = LENGTH, seed: int = 0, padded: bool = True, dtype: Any = torch.float64
) -> Call:
    """A call of `Encoder`."""
    x = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    mask = torch.arange(tokens) >= lengths(batch, tokens, seed)[:, None]
    return {"x": x, "mask": mask if padded else None}


def words(batch: int = 3, tokens: int = LENGTH, seed: int = 0) -> Call:
    """A call of a text model."""
    ids = torch.randint(5, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths(batch, tokens, seed)[:, None]).long()}


def pictures(batch: int = 3, tokens: int = LENGTH, seed: int = 0) -> Call:
    """A call of a vision model: 16 patches, whatever ``tokens`` says."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)}


def _hugging(name: str, head: str, attention: str = "sdpa", **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**sizes)
        config._attn_implementation = attention
        return getattr(transformers, f"{name}{head}")(config)

    return build


_TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "vocab_size": VOCABULARY,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DISTIL = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * WIDTH, "vocab_size": VOCABULARY}
_DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
_MODERN = {k: v for k, v in _TEXT.items() if "dropout" not in k}
_MODERN |= {"global_attn_every_n_layers": 2, "local_attention": 6}
_MODERN |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_VISION = {k: v for k, v in _TEXT.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 4}
CLASSES, TAGS = "ForSequenceClassification", "ForTokenClassification"
_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "bert": ("Bert", _TEXT, {"classes": CLASSES, "tags": TAGS, "base": "Model"}),
    "roberta": ("Roberta", {**_TEXT, "pad_token_id": 1}, {"classes": CLASSES, "tags": TAGS, "base": "Model"}),
    "distilbert": ("DistilBert", _DISTIL, {"classes": CLASSES, "tags": TAGS, "base": "Model"}),
    "electra": ("Electra", {**_TEXT, "embedding_size": 16}, {"classes": CLASSES, "tags": TAGS, "base": "Model"}),
    "albert": ("Albert", {**_TEXT, "embedding_size": 16}, {"classes": CLASSES, "tags": TAGS, "base": "Model"}),
    "modernbert": ("ModernBert", _MODERN, {"classes": CLASSES, "tags": TAGS, "base": "Model"}),
    "vit": ("ViT", _VISION, {"classes": "ForImageClassification", "base": "Model"}),
    "deit": ("DeiT", _VISION, {"classes": "ForImageClassificationWithTeacher", "base": "Model"}),
}
BUILD: dict[str, Callable[[], nn.Module]] = {}
CALLS: dict[str, Callable[..., Call]] = {}
for _name, (_class, _sizes, _heads) in _FAMILIES.items():
    for _head, _suffix in _heads.items():
        for _attention in ("sdpa", "eager"):
            BUILD[f"{_name}-{_head}-{_attention}"] = _hugging(_class, _suffix, _attention, **_sizes)
            CALLS[f"{_name}-{_head}-{_attention}"] = pictures if _name in ("vit", "deit") else words
for _order in ("post", "pre"):
    for _pooled in (True, False):
        for _padded in (True, False):
            _key = f"torch-{_order}-{'first' if _pooled else 'all'}-{'padded' if _padded else 'whole'}"
            BUILD[_key] = lambda p=_pooled, o=_order: Encoder(p, norm_first=o == "pre")
            CALLS[_key] = lambda *a, p=_padded, **k: states(*a, padded=p, **k)


def built(name: str) -> nn.Module:
    """The model in float64 and evaluation mode, with weights that hide nothing."""
    torch.manual_seed(0)
    return shaken(BUILD[name]())


def shaken(model: nn.Module) -> nn.Module:
    """``model`` in float64 and evaluation mode, with perturbed weights."""
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tensors(output: Any) -> list[Tensor]:
    """All tensors in what a model returned."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values if value is not None for t in tensors(value)]


def furthest(one: Any, other: Any) -> float:
    """Largest difference between two outputs, relative to max(1, largest)."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert pairs
    pairs = [(a.detach(), b.detach()) for a, b in pairs]
    return max(float((a - b).abs().max() / max(1.0, float(a.abs().max()))) for a, b in pairs)


def outputs(model: nn.Module, proof: ProvenTokens, policy: TokenPolicy, mode: str, call: Call, **settings: Any) -> Any:
    """Outputs with a runtime, and the runtime; settings that are no arguments of it are set as attributes."""
    arguments = {k: v for k, v in settings.items() if k in ARGUMENTS}
    runtime: TokenRuntime = proof.runtime(policy, mode=mode, **arguments)
    for name in settings.keys() - arguments.keys():
        assert hasattr(runtime, name)
        setattr(runtime, name, settings[name])
    install_tokens(model, runtime)
    try:
        return model(**call), runtime
    finally:
        remove_tokens(model)
