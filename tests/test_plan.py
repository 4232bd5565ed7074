import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan
from lightning_compress.plan_format import decode_ranges, encode_ranges
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import (
    AttributeEdit,
    CoreEdit,
    ShimEdit,
    Slice,
    Structure,
    Structures,
    named_tensors,
)
from tests.hand_made import Attention, FeedForward, attention_structures, feed_forward_structures, grid, pieces

# A reference that knows nothing of plans: positions that go, as Python sets, out of tables and kept units.


def reference_cut(
    tensors: Mapping[str, Tensor], structures: tuple[Structure, ...], kept: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    gone: dict[tuple[str, int], set[int]] = {}
    for structure in structures:
        for piece in structure.slices:
            for unit in range(structure.units):
                if unit not in kept[structure.name]:
                    gone.setdefault((piece.parameter, piece.axis), set()).update(piece.indices[unit].tolist())
    cut = dict(tensors)
    for (name, axis), positions in gone.items():
        # sizes are those before any removal, and every axis is cut once
        stay = [i for i in range(cut[name].shape[axis]) if i not in positions]
        cut[name] = cut[name].index_select(axis, torch.tensor(stay))
    return cut


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Random worlds: families of a x b positions, in any layout, some of them shared by two structures.


class Parameters(nn.Module):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            # every element differs, so that a wrong position shows
            self.register_parameter(name, nn.Parameter(torch.arange(1.0, 1 + np.prod(shape)).reshape(shape)))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[nn.Module, Structures]:
    shapes: dict[str, tuple[int, ...]] = {}
    structures = []
    sizes = []
    for f in range(draw(st.integers(1, 3))):
        a, b = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        size = a * b + draw(st.integers(0, 2))  # some positions may belong to nobody
        places = draw(st.one_of(st.just(list(range(size))), st.permutations(range(size))))[: a * b]
        by_row = torch.tensor(places, dtype=torch.long).reshape(a, b)
        shapes[f"out{f}"], shapes[f"in{f}"] = (size, 2), (3, size)
        sizes.append(size)
        for kind, table in (("head", by_row), ("vo_dim", by_row.t().contiguous()))[: draw(st.integers(1, 2))]:
            slices = [Slice(f"out{f}", 0, size, table, "producer"), Slice(f"in{f}", 1, size, table, "consumer", True)]
            if f:  # a matrix between two families has a structure on either axis
                slices.append(Slice("between", f - 1, size, table, "companion"))
            kept = Polynomial.variable(f"f{f}.{kind}")
            edits = draw(
                st.lists(
                    st.sampled_from(
                        [
                            AttributeEdit("m", "config.heads", 2 * kept + 1),
                            ShimEdit("m.o", "input", -1),
                            CoreEdit("m", "heads"),
                        ]
                    ),
                    max_size=2,
                )
            )
            tier = draw(st.sampled_from([None, "native", "shim"]))
            structures.append(
                Structure(f"f{f}.{kind}", kind, table.shape[0], tuple(slices), (kept,), tier, tuple(edits))
            )
    if len(sizes) > 1:
        shapes["between"] = (sizes[1], sizes[2] if len(sizes) > 2 else 4)
    return Parameters(shapes), Structures(structures)


def draw_kept(data: st.DataObject, structures: Structures) -> dict[str, tuple[int, ...]]:
    return {
        s.name: tuple(sorted(data.draw(st.sets(st.integers(0, s.units - 1), min_size=1), label=s.name)))
        for s in structures
    }


def draw_later(data: st.DataObject, structures: Structures, shapes: Mapping[str, tuple[int, ...]]) -> PruningPlan:
    """A plan over some of ``structures``."""
    some = [s for s in structures if data.draw(st.booleans(), label=f"with {s.name}")]
    kept = draw_kept(data, Structures(some))
    return PruningPlan(tuple(some), kept, {p: shapes[p] for s in some for p in s.parameters})


WORLDS = worlds()
DATA = st.data()


@given(WORLDS, DATA)
def test_positions_and_shapes_are_those_of_the_reference(world: tuple[nn.Module, Structures], data: Any) -> None:
    model, structures = world
    plan = PruningPlan.of(model, structures, draw_kept(data, structures))
    cut = reference_cut(named_tensors(model), plan.structures, plan.kept)
    assert plan.new_shapes() == {name: tuple(tensor.shape) for name, tensor in cut.items() if name in plan.shapes}
    kept, removed = plan.kept_positions(), plan.removed_positions()
    assert kept.keys() == removed.keys()
    for name, tensor in named_tensors(model).items():
        for axis in range(tensor.dim()):
            if (name, axis) in kept:
                both = torch.cat([kept[name, axis], removed[name, axis]])
                assert both.sort().values.tolist() == list(range(tensor.shape[axis]))
                assert len(removed[name, axis]) > 0
                tensor = tensor.index_select(axis, kept[name, axis])
        assert torch.equal(tensor, cut[name])
    assert plan.is_empty == (not removed)
    for s in structures:
        assert sorted((*plan.removed(s.name), *plan.kept[s.name])) == list(range(s.units))
        assert plan.counts[s.name] == len(plan.kept[s.name])


@given(WORLDS, DATA)
def test_load_of_save_is_the_plan(world: tuple[nn.Module, Structures], data: Any) -> None:
    model, structures = world
    plan = PruningPlan.of(model, structures, draw_kept(data, structures))
    assert PruningPlan.from_json(plan.to_json()) == plan


@given(WORLDS, DATA)
def test_slicing_twice_is_slicing_once_with_the_composition(world: tuple[nn.Module, Structures], data: Any) -> None:
    model, structures = world
    first = PruningPlan.of(model, structures, draw_kept(data, structures))
    once = reference_cut(named_tensors(model), first.structures, first.kept)
    smaller = first.shrunk(structures)
    later = draw_later(data, smaller, first.new_shapes())
    twice = reference_cut(once, later.structures, later.kept)
    both = first.compose(later)
    assert same(reference_cut(named_tensors(model), both.structures, both.kept), twice)
    assert both.new_shapes() == {name: tuple(twice[name].shape) for name in both.shapes}
    both.check(model)


@given(WORLDS, DATA)
def test_composition_is_associative(world: tuple[nn.Module, Structures], data: Any) -> None:
    model, structures = world
    everything = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    first = draw_later(data, structures, everything)
    then = first.shrunk(structures)
    second = draw_later(data, then, {**everything, **first.new_shapes()})
    third = draw_later(data, second.shrunk(then), {**everything, **first.new_shapes(), **second.new_shapes()})
    left, right = first.compose(second).compose(third), first.compose(second.compose(third))
    assert left.kept == right.kept
    assert left.shapes == right.shapes
    assert left.structures == right.structures


@given(WORLDS, DATA)
def test_the_identity_changes_nothing(world: tuple[nn.Module, Structures], data: Any) -> None:
    model, structures = world
    plan = PruningPlan.of(model, structures, draw_kept(data, structures))
    nothing = PruningPlan.of(model, structures, {})
    assert nothing.is_empty
    assert nothing.removed_positions() == {}
    assert nothing.new_shapes() == nothing.shapes
    assert nothing.shrunk(structures) == structures
    assert nothing.compose(plan) == plan
    smaller = plan.shrunk(structures)
    after = PruningPlan(tuple(smaller), {s.name: tuple(range(s.units)) for s in smaller}, plan.new_shapes())
    assert plan.compose(after) == plan


# Hand-sized cases


def test_heads_and_dims_share_an_axis() -> None:
    structures = attention_structures(heads=3, dims=4)
    plan = PruningPlan.of(Attention(), structures, {"head": [2, 0], "vo_dim": [1, 2, 3]})
    # head 1 owns 4..7, dim 0 owns 0, 4 and 8
    assert plan.removed_positions()["o.weight", 1].tolist() == [0, 4, 5, 6, 7, 8]
    assert plan.removed_positions()["q.weight", 0].tolist() == [4, 5, 6, 7]
    assert plan.new_shapes()["o.weight"] == (4, 6)
    assert plan.kept == {"head": (0, 2), "qk_dim": (0, 1, 2, 3), "vo_dim": (1, 2, 3)}
    assert plan.removed("head") == (1,)
    smaller = plan.shrunk(structures)
    assert smaller.counts == {"head": 2, "qk_dim": 4, "vo_dim": 3}
    heads_of_output = next(p for p in smaller["head"].slices if p.parameter == "o.weight")
    assert heads_of_output.indices.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert heads_of_output.size == 6
    assert smaller.macs == structures.macs
    # keep the second of the two heads and its dims 0 and 2: in the original head 2, dims 1 and 3
    later = PruningPlan(tuple(smaller), {"head": (1,), "qk_dim": (0, 1, 2, 3), "vo_dim": (0, 2)}, plan.new_shapes())
    assert plan.compose(later).kept == {"head": (2,), "qk_dim": (0, 1, 2, 3), "vo_dim": (1, 3)}


def test_a_shim_keeps_its_width_after_a_plan() -> None:
    structures = attention_structures(heads=3, dims=4, tokens=5)
    structures = structures.rebuilt(replace(s, tier="shim") if s.name == "qk_dim" else s for s in structures)
    plan = PruningPlan.of(Attention(), structures, {"qk_dim": [0, 1]})
    counts = {"head": 2, "qk_dim": 1, "vo_dim": 4}
    assert plan.shrunk(structures).macs.evaluate(counts) == structures.macs.evaluate(counts)
    assert plan.shrunk(structures).params == structures.params


def test_kept_units_may_come_in_any_order_and_as_tensors_or_numpy_integers() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    assert PruningPlan.of(model, structures, {"ffn": torch.tensor([3, 1])}).kept == {"ffn": (1, 3)}
    assert PruningPlan.of(model, structures, {"ffn": np.array([0, 2])}).kept == {"ffn": (0, 2)}  # type: ignore[dict-item]


def test_a_plan_is_its_own_copy() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    plan = PruningPlan.of(model, structures, {"ffn": [0]})
    kept = dict(plan.kept)
    copy = PruningPlan(plan.structures, kept, plan.shapes)
    kept["ffn"] = (1,)
    assert copy.kept == {"ffn": (0,)}
    with pytest.raises(AttributeError):
        copy.kept = {}  # type: ignore[misc]


# What the constructor refuses

FFN = feed_forward_structures()[0]
SHAPES = {"up.weight": (4, 3), "up.bias": (4,), "down.weight": (2, 4)}


def with_slice(**changes: Any) -> tuple[Structure, ...]:
    return (replace(FFN, slices=(replace(FFN.slices[0], **changes), *FFN.slices[1:])),)


@pytest.mark.parametrize(
    ("structures", "kept", "shapes", "message"),
    [
        ((FFN, FFN), {"ffn": (0,)}, SHAPES, r"unique in a plan, but got \['ffn'\] more than once"),
        ((FFN,), {}, SHAPES, r"\['ffn'\] have none and \[\] are no structures"),
        ((FFN,), {"ffn": (0,), "x": (1,)}, SHAPES, r"\[\] have none and \['x'\] are no structures"),
        ((FFN,), {"ffn": ()}, SHAPES, "'ffn' to keep at least one of its 4 units, but got none"),
        ((FFN,), {"ffn": (1, 0)}, SHAPES, r"'ffn' to be strictly increasing, but got \(1, 0\)"),
        ((FFN,), {"ffn": (0, 0)}, SHAPES, r"'ffn' to be strictly increasing, but got \(0, 0\)"),
        ((FFN,), {"ffn": (-1, 0)}, SHAPES, r"'ffn' to lie in \[0, 4\), but got \(-1, 0\)"),
        ((FFN,), {"ffn": tuple(range(9))}, SHAPES, r"lie in \[0, 4\), but got \(0, 1, 2, 3, \.\.\., 8\)"),
        ((FFN,), {"ffn": (0,)}, {}, "Expected a shape for 'up.weight' of structure 'ffn'"),
        ((FFN,), {"ffn": (0,)}, {**SHAPES, "up.bias": (5,)}, r"axis 0 of 'up.bias'.* size 4, but the shape is \(5,\)"),
        (with_slice(axis=2), {"ffn": (0,)}, SHAPES, r"axis 2 of 'up.weight' .* but the shape is \(4, 3\)"),
        (with_slice(indices=torch.zeros(3, 1).long()), {"ffn": (0,)}, SHAPES, r"int64 of shape \(4, positions\)"),
        (with_slice(indices=torch.zeros(4, 0).long()), {"ffn": (0,)}, SHAPES, r"int64 of shape \(4, positions\)"),
        (with_slice(indices=torch.zeros(4, 1)), {"ffn": (0,)}, SHAPES, "but got torch.float32"),
        (with_slice(indices=torch.arange(1, 5)[:, None]), {"ffn": (0,)}, SHAPES, r"lie in \[0, 4\), but got 1 to 4"),
        (with_slice(indices=torch.zeros(4, 1).long()), {"ffn": (0,)}, SHAPES, "to belong to one unit"),
    ],
)
def test_what_does_not_fit_together_is_refused(structures: Any, kept: Any, shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningPlan(structures, kept, shapes)


@pytest.mark.parametrize("unit", [True, 0.0, "0", None])
def test_units_are_integers(unit: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"of 'ffn' to be unit numbers (integers), but got {unit!r}")):
        PruningPlan((FFN,), {"ffn": (unit,)}, SHAPES)


def test_an_axis_is_never_emptied() -> None:
    # two structures that own the same two positions, one unit each way
    a = Structure("a", "ffn", 2, (Slice("w", 0, 2, torch.tensor([[0], [1]]), "producer"),))
    b = replace(a, name="b")
    with pytest.raises(ValueError, match="this plan empties axis 0 of 'w'"):
        PruningPlan((a, b), {"a": (0,), "b": (1,)}, {"w": (2,)})


def test_a_partly_removed_unit_has_no_table() -> None:
    whole = Structure("whole", "ffn", 2, (Slice("w", 0, 4, torch.tensor([[0, 1], [2, 3]]), "producer"),))
    part = Structure("part", "channel", 2, (Slice("w", 0, 4, torch.tensor([[0], [3]]), "producer"),))
    plan = PruningPlan((whole, part), {"whole": (0, 1), "part": (1,)}, {"w": (4,)})
    with pytest.raises(ValueError, match=r"each kept unit of 'whole' to keep the same number .* but got 1 to 2"):
        plan.shrunk(Structures([whole, part]))


def test_shrunk_wants_structures_of_the_planned_model() -> None:
    plan = PruningPlan.of(FeedForward(), feed_forward_structures(), {"ffn": [0, 1]})
    with pytest.raises(ValueError, match=r"axis 0 of 'up.weight' to have size 4 in structure 'ffn', .* but got 6"):
        plan.shrunk(feed_forward_structures(units=6))


def test_names_are_checked_with_a_guess() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    with pytest.raises(ValueError, match=r"among \['ffn'\], but got 'fnn'\. Did you mean 'ffn'\?"):
        PruningPlan.of(model, structures, {"fnn": [0]})
    plan = PruningPlan.of(model, structures, {})
    with pytest.raises(ValueError, match=r"one of \['ffn'\], but got 'fnn'\. Did you mean 'ffn'\?"):
        plan.removed("fnn")


def test_of_wants_the_model_of_the_structures() -> None:
    with pytest.raises(ValueError, match=r"to have 'up.weight' \(structure 'ffn'\), but it has none"):
        PruningPlan.of(Attention(), feed_forward_structures(), {})


# The plan and a model


def test_check_passes_for_the_model_and_changes_nothing() -> None:
    model = FeedForward()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    PruningPlan.of(model, feed_forward_structures(), {"ffn": [0]}).check(model)
    assert same(before, dict(named_tensors(model)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FeedForward(units=2), r"'up.weight' to have shape \(4, 3\), .* but got \(2, 3\)\. .* already applied"),
        (FeedForward(units=3), r"'up.weight' to have shape \(4, 3\), .* but got \(3, 3\)\. This is a plan for another"),
        (
            FeedForward(outputs=1),
            r"'down.weight' to have shape \(2, 4\), .* but got \(1, 4\)\. This is a plan for another",
        ),
        (Attention(), r"'up.weight' \(structure 'ffn'\), but it has none\. This is a plan for another model"),
        (nn.Sequential(FeedForward()), r"It has '0.up.weight': .* wrapped or compiled; pass its sub-module '0'"),
    ],
)
def test_check_refuses_another_model(other: nn.Module, message: str) -> None:
    plan = PruningPlan.of(FeedForward(), feed_forward_structures(), {"ffn": [0, 3]})
    with pytest.raises(ValueError, match=message):
        plan.check(other)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (
            PruningPlan.of(FeedForward(), feed_forward_structures(), {}),
            r"'up.weight' has shape \(2, 3\), but there it has \(4, 3\)",
        ),
        (
            PruningPlan(
                (Structure("ffn", "ffn", 3, (Slice("z", 0, 3, grid(3, 1)[0], "producer"),)),),
                {"ffn": (0,)},
                {"z": (3,)},
            ),
            "'ffn' has 2 units, but there it has 3",
        ),
        (
            PruningPlan(
                (Structure("ffn", "ffn", 2, (Slice("up.bias", 0, 2, torch.tensor([[1], [0]]), "producer"),)),),
                {"ffn": (0,)},
                {"up.bias": (2,)},
            ),
            "units of 'ffn' to own the same positions on axis 0 of 'up.bias'",
        ),
    ],
)
def test_compose_refuses_a_plan_for_another_model(later: PruningPlan, message: str) -> None:
    plan = PruningPlan.of(FeedForward(), feed_forward_structures(), {"ffn": [0, 3]})
    with pytest.raises(ValueError, match=message):
        plan.compose(later)


# The file


@pytest.mark.parametrize(
    ("values", "ranges"),
    [
        ([], []),
        ([5], [5]),
        ([5, 6], [[5, 7]]),
        ([5, 7], [5, 7]),
        ([0, 1, 2, 7, 10, 12, 14], [[0, 3], 7, [10, 16, 2]]),
        ([3, 2, 1], [[3, 0, -1]]),
        ([1, 1], [1, 1]),
    ],
)
def test_integers_as_ranges(values: list[int], ranges: list[Any]) -> None:
    assert encode_ranges(values) == ranges
    assert decode_ranges(ranges, "x", 16, 16) == values


@given(st.lists(st.integers(0, 30)))
def test_ranges_keep_every_integer_in_order(values: list[int]) -> None:
    assert decode_ranges(encode_ranges(values), "x", 31, len(values)) == values


def test_a_plan_of_many_units_is_a_short_file() -> None:
    heads, _ = grid(64, 128)
    structure = Structure("a", "head", 64, pieces("v", 0, heads))
    plan = PruningPlan((structure,), {"a": tuple(range(0, 64, 2))}, {"v.weight": (8192, 4), "v.bias": (8192,)})
    text = plan.to_json()
    assert len(text) < 600
    assert '"kept":[[0,64,2]]' in text
    assert '{"stride":128,"pattern":[[0,128]]}' in text


def test_save_and_load(tmp_path: Path) -> None:
    plan = PruningPlan.of(Attention(), attention_structures(), {"head": [0]})
    path = tmp_path / "plan.json"
    path.write_text("old")
    plan.save(path)
    assert PruningPlan.load(path) == plan
    assert PruningPlan.load(str(path)) == plan
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    plan = PruningPlan.of(FeedForward(), feed_forward_structures(), {})
    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: Malformed pruning plan: expected plan to have the keys"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be parsed"),
        ("{", "cannot be parsed"),
        ("[" * 100_000, "cannot be parsed"),
        ("[]", r"expected plan to be an object with the keys \['format', .*but got \[\]"),
        ('{"format": 1, "format": 2}', r"each key once in an object, but got \['format'\] twice"),
        ('{"format": NaN}', "finite numbers, but got NaN"),
        ('{"format": -Infinity}', "finite numbers, but got -Infinity"),
    ],
)
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_json(text)


def at(*path: Any) -> Callable[[Any], Callable[[Any], None]]:
    """``at("a", 0)(value)``: a change that puts value at data["a"][0]."""

    def change(value: Any) -> Callable[[Any], None]:
        def apply(data: Any) -> None:
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = value

        return apply

    return change


STRUCTURE = ("structures", 0)
SLICE = (*STRUCTURE, "slices", 0)
EDITS = (*STRUCTURE, "edits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("format")("pickle"), r"format to be 'lightning_compress\.plan', but got 'pickle'"),
        (at("version")(3), r"version to be 2 \(newer plans .*but got 3"),
        (at("verified")(1), "verified to be true or false, but got 1"),
        (at("version")(True), "version to be 2 .*but got True"),
        (at("surprise")(1), r"plan to have the keys .*\[\] are missing and \['surprise'\] are unknown"),
        (at("shapes")([]), "shapes to be an object from parameter name to shape"),
        (at("shapes", "up.bias")(4), r"shapes\['up\.bias'\] to be a list, but got 4"),
        (at("shapes", "up.bias")([-4]), r"shapes\['up\.bias'\]\[0\] to be an integer from 0 to"),
        (at("shapes", "up.bias")([1] * 17), r"shapes\['up\.bias'\] to be a list of at most 16 sizes"),
        (at("shapes", "up.bias")([5]), r"Malformed pruning plan: Expected axis 0 of 'up\.bias' .* to have size 4"),
        (at("structures")({}), "structures to be a list"),
        (at(*STRUCTURE)(3), r"structures\[0\] to be an object with the keys"),
        (at(*STRUCTURE, "name")(3), r"structures\[0\]\.name to be a string"),
        (at(*STRUCTURE, "kind")("tail"), r"structures\[0\]\.kind to be one of \('head', .*but got 'tail'"),
        (at(*STRUCTURE, "units")(0), r"structures\[0\]\.units to be an integer from 1 to \d+, but got 0"),
        (at(*STRUCTURE, "units")(4.0), r"structures\[0\]\.units to be an integer"),
        (at(*STRUCTURE, "units")(10**30), r"structures\[0\]\.units to be an integer"),
        (at(*STRUCTURE, "units")(3), "Malformed pruning plan: "),
        (at(*STRUCTURE, "tier")("magic"), r"structures\[0\]\.tier to be one of \('native', 'shim'\), but got 'magic'"),
        (at(*STRUCTURE, "kept")(0), r"structures\[0\]\.kept to be a list"),
        (at(*STRUCTURE, "kept")([4]), r"structures\[0\]\.kept\[0\] to be an integer from 0 to 3, but got 4"),
        (at(*STRUCTURE, "kept")([True]), r"structures\[0\]\.kept\[0\] to be an integer from 0 to 3, but got True"),
        (
            at(*STRUCTURE, "kept")([[0, 5]]),
            r"structures\[0\]\.kept\[0\] to be a range of one or more integers from 0 to 3",
        ),
        (at(*STRUCTURE, "kept")([[2, 2]]), r"structures\[0\]\.kept\[0\] to be a range of one or more"),
        (at(*STRUCTURE, "kept")([[0, 4, 0]]), r"structures\[0\]\.kept\[0\] to be a range of one or more"),
        (at(*STRUCTURE, "kept")([[0, 10**12]]), r"structures\[0\]\.kept\[0\]\[1\] to be an integer from -4 to 8"),
        (at(*STRUCTURE, "kept")([[0]]), r"kept\[0\] to be an integer, \[start, stop\] or \[start, stop, step\]"),
        (at(*STRUCTURE, "kept")([[0, 4], [0, 4]]), r"structures\[0\]\.kept to be at most 4 integers"),
        (at(*STRUCTURE, "kept")([0, 1, 2, 3, 0]), r"structures\[0\]\.kept to be at most 4 integers"),
        (at(*STRUCTURE, "kept")([1, 0]), r"Malformed pruning plan: Expected kept units .* strictly increasing"),
        (at(*STRUCTURE, "kept")([]), r"Malformed pruning plan: Expected structure 'ffn' to keep at least one"),
        (at(*STRUCTURE, "sizes")([3]), r"structures\[0\]\.sizes\[0\] to be a list"),
        (at(*STRUCTURE, "sizes")([[3]]), r"sizes\[0\]\[0\] to be a list \[coefficient, \[variable, \.\.\.\]\]"),
        (at(*STRUCTURE, "sizes")([[["1", []]]]), r"sizes\[0\]\[0\]\[0\] to be a finite number, but got '1'"),
        (at(*STRUCTURE, "sizes")([[[1, [2]]]]), r"sizes\[0\]\[0\]\[1\]\[0\] to be a string, but got 2"),
        (at(*STRUCTURE, "sizes")([[[1, ["b", "a"]]]]), r"sizes\[0\]\[0\]\[1\] to be sorted variables"),
        (at(*STRUCTURE, "sizes")([[[1, ["a"]], [2, ["a"]]]]), r"sizes\[0\]\[1\]\[1\] to be .* in no other term"),
        (at(*SLICE, "role")("thief"), r"slices\[0\]\.role to be one of \('producer', 'consumer', 'companion'\)"),
        (at(*SLICE, "zero")(1), r"slices\[0\]\.zero to be true or false, but got 1"),
        (at(*SLICE, "axis")(-1), r"slices\[0\]\.axis to be an integer from 0 to 15, but got -1"),
        (at(*SLICE, "size")(0), r"slices\[0\]\.size to be an integer from 1"),
        (at(*SLICE, "indices")({"stride": 1}), r"indices to have the keys .*\['pattern'\] are missing"),
        (at(*SLICE, "indices", "stride")(9), r"indices\.stride to be an integer from -4 to 4"),
        (at(*SLICE, "indices", "stride")(2), r"indices to be positions from 0 to 3, but got \[0, 6\]"),
        (at(*SLICE, "indices", "pattern")([0, 1]), r"indices\.pattern to be at most 1 integers"),
        (at(*SLICE, "indices")({"rows": [[0]]}), r"indices\.rows to be a list of 4 rows, one per unit"),
        (at(*SLICE, "indices")({"rows": [[0], [1], [2], []]}), r"indices\.rows\[3\] to be 1 positions like the first"),
        (
            at(*SLICE, "indices")({"rows": [[0], [0], [2], [3]]}),
            "Malformed pruning plan: Expected each position of axis 0",
        ),
        (at(*EDITS, 0)("x"), r'edits\[0\] to be an object with the key "edit"'),
        (
            at(*EDITS, 0, "edit")("exec"),
            r"edits\[0\]\.edit to be one of \('attribute', 'shim', 'core', 'module'\), but got 'exec'",
        ),
        (at(*EDITS, 0, "attribute")("__class__"), r"edits\[0\]\.attribute to be an attribute name"),
        (at(*EDITS, 0, "attribute")("a.b.c"), r"edits\[0\]\.attribute to be an attribute name"),
        (at(*EDITS, 0, "attribute")("a.__b"), r"edits\[0\]\.attribute to be an attribute name"),
        (at(*EDITS, 0, "attribute")("a[-1]"), r"edits\[0\]\.attribute to be an attribute name"),
        (
            at(*EDITS, 0)({"edit": "shim", "module": "m", "side": "top", "dim": 0}),
            r"side to be one of \('output', 'input'\)",
        ),
        (
            at(*EDITS, 0)({"edit": "shim", "module": "m", "side": "input", "dim": 99}),
            r"edits\[0\]\.dim to be an integer",
        ),
        (at(*EDITS, 0)({"edit": "core", "module": "m", "axis": "x"}), r"edits\[0\]\.axis to be one of \('heads', "),
        (at("structures", 0, "floor")(9), r"structures\[0\]\.floor to be an integer from 0 to"),
        (at("structures", 0, "norms")([["norm"]]), r"norms\[0\] to be a list \[module, dimension\]"),
        (at("structures", 0, "norms")([["norm", 1]]), r"norms\[0\]\[1\] to be an integer"),
        (at("structures", 0, "members")(["layer"]), r"members to be a list of \d+ module paths, one per unit"),
    ],
)
def test_a_malformed_plan_is_refused_with_its_key_path(change: Callable[[Any], None], message: str) -> None:
    data = json.loads(PruningPlan.of(FeedForward(), feed_forward_structures(), {"ffn": [0, 3]}).to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_json(json.dumps(data))


def test_two_structures_of_one_name_are_refused() -> None:
    data = json.loads(PruningPlan.of(FeedForward(), feed_forward_structures(), {}).to_json())
    data["structures"] *= 2
    with pytest.raises(
        ValueError, match=r"structures\[1\]\.name to be a name that no other structure has, but got 'ffn'"
    ):
        PruningPlan.from_json(json.dumps(data))
