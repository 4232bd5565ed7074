"""Whatever is kept: the small model is the zeroed one, what is reported is what is counted, and rounds add up."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import Structures
from lightning_compress.surgery import apply_plan, zero_units
from tests.zoo import MODELS

NAMES = ["MLP", "packed attention", "packed attention, literal sizes", "nn.MultiheadAttention", "depthwise CNN"]
FEW = settings(max_examples=12, deadline=None, derandomize=True)


@cache
def dense(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Structures]:
    example = MODELS[name]
    model, args = example.model().double(), tuple(a.double() for a in example.args)
    return model, args, discover(model, args, prove=True)


def kept_units(data: Any, structures: Structures) -> dict[str, list[int]]:
    return {
        s.name: sorted(data.draw(st.sets(st.integers(0, s.units - 1), min_size=1), label=s.name)) for s in structures
    }


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_any_plan(name: str, data: Any) -> None:
    model, args, structures = dense(name)
    plan = PruningPlan.of(model, structures, kept_units(data, structures))
    zeroed, small = copy.deepcopy(model), copy.deepcopy(model)
    zero_units(zeroed, plan)
    report = apply_plan(small, plan, verify=(args, {}))
    with torch.no_grad():
        assert (small(*args) - zeroed(*args)).abs().max() < 1e-10
    counted = sum(p.numel() for p in small.parameters())
    assert report.parameters_after == counted == structures.params.evaluate(plan.counts)
    assert {n: tuple(t.shape) for n, t in small.state_dict().items() if n in plan.shapes} == {
        n: shape for n, shape in plan.new_shapes().items() if n in small.state_dict()
    }
    assert report.plan.counts == {s.name: s.units_after for s in report.structures}


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_two_rounds_are_one(name: str, data: Any) -> None:
    model, args, structures = dense(name)
    first = PruningPlan.of(model, structures, kept_units(data, structures))
    small = copy.deepcopy(model)
    apply_plan(small, first, verify=(args, {}))
    smaller = first.shrunk(structures)
    second = PruningPlan.of(small, smaller, kept_units(data, smaller))
    apply_plan(small, second, verify=(args, {}))
    once = copy.deepcopy(model)
    apply_plan(once, first.compose(second), verify=(args, {}))
    with torch.no_grad():
        assert (small(*args) - once(*args)).abs().max() < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), once.parameters(), strict=True))
