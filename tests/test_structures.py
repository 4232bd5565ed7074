import pytest
import torch
from torch import nn

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import KINDS, Pinned, Slice, Structure, Structures, check_kinds, named_tensors
from tests.hand_made import FeedForward, attention_structures, feed_forward_structures, grid, joined


def test_positions_and_owners_of_a_slice() -> None:
    # three units of two positions on an axis of eight: 0 and 7 belong to nobody
    piece = Slice("w", 0, 8, torch.tensor([[1, 4], [2, 5], [3, 6]]), "producer")
    assert piece.positions([2, 0]).tolist() == [1, 3, 4, 6]
    assert piece.positions([]).tolist() == []
    assert piece.unit_of_position().tolist() == [-1, 0, 1, 2, 0, 1, 2, -1]


def test_slices_are_equal_by_value() -> None:
    table, other = grid(2, 3)
    piece = Slice("w", 0, 6, table, "producer")
    assert piece == Slice("w", 0, 6, table.clone(), "producer")
    assert hash(piece) == hash(Slice("w", 0, 6, table.clone(), "producer"))
    assert piece != Slice("w", 0, 6, other, "producer")
    assert piece != Slice("w", 0, 6, table, "producer", zero=True)
    assert piece != Slice("w", 1, 6, table, "producer")
    assert piece != "w"


def test_parameters_are_named_once_in_order() -> None:
    assert feed_forward_structures()[0].parameters == ("up.weight", "up.bias", "down.weight")


def test_structures_are_found_by_position_and_by_name() -> None:
    structures = attention_structures()
    assert structures[1] is structures["qk_dim"]
    assert [s.name for s in structures[1:]] == ["qk_dim", "vo_dim"]
    assert structures.counts == {"head": 3, "qk_dim": 4, "vo_dim": 4}
    with pytest.raises(KeyError, match=r"one of \['head', 'qk_dim', 'vo_dim'\], but got 'heads'"):
        structures["heads"]


def test_names_are_unique() -> None:
    structure = feed_forward_structures()[0]
    with pytest.raises(ValueError, match=r"names to be unique, but got \['ffn'\] more than once"):
        Structures([structure, structure])


def test_costs_are_those_of_the_model() -> None:
    model = FeedForward()
    structures = feed_forward_structures()
    assert structures.params.evaluate(structures.counts) == sum(p.numel() for p in model.parameters())
    assert structures.macs.evaluate(structures.counts) == model.up.weight.numel() + model.down.weight.numel()
    smaller = FeedForward(units=2)
    assert structures.params.evaluate({"ffn": 2}) == sum(p.numel() for p in smaller.parameters())


def test_a_shim_keeps_its_width_in_products_of_activations() -> None:
    from dataclasses import replace

    structures = attention_structures(heads=3, dims=4, tokens=5)
    shimmed = structures.rebuilt(replace(s, tier="shim") if s.name == "qk_dim" else s for s in structures)
    counts = {"head": 2, "qk_dim": 1, "vo_dim": 3}
    weight = (2 * 1 + 2 * 3) * 2 * 5 * 4
    assert structures.macs.evaluate(counts) == weight + (2 * 1 + 2 * 3) * 25
    assert shimmed.macs.evaluate(counts) == weight + (2 * 4 + 2 * 3) * 25


def test_of_kind_makes_what_it_leaves_out_constant() -> None:
    structures = joined(attention_structures(heads=3, dims=4), feed_forward_structures())
    heads = structures.of_kind("head")
    assert [s.name for s in heads] == ["head"]
    assert heads.macs.variables == {"head"}
    assert heads.macs.evaluate({"head": 2}) == structures.macs.evaluate({**structures.counts, "head": 2})
    assert heads.params.evaluate({"head": 2}) == structures.params.evaluate({**structures.counts, "head": 2})
    assert heads.pinned == structures.pinned
    assert [s.name for s in structures.of_kind("ffn", "vo_dim")] == ["vo_dim", "ffn"]


def test_rebuilt_may_replace_the_pinned_families() -> None:
    pinned = (Pinned("x", "unknown", 3, ("w",), ("because",)),)
    assert feed_forward_structures().rebuilt([], pinned).pinned == pinned


def test_unknown_kinds_are_refused_with_a_guess() -> None:
    with pytest.raises(ValueError, match=r"Expected kinds to be among .*but got 'heads'\. Did you mean 'head'\?"):
        attention_structures().of_kind("heads")
    with pytest.raises(ValueError, match=r"but got 'nonsense'\.$"):
        check_kinds(["nonsense"])
    with pytest.raises(ValueError, match="at least one kind"):
        check_kinds([])
    assert check_kinds("head") == ("head",)
    assert check_kinds(KINDS) == KINDS


def test_named_tensors_lists_buffers_and_every_name_of_a_shared_tensor() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    tensors = named_tensors(model)
    assert tensors["2.weight"] is tensors["0.weight"]
    assert "1.running_mean" in tensors


def test_empty_structures_cost_nothing() -> None:
    assert Structures().macs == Polynomial()
    assert Structures().counts == {}
    assert Structure("x", "ffn", 1, ()).parameters == ()
