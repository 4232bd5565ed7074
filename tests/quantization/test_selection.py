"""Which weights are quantized: kinds are found by what weights do, in models of any make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.quantization import QuantizationError, attach_quantizers, select_weights, weight_kinds
from lightning_compress.quantizers import Binary, Stochastic, Uniform


def bert() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30, num_labels=2
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.arange(8).view(2, 4)}


class Own(nn.Module):
    """Packed projections, a tied table and weights without a layer, in names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(12, 8)
        self.b = nn.Linear(8, 24)
        self.c = nn.Linear(8, 8)
        self.d = nn.Parameter(torch.randn(16, 8))
        self.e = nn.Parameter(torch.randn(8, 16))
        self.f = nn.Parameter(torch.randn(1, 5, 8))  # positions
        self.g = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.a(ids) + self.f[:, : ids.shape[1]]
        q, k, v = self.b(x).view(*ids.shape, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.c(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = self.g(x + torch.relu(x @ self.d.T) @ self.e.T)
        return x @ self.a.weight.T


def test_kinds_of_a_transformer() -> None:
    model, call = bert()
    modes = [module.training for module in model.modules()]
    kinds = weight_kinds(model, (), call)
    assert [module.training for module in model.modules()] == modes
    layer = "bert.encoder.layer.0"
    parts = {name.removeprefix(layer): kind for name, kind in kinds.items() if name.startswith(layer)}
    assert parts == {
        ".attention.self.query.weight": "attention",
        ".attention.self.key.weight": "attention",
        ".attention.self.value.weight": "attention",
        ".attention.output.dense.weight": "attention",
        ".intermediate.dense.weight": "ffn",
        ".output.dense.weight": "ffn",
    }
    assert {n for n, k in kinds.items() if k == "head"} == {"bert.pooler.dense.weight", "classifier.weight"}
    assert all("embeddings" in n for n, k in kinds.items() if k == "embedding")
    assert sum(kind == "embedding" for kind in kinds.values()) == 3


def test_kinds_go_by_use_and_not_by_name() -> None:
    kinds = weight_kinds(Own(), (torch.arange(8).view(2, 4),))
    assert kinds == {
        "a.weight": "embedding",
        "b.weight": "attention",
        "c.weight": "attention",
        "d": "ffn",
        "e": "ffn",
    }


def test_kinds_of_other_models() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    kinds = weight_kinds(nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3)), (torch.randn(2, 4, 5),))
    assert kinds == {
        "0.weight": "other",
        "1.self_attn.in_proj_weight": "attention",
        "1.self_attn.out_proj.weight": "attention",
        "1.linear1.weight": "ffn",
        "1.linear2.weight": "ffn",
        "2.weight": "head",
    }
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten())
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    assert set(weight_kinds(cnn, (torch.randn(2, 3, 6, 6),)).values()) == {"channel"}
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())
    assert weight_kinds(nn.Linear(3, 2), (torch.randn(1, 3),)) == {"weight": "other"}


def test_kinds_do_not_change_with_quantizers() -> None:
    model, call = bert()
    kinds = weight_kinds(model, (), call)
    attach_quantizers(model, select_weights(kinds, "int8", None))
    assert weight_kinds(model, (), call) == kinds


def test_selection() -> None:
    model, call = bert()
    kinds = weight_kinds(model, (), call)
    everything = select_weights(kinds, "int8", None)
    assert everything == {name: Uniform(8) for name, kind in kinds.items() if kind != "embedding"}
    assert set(select_weights(kinds, Stochastic(4), "attention")) == {n for n, k in kinds.items() if k == "attention"}
    both = select_weights(kinds, "int8", ("ffn", "embedding"))
    assert set(both) == {n for n, k in kinds.items() if k in ("ffn", "embedding")}
    chosen = select_weights(
        kinds,
        None,
        {"attention": "binary", "ffn": "int4", "bert.encoder.layer.1.*": Stochastic(2), "*.query": "int8"},
    )
    layer = "bert.encoder.layer."
    assert chosen[f"{layer}0.attention.self.key.weight"] == Binary()
    assert chosen[f"{layer}0.attention.self.query.weight"] == Uniform(8)
    assert chosen[f"{layer}0.output.dense.weight"] == Uniform(4)
    assert chosen[f"{layer}1.output.dense.weight"] == Stochastic(2)
    assert chosen[f"{layer}1.attention.self.query.weight"] == Uniform(8)
    assert "classifier.weight" not in chosen
    assert select_weights(kinds, "int4", "classifier.weight") == {"classifier.weight": Uniform(4)}


def test_what_fits_nothing_is_refused_with_what_there_is() -> None:
    model, call = bert()
    kinds = weight_kinds(model, (), call)
    with pytest.raises(QuantizationError, match=r"'channel' fits none. There are 8 of kind 'attention', 4 of kind"):
        select_weights(kinds, "int8", "channel")
    with pytest.raises(QuantizationError, match=r"'decoder.\*' fits none.*in modules such as 'bert.embeddings"):
        select_weights(kinds, "int8", ["attention", "decoder.*"])
    with pytest.raises(QuantizationError, match=r"Expected a quantizer for 'ffn', but got none: give weights="):
        select_weights(kinds, None, "ffn")
    with pytest.raises(QuantizationError, match=r"the model has none of the kinds"):
        select_weights({"table": "embedding"}, "int8", None)
    with pytest.raises(ValueError, match=r"but got 'int12'"):
        select_weights(kinds, "int12", "ffn")
