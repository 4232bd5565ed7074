"""The algebra of dimensions against brute force: refine symbolically what numpy-like views do to real index tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.discovery import axes, reshape
from lightning_compress.discovery.assemble import unit_numbers
from lightning_compress.discovery.axes import Axis, AxisMismatch, atoms, find


def test_a_view_of_an_atom_makes_it_a_product():
    packed = Axis(96)
    three, heads, width = axes.split(packed, [3, 4, 8])
    assert find(packed).form == "product"
    assert [a.size for a in atoms(packed)] == [3, 4, 8]
    assert unit_numbers(packed, heads).tolist() == [(i // 8) % 4 for i in range(96)]
    assert unit_numbers(packed, width).tolist() == [i % 8 for i in range(96)]
    assert unit_numbers(packed, three).tolist() == [i // 32 for i in range(96)]


def test_two_factorisations_of_one_axis_meet_in_their_common_refinement():
    left, right = Axis(24), Axis(24)
    axes.split(left, [6, 4])
    axes.split(right, [2, 12])
    axes.unify(left, right)
    assert [a.size for a in atoms(left)] == [a.size for a in atoms(right)] == [2, 3, 4]
    assert [id(a) for a in atoms(left)] == [id(a) for a in atoms(right)]


def test_two_concatenations_meet_in_their_common_refinement():
    left, right = Axis(10), Axis(10)
    axes.take(left, 0, 4)
    axes.take(right, 0, 7)
    axes.unify(left, right)
    assert [a.size for a in atoms(left)] == [a.size for a in atoms(right)] == [4, 3, 3]


def test_rotating_halves_couples_each_position_with_its_partner():
    width = Axis(8)
    first, second = axes.take(width, 0, 4), axes.take(width, 4, 8)
    axes.unify(width, axes.concat([second, first]))  # x * cos + rotate_half(x) * sin
    (atom,) = {id(a): a for a in atoms(width)}.values()
    assert unit_numbers(width, atom).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_packed_concatenation_viewed_by_heads_shares_the_head_width():
    packed = Axis(40)  # query 4 * 4, key 3 * 4, value 3 * 4
    query, key = axes.take(packed, 0, 16), axes.take(packed, 16, 28)
    axes.split(packed, [10, 4])
    assert [a.size for a in atoms(packed)] == [4, 3, 3, 4]
    assert find(query).form == find(key).form == "product"
    assert list(atoms(query))[-1] is list(atoms(key))[-1]


def test_an_index_into_a_packed_axis_tells_its_copies_apart():
    packed = Axis(24)
    three, heads, width = axes.split(packed, [3, 2, 4])
    query = axes.select([three, heads, width], 0, 0)
    key = axes.select([three, heads, width], 0, 1)
    axes.pin(query[1], "only here")
    assert [bool(a.reasons) for a in atoms(packed)] == [False, True, False, False, False, False]
    axes.unify(query[0], key[0])
    numbers = unit_numbers(packed, find(query[0]))
    assert numbers.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [-1] * 8


def test_copies_are_joined_again_when_the_packed_tensor_is_used_as_a_whole():
    packed = Axis(24)
    three, heads, width = axes.split(packed, [3, 2, 4])
    query = axes.select([three, heads, width], 0, 0)
    other = Axis(4)
    axes.unify(width, other)  # say, a scale of shape (4,) multiplied onto the whole packed tensor
    assert find(query[1]) is find(other)
    assert unit_numbers(packed, find(other)).tolist() == [i % 4 for i in range(24)]


def test_an_index_into_an_axis_that_was_used_before_pins_it():
    packed = Axis(24)
    three, heads, width = axes.split(packed, [3, 2, 4])
    axes.mark(width, "contracted")
    rest = axes.select([three, heads, width], 0, 1)
    assert rest == [heads, width]
    assert three.reasons == {"single positions of it are taken by index"}


@pytest.mark.parametrize(("size", "sizes"), [(12, [5, 7]), (12, [8, 2])])
def test_sizes_that_do_not_line_up_are_refused(size, sizes):
    first, second = Axis(3), Axis(size // 3)
    with pytest.raises(AxisMismatch):
        axes.regroup([first, second], sizes)


def test_axes_of_different_size_are_never_the_same():
    three, four = Axis(3), Axis(4)
    axes.unify(three, four)
    assert find(three) is not find(four)
    assert three.reasons == four.reasons == {"it does not line up with what it meets: sizes 3 and 4 differ"}


def test_a_view_that_does_not_line_up_pins_no_other_dimension():
    """Attention scores (heads, rows, columns) viewed as (heads, columns, rows), as relative shifts do."""
    heads, rows, columns = Axis(4), Axis(9), Axis(15)
    result = reshape.view([heads, rows, columns], (4, 9, 15), (4, 15, 9))
    assert result[0] is heads and not heads.reasons
    assert rows.reasons and columns.reasons and all(axis.reasons for axis in result[1:])


def test_a_slice_through_a_block_is_refused():
    packed = Axis(12)
    axes.split(packed, [3, 4])
    with pytest.raises(AxisMismatch, match="cut through blocks of 4"):
        axes.take(packed, 2, 7)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_slices_and_joins_agree_with_index_tensors(data):
    """Random views, slices and joins of an axis: positions found symbolically are those of a real index tensor.

    An axis is paired with a real tensor of its position numbers. After each operation, every atom that remains in the
    result must be made of exactly the positions whose real numbers belong to that atom in the original axis.
    """
    factors = data.draw(st.lists(st.sampled_from([2, 3]), min_size=2, max_size=4))
    size = 1
    for factor in factors:
        size *= factor
    original = Axis(size)
    dims: list[Axis | None] = [original]
    real = torch.arange(size)
    for _ in range(data.draw(st.integers(1, 4))):
        action = data.draw(st.sampled_from(["split", "flatten", "slice", "join", "permute"]))
        if action == "split":
            i = data.draw(st.integers(0, real.dim() - 1))
            divisors = [d for d in range(2, real.shape[i]) if real.shape[i] % d == 0]
            if not divisors:
                continue
            d = data.draw(st.sampled_from(divisors))
            shape = [*real.shape[:i], d, real.shape[i] // d, *real.shape[i + 1 :]]
        elif action == "flatten":
            shape = [real.numel()]
        elif action == "permute":
            order = data.draw(st.permutations(range(real.dim())))
            real, dims = real.permute(*order), [dims[k] for k in order]
            continue
        elif action == "slice":
            i = data.draw(st.integers(0, real.dim() - 1))
            start = data.draw(st.integers(0, real.shape[i] - 1))
            stop = data.draw(st.integers(start + 1, real.shape[i]))
            if stop - start == 1 or dims[i] is None:
                continue
            try:
                dims[i] = axes.take(dims[i], start, stop)
            except AxisMismatch:
                return
            real = real.narrow(i, start, stop - start)
            continue
        else:
            i = data.draw(st.integers(0, real.dim() - 1))
            if dims[i] is None:
                continue
            dims[i] = axes.concat([dims[i], dims[i]])
            real = torch.cat([real, real], i)
            continue
        try:
            dims = reshape.view(dims, tuple(real.shape), shape)
        except AxisMismatch:
            return
        real = real.reshape(shape)
    for i, axis in enumerate(dims):
        assert (axis.size if axis is not None else 1) == real.shape[i]
        for atom in {id(a): a for a in atoms(axis)}.values():
            if not any(atom is a for a in atoms(original)):
                assert atom.reasons  # the number of the copy, where whole copies were joined
                continue
            here = unit_numbers(axis, atom)
            there = unit_numbers(original, atom)
            expected = there[real.movedim(i, 0).reshape(real.shape[i], -1)]
            assert (here.unsqueeze(1) == expected).all()
