"""Shares of the parameters, against counting elements one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover, explain
from lightning_compress.explanation import common_name, count_elements
from lightning_compress.structures import Structures
from tests.zoo import ENCODER, FFN, MODELS, WIDTH, _transformers


def counted(model: nn.Module, structures: Structures) -> tuple[int, int]:
    """Elements in a structure, and elements in a pinned family only: masks over whole tensors."""
    in_structure = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    in_pinned = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for structure in structures:
        for piece in structure.slices:
            if piece.parameter in in_structure:
                in_structure[piece.parameter].transpose(0, piece.axis)[piece.indices.reshape(-1)] = True
    for family in structures.pinned:
        for (name, axis), positions in family.positions.items():
            if name in in_pinned:
                in_pinned[name].transpose(0, axis)[positions] = True
    only_pinned = sum(int((in_pinned[name] & ~mask).sum()) for name, mask in in_structure.items())
    return sum(int(mask.sum()) for mask in in_structure.values()), only_pinned


@pytest.mark.parametrize(
    "name", ["nn.MultiheadAttention", "packed attention", "depthwise CNN", "BERT", "Llama", "LSTM"]
)
@pytest.mark.parametrize("prove", [False, True])
def test_shares_are_those_of_counting(name: str, prove: bool) -> None:
    example = MODELS[name]
    model = example.model()
    structures = discover(model, example.args, example.kwargs, prove=prove)
    explanation = explain(structures)
    total = sum(p.numel() for p in model.parameters())
    assert (explanation.prunable, explanation.whole) == counted(model, structures)
    assert explanation.parameters == total
    assert explanation.rest == total - explanation.prunable - explanation.whole >= 0
    for structure in structures:
        alone = structures.rebuilt([structure], pinned=())
        assert counted(model, alone)[0] == explain(alone).prunable


def test_an_element_of_two_families_counts_once() -> None:
    shapes = {"w": (6, 4), "b": (6,)}
    rows, columns = torch.tensor([0, 1]), torch.tensor([3])
    assert count_elements(shapes, [{("w", 0): rows}]) == 8
    assert count_elements(shapes, [{("w", 0): rows}, {("w", 1): columns}]) == 2 * 4 + 6 - 2
    assert count_elements(shapes, [{("w", 0): rows, ("b", 0): rows}, {("w", 0): rows}]) == 8 + 2
    assert count_elements(shapes, [{("a buffer", 0): rows}]) == 0


def test_what_a_pinned_family_owns_alone() -> None:
    """``out`` of the last layer is pinned: its bias belongs to no structure, its weight to the units that it reads."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    explanation = explain(discover(model, (torch.randn(3, 4),)))
    (pinned,) = explanation.pinned
    assert (pinned.parameters, pinned.unprunable) == (2 * 8 + 2, 2)
    assert "(2 units), 31.0% of the parameters (3.4% in no structure):" in str(explanation)
    assert (explanation.prunable, explanation.whole, explanation.rest, explanation.parameters) == (56, 2, 0, 58)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = nn.Linear(4, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_parameters_of_no_family_are_the_rest() -> None:
    explanation = explain(discover(Unused(), (torch.randn(3, 4),)))
    assert explanation.rest == 12
    assert "54.5% to no family" in str(explanation)


def test_twelve_layers_read_like_one() -> None:
    example = _transformers("BertForSequenceClassification", "BertConfig", MODELS["BERT"].kwargs or {}, **ENCODER)
    two = explain(discover(example.model(), kwargs=example.kwargs))
    options = {**ENCODER, "num_hidden_layers": 12}
    example = _transformers("BertForSequenceClassification", "BertConfig", MODELS["BERT"].kwargs or {}, **options)
    twelve = explain(discover(example.model(), kwargs=example.kwargs))
    assert len(str(twelve).splitlines()) == len(str(two).splitlines())
    titles = {row.title: row for row in twelve.structures}
    assert titles["bert.encoder.layer.*.ffn x 12"].members[11] == "bert.encoder.layer.11.ffn"
    assert titles["bert.encoder.layer.*.ffn x 12"].parameters == 12 * (2 * WIDTH * FFN + FFN)
    assert "it is normalised over (native_layer_norm in bert.encoder.layer.*.output.LayerNorm)" in str(twelve)


def test_names_keep_what_they_share() -> None:
    assert common_name(["a.0.b.1.c", "a.0.b.2.c"]) == "a.0.b.*.c"
    assert common_name(["only.3.one"]) == "only.3.one"


def test_without_shapes_there_are_no_shares() -> None:
    found = discover(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(3, 4),))
    text = str(explain(Structures(found, pinned=found.pinned)))
    assert "?" in text and "parameters belong" not in text and "%" not in text
