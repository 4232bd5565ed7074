import copy
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import CoreEdit, Slice, Structure
from lightning_compress.surgery import SurgeryError, apply_plan, zero_units
from lightning_compress.surgery.attribute_paths import integers, read_attribute, write_attribute
from lightning_compress.surgery.attributes import Candidate, anchor, candidates, core_edits, selections
from lightning_compress.surgery.edits import Removal, evaluate


@dataclass(frozen=True)
class Frozen:
    units: int = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.units, self.flag = nn.Parameter(torch.ones(8, 2)), 8, True


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.core, self.shape = Layer(), nn.Linear(8, 2), Core(), (3, 8)
        self.number, self.text, self._hidden, self.config = 7, "8", 8, SimpleNamespace(units=8, other=9)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.units, self._private = Block(), 8, 8


def removal(kept: int = 3) -> Removal:
    """Four heads of two dims on the first layer's rows and the second layer's columns."""
    table = torch.arange(8).reshape(4, 2)
    heads = Polynomial.variable("heads")
    structure = Structure(
        "heads",
        "head",
        4,
        (
            Slice("block.first.weight", 0, 8, table, "producer"),
            Slice("block.second.weight", 1, 8, table, "consumer", zero=True),
        ),
        (heads, 2 * heads, heads * Polynomial.variable("unknown")),
    )
    return Removal(structure, tuple(range(kept)))


def names(found: list[Candidate]) -> set[tuple[str, str, str]]:
    return {(path, c.attribute, repr(c.size)) for c in found for path in c.modules}


def test_candidates_are_integers_near_the_weights_that_equal_a_size() -> None:
    found = candidates(removal(), dict(Model().named_modules()), {"heads": 4.0})
    assert names(found) == {
        ("block.first", "units", "Polynomial(2*heads)"),
        ("block", "shape[1]", "Polynomial(2*heads)"),
        ("block", "_hidden", "Polynomial(2*heads)"),
        ("block.core", "heads", "Polynomial(1*heads)"),  # no weights of its own, but beside them
        ("", "units", "Polynomial(2*heads)"),
        ("", "_private", "Polynomial(2*heads)"),
    }
    assert found[-1].modules == ("",)  # outside the structure: last


def test_candidates_in_configuration_objects_are_a_stage_of_their_own() -> None:
    found = candidates(removal(), dict(Model().named_modules()), {"heads": 4.0}, holders=True)
    assert names(found) == {("block", "config.units", "Polynomial(2*heads)")}


def test_a_size_that_does_not_change_is_no_candidate() -> None:
    assert candidates(removal(kept=4), dict(Model().named_modules()), {"heads": 4.0}) == []


def test_modules_of_one_class_in_one_place_share_a_candidate() -> None:
    table = torch.arange(8).unsqueeze(1)
    units = Polynomial.variable("units")
    model = nn.ModuleDict({"a": Layer(), "b": Layer(), "c": Layer()})
    pieces = [
        Slice(f"{name}.weight", 0, 8, table, role)  # type: ignore[arg-type]
        for name, role in (("a", "producer"), ("b", "producer"), ("c", "consumer"))
    ]
    structure = Structure("units", "ffn", 8, tuple(pieces), (units,))
    found = candidates(Removal(structure, (0,)), dict(model.named_modules()), {"units": 8.0})
    assert [c.modules for c in found] == [("a", "b"), ("c",)]  # q and k together, o apart


def candidate(name: str, size: int = 0) -> Candidate:
    return Candidate(("class", (), True, name, size), ("m",), name, Polynomial.constant(size))


def chosen(found: list[Candidate], limit: int = 100) -> list[str]:
    return ["".join(f"{c.attribute}{c.key[-1] or ''}" for c in s) for s in selections(found, limit)]


def test_selections_come_in_the_promised_order_once_each() -> None:
    assert chosen([]) == [""]
    assert chosen([candidate("a")]) == ["", "a"]
    assert chosen([candidate(n) for n in "abc"]) == ["", "abc", "bc", "ac", "ab", "a", "b", "c"]
    four = chosen([candidate(n) for n in "abcd"])
    assert four[:10] == ["", "abcd", "bcd", "acd", "abd", "abc", "a", "b", "c", "d"]
    assert len(four) == len(set(four)) == 16
    assert len(chosen([candidate(n) for n in "abcdefghij"], 64)) == 64


def test_one_attribute_never_gets_two_sizes() -> None:
    found = chosen([candidate("a", 1), candidate("a", 2), candidate("b")])
    assert found[:2] == ["", "a1b"] and "a2b" in found and not any("a1a2" in s for s in found)


def test_selections_are_lazy() -> None:
    many = [candidate(str(i)) for i in range(40)]
    assert len(list(islice(selections(many, 10**9), 50))) == 50


@pytest.mark.parametrize("path", ["units", "shape[1]", "sizes[0]", "config.units", "frozen.units", "config.sizes[1]"])
def test_attributes_are_read_and_written_without_touching_shared_objects(path: str) -> None:
    config, frozen, shape, sizes = SimpleNamespace(units=8, sizes=[1, 8]), Frozen(), (3, 8), [8, 3]
    module, twin = nn.Identity(), nn.Identity()
    for m in (module, twin):
        m.units, m.config, m.frozen, m.shape, m.sizes = 8, config, frozen, shape, sizes  # type: ignore[assignment]
    write_attribute(module, path, 5)
    assert read_attribute(module, path) == 5 and read_attribute(twin, path) == 8
    assert type(module.shape) is tuple and type(module.sizes) is list and (config.units, frozen.units) == (8, 8)


Pair = namedtuple("Pair", "first second")


def holding_containers() -> nn.Module:
    """A module whose sizes lie in containers, one inside another; some are data or no integers."""
    module = nn.Identity()
    for name, value in {
        "axes": {"h": 4, "d": 8, 3: 5, "no.name": 8, "nested": {"deep": (1, 8)}},
        "items": (("h", 4), ("d", 8)),
        "pair": Pair(2, 8),
        "cut": partial(torch.narrow, 0, 1, length=8, flag=True),
        "data": list(range(9)),
        "deep": [[[[8]]]],
    }.items():
        setattr(module, name, value)
    return module


def test_integers_inside_containers_are_found_and_exchanged_in_copies() -> None:
    module, twin = holding_containers(), nn.Identity()
    twin.__dict__.update(module.__dict__)
    found = dict(integers(module, holders=False))
    assert {path for path, value in found.items() if value == 8} == {
        *("axes['d']", "axes['nested']['deep'][1]", "items[1][1]", "pair[1]", "cut(length)"),
    }
    assert found["axes[3]"] == 5 and found["cut(0)"] == 0
    for path, value in found.items():
        assert read_attribute(module, path) == value
        write_attribute(module, path, 17)
        assert read_attribute(module, path) == 17 and read_attribute(twin, path) == value
    assert type(module.items) is tuple and type(module.pair) is Pair and type(module.axes) is dict
    assert type(module.cut) is partial and module.cut.keywords["flag"] is True
    for path in ("axes['x']", "items[7]", "pair(0)", "cut[0]", "items['h']"):
        with pytest.raises(AttributeError, match=r"."):
            read_attribute(module, path)
        with pytest.raises(AttributeError, match=r"."):
            write_attribute(module, path, 1)


class SplitHeads(nn.Module):
    """A helper whose size lies in a tuple of pairs, beside a dict that only describes it."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes, self._sizes = sizes, tuple(sizes.items())

    def forward(self, x: Tensor) -> Tensor:
        (name, size), *_ = self._sizes
        x = x.unflatten(-1, (size, -1) if name == "heads" else (-1, size))
        return x.transpose(-3, -2)


class ContainedSizes(nn.Module):
    """Attention whose head count and head size lie in containers of helpers, and in a partial function."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(20, 20) for _ in range(4))
        self.by_count, self.by_size, self.cut = SplitHeads(heads=4), SplitHeads(dim=5), partial(torch.split, dim=-1)
        self.values = partial(torch.unflatten, dim=-1, sizes=(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.by_count(self.query(x)), self.by_size(self.key(x))
        value = self.values(self.value(x)).transpose(-3, -2)
        mixed = (query @ key.mT * 5**-0.5).softmax(-1) @ value
        return self.out(mixed.transpose(-3, -2).flatten(-2))


def test_sizes_inside_containers_are_repaired() -> None:
    found = discover(ContainedSizes(), (torch.randn(2, 3, 20),), prove=True)
    assert [(s.kind, s.tier) for s in found] == [("head", "native"), ("qk_dim", "native"), ("vo_dim", "native")]


@pytest.mark.parametrize("path", ["a.b.c", "a[x]", "", "a(__b)", "a['b.c']", "a[0][0][0][0]"])
def test_other_paths_are_no_attributes(path: str) -> None:
    with pytest.raises(AttributeError):
        read_attribute(nn.Identity(), path)
    with pytest.raises(AttributeError):
        write_attribute(nn.Identity(), path, 1)


def test_evaluate() -> None:
    size = 2 * Polynomial.variable("a") * Polynomial.variable("b")
    assert evaluate(size, {"a": 3, "b": 2}, "a") == 12
    with pytest.raises(SurgeryError, match=r"Expected the kept counts of \['b'\] beside those of 'a'"):
        evaluate(size, {"a": 3}, "a")
    with pytest.raises(SurgeryError, match=r"to be a whole number for 'a', but got 0\.5"):
        evaluate(Polynomial.variable("a") * 0.5, {"a": 1}, "a")


def slices(*parameters: str) -> tuple[Slice, ...]:
    return tuple(Slice(p, 0, 8, torch.arange(8).unsqueeze(1), "producer") for p in parameters)


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        (("a.b.weight", "a.c.weight"), "a"),
        (("a.b.weight", "a.b.bias"), "a.b"),
        (("a.weight", "b.weight"), ""),
        (("weight",), ""),
        (("layers.1.q.weight", "layers.10.q.weight"), "layers"),
    ],
)
def test_anchor_is_the_innermost_common_module(parameters: tuple[str, ...], path: str) -> None:
    assert anchor(Structure("s", "ffn", 8, slices(*parameters))) == path


@pytest.mark.parametrize(
    ("kind", "axis"), [("head", "heads"), ("qk_dim", "qk_head_dim"), ("vo_dim", "vo_head_dim"), ("ffn", None)]
)
def test_core_edits_for_attention_of_torch(kind: str, axis: Any) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 4)})
    table = torch.arange(8).unsqueeze(1)
    structure = Structure(
        "s",
        kind,
        8,
        (
            *slices("attention.in_proj_weight"),
            Slice("attention.out_proj.weight", 1, 8, table, "consumer"),
        ),
    )
    expected = () if axis is None else (CoreEdit("attention", axis),)
    assert core_edits(structure, dict(model.named_modules())) == expected


class Plain(nn.Module):
    """Attention of torch between two projections, without a norm: its width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y + self.attention(y, y, y, need_weights=False)[0])


def test_the_width_through_an_attention_of_torch_goes_natively() -> None:
    torch.manual_seed(0)
    model, x = Plain().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    structures = discover(model, (x,), prove=True)
    width = next(s for s in structures if s.kind == "ffn")
    assert (width.units, width.tier, width.edits) == (12, "native", (CoreEdit("attention", "width"),))
    small, plan = copy.deepcopy(model), PruningPlan.of(model, structures, {s.name: [0, 2] for s in structures})
    apply_plan(small, plan, verify=((x,), {}))
    zero_units(model, plan)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    assert small.attention.in_proj_weight.shape[1] == 2
