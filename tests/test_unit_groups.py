"""Norms and scaling of coupled units, against loops over explicit positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.structures import Slice, Structure
from lightning_compress.unit_groups import UnitGroups


def structures() -> list[Structure]:
    """Four units of two interleaved positions each, in rows, a bias and columns; three units of one row each."""
    table = torch.arange(8).reshape(2, 4).t().contiguous()  # unit u owns positions u and u + 4
    rows = torch.tensor([[0], [2], [4]])  # an axis of size 5, of which 1 and 3 belong to no unit
    return [
        Structure(
            "a",
            "head",
            4,
            (
                Slice("w", 0, 8, table, "producer"),
                Slice("b", 0, 8, table, "producer"),
                Slice("v", 1, 8, table, "consumer"),
                Slice("scale", 0, 8, table, "companion"),
            ),
        ),
        Structure("c", "ffn", 3, (Slice("u", 0, 5, rows, "producer"),)),
    ]


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = {"w": (8, 3), "b": (8,), "v": (2, 8), "scale": (8,), "u": (5, 2, 2)}
    return {n: nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for n, s in shapes.items()}


def members(params: dict[str, Tensor], structure: Structure, unit: int) -> Tensor:
    """All scalars of a unit, gathered one position at a time."""
    found = []
    for piece in structure.slices:
        if piece.role != "companion":
            found += [params[piece.parameter].select(piece.axis, int(p)).reshape(-1) for p in piece.indices[unit]]
    return torch.cat(found).detach()


def test_norms_and_sizes_are_those_of_the_gathered_members() -> None:
    params = tensors()
    groups = UnitGroups(params, structures())
    expected = torch.stack([members(params, s, u).norm() for s in structures() for u in range(s.units)])
    torch.testing.assert_close(groups.norms(), expected)
    assert groups.sizes.tolist() == [members(params, s, u).numel() for s in structures() for u in range(s.units)]
    assert groups.spans == {"a": slice(0, 4), "c": slice(4, 7)}


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_scaling_multiplies_the_members_and_nothing_else(factors: list[float]) -> None:
    params = tensors()
    before = {n: t.detach().clone() for n, t in params.items()}
    groups = UnitGroups(params, structures())
    norms = groups.norms()
    groups.scale_(torch.tensor(factors, dtype=torch.float64))
    torch.testing.assert_close(groups.norms(), norms * torch.tensor(factors, dtype=torch.float64))
    assert torch.equal(params["scale"], before["scale"])
    assert torch.equal(params["u"][[1, 3]], before["u"][[1, 3]])


def test_only_the_structures_asked_for_are_touched() -> None:
    params = tensors()
    before = params["w"].detach().clone()
    UnitGroups(params, structures()).scale_(torch.zeros(7), only=[1])
    assert torch.equal(params["w"], before)
    assert params["u"][[0, 2, 4]].abs().sum() == 0


def test_a_missing_parameter_is_left_out() -> None:
    params = tensors()
    del params["w"]
    groups = UnitGroups(params, structures())
    assert groups.sizes[:4].tolist() == [6.0] * 4  # two positions of b and of two rows of v
    assert UnitGroups({}, structures()).norms().tolist() == [0.0] * 7
    UnitGroups({}, structures()).scale_(torch.zeros(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_taken_in_float32_or_wider(dtype: torch.dtype) -> None:
    params = tensors(dtype)
    groups = UnitGroups(params, structures())
    assert groups.norms().dtype == torch.float32
    expected = torch.stack([members(params, s, u).float().norm() for s in structures() for u in range(s.units)])
    torch.testing.assert_close(groups.norms(), expected, rtol=1e-5, atol=1e-6)


def test_dead_units_lose_their_moments_even_infinite_ones() -> None:
    params = tensors()
    moment = torch.full_like(params["w"], torch.inf)
    dead = torch.tensor([True, False, False, False, False, False, False])
    UnitGroups(params, structures()).zero_(dead, {"w": [moment]})
    assert moment[[0, 4]].abs().sum() == 0
    assert torch.isinf(moment[[1, 2, 3, 5, 6, 7]]).all()


def test_scaled_weights_are_added_to_targets() -> None:
    params = tensors()
    targets = {"v": torch.zeros_like(params["v"])}
    UnitGroups(params, structures()).add_scaled_(
        targets, torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    )
    expected = torch.zeros_like(params["v"])
    expected[:, [0, 4]] = params["v"][:, [0, 4]].detach()
    expected[:, [3, 7]] = 2 * params["v"][:, [3, 7]].detach()
    torch.testing.assert_close(targets["v"], expected)
