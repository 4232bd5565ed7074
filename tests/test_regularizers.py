"""Regularizers against loops, closed forms and brute force, in float64 wherever a statement is exact."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.regularizers import (
    REGULARIZERS,
    TPRUNE_STRATEGIES,
    block_borders,
    block_group_lasso,
    block_group_lasso_prox_,
    block_line_norms,
    group_lasso,
    group_lasso_factors,
    group_norms,
    hoyer_square,
    hoyer_square_factors,
    regularizer,
    tprune_strategy,
    trimmed_group_lasso,
    trimmed_group_lasso_factors,
)

settings.register_profile("regularizers", deadline=None, max_examples=60)
settings.load_profile("regularizers")

FACTORS = {
    "group_lasso": group_lasso_factors,
    "hoyer_square": hoyer_square_factors,
    "trimmed_group_lasso": lambda norms, step, weights=None: trimmed_group_lasso_factors(
        norms, step, norms >= norms.median(), weights
    ),
}
every_factors = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS.keys())

positive = st.floats(1e-3, 1e3)
norm_lists = st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=12)
steps = st.floats(0.0, 1e3)


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def length(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


# Norms of groups


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5,), 0),
        ((4, 6), 0),
        ((4, 6), 1),
        ((4, 6), -1),
        ((4, 6), -2),
        ((3, 4, 2, 5), 0),
        ((3, 4, 2, 5), 1),
        ((2, 3, 4), 2),
    ],
)
def test_group_norms_equal_a_loop(shape: tuple[int, ...], axis: int) -> None:
    weight = random_matrix(*shape)
    expected = [length(weight.select(axis, g).flatten().tolist()) for g in range(shape[axis])]
    torch.testing.assert_close(group_norms(weight, axis), vector(expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_group_norms_of_a_transposed_view(axis: int) -> None:
    weight = random_matrix(4, 6)
    torch.testing.assert_close(group_norms(weight.T, axis), group_norms(weight, 1 - axis))


@pytest.mark.parametrize(("shape", "axis", "groups"), [((0, 3), 0, 0), ((3, 0), 0, 3), ((0, 3), 1, 3), ((1, 1), 1, 1)])
def test_group_norms_at_the_edges(shape: tuple[int, int], axis: int, groups: int) -> None:
    assert group_norms(torch.zeros(shape), axis).tolist() == [0.0] * groups


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 5, 2)])
@pytest.mark.parametrize("axis", [0, -1])
def test_gradient_of_a_norm_is_the_unit_vector_and_zero_at_zero(shape: tuple[int, ...], axis: int) -> None:
    weight = random_matrix(*shape)
    weight.select(axis, 1).zero_()
    weight.requires_grad_()
    group_norms(weight, axis).sum().backward()
    assert weight.grad is not None
    for g in range(shape[axis]):
        group, gradient = weight.detach().select(axis, g), weight.grad.select(axis, g)
        expected = group if g == 1 else group / length(group.flatten().tolist())
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_group_norms_gradcheck(axis: int) -> None:
    assert torch.autograd.gradcheck(lambda w: group_norms(w, axis), random_matrix(4, 3).requires_grad_())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "value", "count"),
    [
        (torch.float16, 6e4, 16),  # the square overflows float16, and so does the norm
        (torch.float16, 2.0**-24, 16),  # the smallest float16: its square is 0 there
        (torch.float16, 1.0, 2**18),  # the sum overflows
        (torch.bfloat16, 1.0, 2**14),  # a running sum in bfloat16 stops growing at 256
        (torch.bfloat16, 2.0**60, 16),
        (torch.bfloat16, 2.0**-60, 16),
    ],
)
def test_half_precision_is_summed_in_float32(axis: int, dtype: torch.dtype, value: float, count: int) -> None:
    weight = torch.full((2, count), value, dtype=dtype)
    weight[1] = 0
    norms = group_norms(weight if axis == 0 else weight.T, axis)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.tensor([float(weight[0, 0]) * math.sqrt(count), 0.0]))


@pytest.mark.parametrize("axis", [0, 1])
def test_half_precision_gradient_comes_back_in_half_precision(axis: int) -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16).requires_grad_()
    group_norms(weight if axis == 0 else weight.T, axis).sum().backward()
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_not_hidden(axis: int, value: float) -> None:
    weight = torch.ones(2, 2)
    weight[1, 1] = value
    norms = group_norms(weight, axis)
    assert norms[0] == pytest.approx(math.sqrt(2))
    assert not norms[1].isfinite()


def test_group_norms_refuses() -> None:
    with pytest.raises(TypeError, match=r"Expected weight to be a floating-point tensor, but got dtype torch.int64"):
        group_norms(torch.ones(2, 2, dtype=torch.int64), 0)
    with pytest.raises(TypeError, match=r"Expected weight to be a floating-point tensor, but got list"):
        group_norms([1.0], 0)  # type: ignore[arg-type]
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"dim of weight, which has shape \(2, 3\), but got axis {axis}"):
            group_norms(torch.ones(2, 3), axis)


# Group lasso


def test_group_lasso_equals_a_loop() -> None:
    norms, weights = vector([3.0, 0.0, 1.5]), vector([1.0, 7.0, 2.0])
    assert group_lasso(norms).item() == 4.5
    assert group_lasso(norms, weights).item() == 3.0 * 1.0 + 1.5 * 2.0
    assert group_lasso(norms[:0]).item() == 0.0


def test_group_lasso_gradient_is_the_weighted_unit_vector() -> None:
    weight, weights = random_matrix(3, 4), vector([1.0, 2.0, 0.5])
    weight[1] = 0
    weight.requires_grad_()
    group_lasso(group_norms(weight, 0), weights).backward()
    for g, row in enumerate(weight.detach()):
        expected = row if g == 1 else weights[g] * row / length(row.tolist())
        torch.testing.assert_close(weight.grad[g], expected)  # type: ignore[index]


def test_weights_may_be_of_another_precision() -> None:
    assert group_lasso(torch.ones(2), vector([1.0, 2.0])).dtype == torch.float32
    assert group_lasso(torch.ones(2, dtype=torch.float16), torch.full((2,), 5e4)).item() == 1e5


@pytest.mark.parametrize("point", [(0.9, -0.5), (0.2, 0.1), (0.0, 0.0), (-0.3, 0.4)])
@pytest.mark.parametrize("step", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("weight", [1.0, 1.7])
def test_group_lasso_factors_minimise_the_proximal_objective(
    point: tuple[float, float], step: float, weight: float
) -> None:
    """Brute force over a fine grid of both coordinates of one group."""
    axis = torch.linspace(-1, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    start = vector(list(point))

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (x - start).square().sum(-1) + step * weight * x.square().sum(-1).sqrt()

    factor = group_lasso_factors(vector([length(list(point))]), step, vector([weight]))
    result = factor * start
    best = grid[objective(grid).argmin()]
    assert objective(result) <= objective(best) + 1e-12
    torch.testing.assert_close(result, best, atol=0.005, rtol=0)


def test_factors_of_a_zero_group_are_zero_and_of_a_broken_one_are_nan() -> None:
    norms = torch.tensor([0.0, math.nan, math.inf, 1.0])
    factors = group_lasso_factors(norms, 0.25)
    assert factors[[0, 3]].tolist() == [0.0, 0.75]
    assert factors[[1, 2]].isnan().all()
    assert hoyer_square_factors(torch.tensor([1.0, math.nan]), 0.25).isnan().all()  # the trim point is unknown


@pytest.mark.parametrize("factors", [group_lasso_factors, hoyer_square_factors])
def test_factors_of_a_norm_whose_reciprocal_overflows(factors) -> None:
    norms = torch.tensor([0.0, 1e-40, 1.0])
    assert factors(norms, 0.0).tolist() == [0.0, 1.0, 1.0]
    assert factors(norms, 0.5)[:2].tolist() == [0.0, 0.0]


def test_a_group_of_weight_zero_is_left_alone() -> None:
    assert group_lasso_factors(vector([1e-9, 1.0]), 1e6, vector([0.0, 1.0])).tolist() == [1.0, 0.0]


@every_factors
def test_factors_of_no_group_and_of_dead_groups(factors) -> None:
    if factors is not FACTORS["trimmed_group_lasso"]:
        assert factors(vector([]), 0.1).shape == (0,)
    dead = factors(vector([0.0, 0.0]), 0.1)
    assert not dead.isnan().any()


@every_factors
def test_factors_of_half_precision_norms_are_float32(factors) -> None:
    norms = torch.tensor([60000.0, 30000.0, 1.0], dtype=torch.float16)
    result = factors(norms, 0.5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, factors(norms.double(), 0.5).float())


@every_factors
def test_factors_carry_no_graph(factors) -> None:
    assert not factors(torch.rand(4, requires_grad=True), 0.1).requires_grad


@every_factors
@given(norms=norm_lists, step=steps, scale=st.floats(1e-6, 1e6))
def test_factors_are_in_range_and_scale_with_the_step(factors, norms, step, scale) -> None:
    result = factors(vector(norms), step)
    assert ((result >= 0) & (result <= 1)).all()
    torch.testing.assert_close(factors(scale * vector(norms), scale * step), result, atol=1e-6, rtol=1e-6)


@every_factors
@given(norms=norm_lists, first=steps, second=steps)
def test_factors_fall_with_the_step(factors, norms, first, second) -> None:
    small, large = sorted((first, second))
    assert (factors(vector(norms), large) <= factors(vector(norms), small)).all()


@every_factors
@given(data=st.data(), pairs=st.lists(st.tuples(positive, positive), min_size=1, max_size=10), step=steps)
def test_factors_follow_a_permutation(factors, data, pairs, step) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(pairs)))))
    norms, weights = (vector(list(column)) for column in zip(*pairs, strict=True))
    result = factors(norms, step, weights)
    torch.testing.assert_close(factors(norms[order], step, weights[order]), result[order], atol=1e-9, rtol=1e-9)


@every_factors
@given(pairs=st.lists(st.tuples(positive, positive), min_size=1, max_size=10), step=steps)
def test_weights_set_the_scale_on_which_groups_are_compared(factors, pairs, step) -> None:
    """With weights w, norms s behave as norms s / w do without."""
    norms, weights = (vector(list(column)) for column in zip(*pairs, strict=True))
    if factors is FACTORS["trimmed_group_lasso"]:
        protected = norms > norms.median()
        weighted = trimmed_group_lasso_factors(norms, step, protected, weights)
        plain = trimmed_group_lasso_factors(norms / weights, step, protected)
    else:
        weighted, plain = factors(norms, step, weights), factors(norms / weights, step)
    torch.testing.assert_close(weighted, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("function", [group_lasso_factors, hoyer_square_factors])
@pytest.mark.parametrize("step", [-0.1, math.nan, math.inf])
def test_a_step_that_is_no_step_is_refused(function, step: float) -> None:
    with pytest.raises(ValueError, match="Expected step, the learning rate times the strength, to be finite"):
        function(torch.ones(2), step)


@pytest.mark.parametrize(
    "function",
    [
        group_lasso,
        hoyer_square,
        lambda norms, weights=None: group_lasso_factors(norms, 0.1, weights),
        lambda norms, weights=None: hoyer_square_factors(norms, 0.1, weights),
        lambda norms, weights=None: trimmed_group_lasso(norms, torch.ones(2, dtype=torch.bool), weights),
        lambda norms, weights=None: trimmed_group_lasso_factors(norms, 0.1, torch.ones(2, dtype=torch.bool), weights),
    ],
)
def test_norms_and_weights_are_checked(function) -> None:
    with pytest.raises(TypeError, match=r"Expected norms to be a floating-point tensor, but got dtype torch.int64"):
        function(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one norm per group, but got shape \(2, 3\).*group_norms\(weight, axis\)"):
        function(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"one weight per group, shape \(2,\), but got shape \(3,\)"):
        function(torch.ones(2), torch.ones(3))


# Trimmed group lasso


def test_trimmed_group_lasso_counts_only_what_is_not_protected() -> None:
    norms = vector([3.0, 2.0, 1.0]).requires_grad_()
    penalty = trimmed_group_lasso(norms, torch.tensor([True, False, False]), vector([1.0, 2.0, 5.0]))
    assert penalty.item() == 2.0 * 2.0 + 1.0 * 5.0
    penalty.backward()
    assert norms.grad.tolist() == [0.0, 2.0, 5.0]
    assert trimmed_group_lasso(vector([3.0, 0.0]), torch.tensor([True, False])).item() == 0.0


def test_trimmed_factors_leave_the_protected_alone() -> None:
    factors = trimmed_group_lasso_factors(vector([0.1, 0.0, 5.0, 1.0]), 0.5, torch.tensor([True, True, False, False]))
    assert factors.tolist() == [1.0, 1.0, 0.9, 0.5]


@given(norms=st.lists(positive, min_size=1, max_size=6), step=st.floats(0.0, 100.0), data=st.data())
def test_protecting_the_largest_is_the_proximal_map_of_the_trimmed_lasso(norms, step, data) -> None:
    """Against every other choice of the protected set, each with its own best shrinking."""
    keep = data.draw(st.integers(0, len(norms)))
    start = vector(norms)
    protected = torch.zeros(len(norms), dtype=torch.bool)
    protected[start.topk(keep).indices] = True
    result = start * trimmed_group_lasso_factors(start, step, protected)

    def objective(x: Tensor) -> float:
        penalty = sum(sorted(x.tolist())[: len(norms) - keep])  # the trimmed lasso: all but the `keep` largest
        return 0.5 * float((x - start).square().sum()) + step * penalty

    best = math.inf
    for chosen in itertools.combinations(range(len(norms)), keep):
        other = [value if g in chosen else max(0.0, value - step) for g, value in enumerate(norms)]
        best = min(best, objective(vector(other)))
    assert objective(result) <= best * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize("function", [trimmed_group_lasso, lambda n, p: trimmed_group_lasso_factors(n, 0.1, p)])
def test_the_protected_set_is_checked(function) -> None:
    with pytest.raises(TypeError, match=r"Expected protected to be a bool tensor, but got dtype torch.float32"):
        function(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match=r"Expected protected to be a bool tensor, but got list"):
        function(torch.ones(2), [True, False])
    with pytest.raises(ValueError, match=r"one entry per group, shape \(2,\), but got shape \(3,\)"):
        function(torch.ones(2), torch.ones(3, dtype=torch.bool))


# Hoyer square


@pytest.mark.parametrize(
    ("norms", "expected"), [([2.0, 2.0, 2.0, 0.0], 3.0), ([1.0], 1.0), ([3.0, 1.0], 1.6), ([0.0, 0.0], 0.0), ([], 0.0)]
)
def test_hoyer_square_by_hand(norms: list[float], expected: float) -> None:
    assert hoyer_square(vector(norms)).item() == pytest.approx(expected)


@given(norms=st.lists(positive, min_size=1, max_size=12), scale=st.floats(1e-6, 1e6))
def test_hoyer_square_is_between_one_and_the_count_and_has_no_scale(norms, scale) -> None:
    value = hoyer_square(vector(norms)).item()
    assert 1 - 1e-12 <= value <= len(norms) * (1 + 1e-12)
    assert hoyer_square(scale * vector(norms)).item() == pytest.approx(value, rel=1e-9)
    assert hoyer_square(vector([*norms, 0.0, 0.0])).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_hoyer_square_of_norms_whose_squares_leave_float32(scale: float) -> None:
    assert hoyer_square(scale * torch.tensor([3.0, 1.0])).item() == pytest.approx(1.6)
    assert hoyer_square_factors(scale * torch.tensor([3.0, 1.0]), scale * 0.5).tolist() == pytest.approx([1.0, 0.4])


def test_hoyer_square_gradient_equals_the_closed_form_and_is_orthogonal_to_the_weights() -> None:
    weight = random_matrix(6, 5)
    weight[2] = 0
    weight.requires_grad_()
    hoyer_square(group_norms(weight, 0)).backward()
    rows = weight.detach().tolist()
    norms = [length(row) for row in rows]
    a, b = sum(norms), sum(s * s for s in norms)
    for g, row in enumerate(rows):
        slope = 0.0 if g == 2 else 2 * a / b * (1 - a * norms[g] / b) / norms[g]
        torch.testing.assert_close(weight.grad[g], vector([slope * value for value in row]))  # type: ignore[index]
    assert abs((weight.grad * weight.detach()).sum().item()) < 1e-14


def test_hoyer_square_gradcheck() -> None:
    norms, weights = random_matrix(5).abs().add(0.1).requires_grad_(), random_matrix(5, seed=1).abs().add(0.1)
    assert torch.autograd.gradcheck(hoyer_square, norms)
    assert torch.autograd.gradcheck(lambda s: hoyer_square(s, weights), norms)
    torch.testing.assert_close(hoyer_square(norms, weights), hoyer_square(norms / weights))


def test_hoyer_square_of_a_dead_matrix_has_gradient_zero() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    hoyer_square(group_norms(weight, 0)).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 0.0]] * 3


@given(norms=norm_lists, step=steps)
def test_hoyer_square_factors_equal_a_loop(norms, step) -> None:
    assume(any(norms))
    trim_point = sum(s * s for s in norms) / sum(norms)
    expected = [max(0.0, 1 - step * 2 * max(0.0, 1 - s / trim_point) / s) if s else 0.0 for s in norms]
    result = hoyer_square_factors(vector(norms), step)
    # A norm equal to the trim point but for rounding is pulled by 1e-16 times the step over the norm.
    torch.testing.assert_close(result, vector(expected), atol=1e-8, rtol=1e-8)
    assert result[norms.index(max(norms))] > 1 - 1e-8


def test_hoyer_square_factors_minimise_the_linearised_objective() -> None:
    """Brute force over a grid of norms; the linear part is the autograd gradient in units of the trim point."""
    norms, step = vector([1.0, 0.5, 0.2, 0.05]).requires_grad_(), 0.15
    hoyer_square(norms).backward()
    start = norms.detach()
    trim_point = start.square().sum() / start.sum()
    pull = (norms.grad * trim_point).clamp(min=0)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64).unsqueeze(1)
    best = grid[(0.5 * (grid - start).square() + step * pull * grid).argmin(0), 0]
    torch.testing.assert_close(start * hoyer_square_factors(start, step), best, atol=1e-5, rtol=0)


@given(norms=st.lists(positive, min_size=1, max_size=6), step=st.floats(0.0, 10.0), copies=st.integers(1, 4))
def test_hoyer_square_factors_depend_neither_on_copies_nor_on_dead_groups(norms, step, copies) -> None:
    alone = hoyer_square_factors(vector(norms), step)
    repeated = hoyer_square_factors(vector(norms * copies + [0.0] * 3), step)
    expected = torch.cat([alone.repeat(copies), torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(repeated, expected, atol=1e-8, rtol=1e-8)


@given(norms=norm_lists, step=steps)
def test_the_hoyer_step_never_raises_the_hoyer_square(norms, step) -> None:
    before = vector(norms)
    after = before * hoyer_square_factors(before, step)
    assert hoyer_square(after) <= hoyer_square(before) * (1 + 1e-9)


# Block group lasso


def divide(total: int, blocks: int) -> list[slice]:
    edges = [0, *itertools.accumulate(len(part) for part in torch.arange(total).tensor_split(blocks))]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def tiles(weight: Tensor, block_shape, block_grid) -> list[tuple[slice, slice]]:
    if block_grid:
        rows, columns = (divide(n, b) for n, b in zip(weight.shape, block_grid, strict=True))
    else:
        rows, columns = (
            [slice(first, min(first + b, n)) for first in range(0, n, b)]
            for n, b in zip(weight.shape, block_shape or weight.shape, strict=True)
        )
    return list(itertools.product(rows, columns))


DIVISIONS = [
    {},
    {"block_shape": (2, 3)},
    {"block_shape": (4, 4)},  # 6 x 9 in blocks of 4 x 4: the last are 2 high and 1 wide
    {"block_shape": (1, 1)},
    {"block_shape": (64, 64)},
    {"block_shape": (5, 1)},
    {"block_grid": (2, 3)},
    {"block_grid": (4, 2)},  # heights 2, 2, 1, 1 and widths 5, 4
    {"block_grid": (1, 1)},
    {"block_grid": (6, 9)},
]
every_division = pytest.mark.parametrize("division", DIVISIONS, ids=str)


@every_division
@pytest.mark.parametrize("transposed", [False, True])
def test_block_group_lasso_and_its_gradient_equal_loops(division, transposed: bool) -> None:
    weight = random_matrix(9, 6).T if transposed else random_matrix(6, 9)
    weight[1] = 0
    weight = weight.detach().requires_grad_()
    expected, gradient = 0.0, torch.zeros_like(weight)
    for tile in tiles(weight, division.get("block_shape"), division.get("block_grid")):
        block = weight.detach()[tile]
        for r, row in enumerate(block):
            expected += length(row.tolist())
            gradient[tile][r] += row / (length(row.tolist()) or 1.0)
        for c, column in enumerate(block.T):
            expected += length(column.tolist())
            gradient[tile][:, c] += column / (length(column.tolist()) or 1.0)
    penalty = block_group_lasso(weight, **division)
    penalty.backward()
    assert penalty.item() == pytest.approx(expected)
    torch.testing.assert_close(weight.grad, gradient)


def test_blocks_of_one_element_are_twice_the_l1_norm_and_one_block_is_rows_plus_columns() -> None:
    weight = random_matrix(4, 5)
    torch.testing.assert_close(block_group_lasso(weight, block_shape=(1, 1)), 2 * weight.abs().sum())
    lines = group_lasso(group_norms(weight, 0)) + group_lasso(group_norms(weight, 1))
    torch.testing.assert_close(block_group_lasso(weight), lines)


def test_the_grid_and_the_shape_of_the_same_blocks_agree() -> None:
    weight = random_matrix(8, 12)
    by_shape, by_grid = block_line_norms(weight, block_shape=(4, 3)), block_line_norms(weight, block_grid=(2, 4))
    assert [tuple(norms.shape) for norms in by_shape] == [(8, 4), (2, 12)]
    torch.testing.assert_close(by_shape, by_grid)


def test_borders_of_blocks() -> None:
    weight = torch.zeros(7, 5)
    assert block_borders(weight, block_shape=(3, 2)) == ((0, 3, 6, 7), (0, 2, 4, 5))
    assert block_borders(weight, block_grid=(3, 2)) == ((0, 3, 5, 7), (0, 3, 5))  # larger ones first, by one at most
    assert block_borders(weight) == ((0, 7), (0, 5))
    assert block_borders(torch.zeros(0, 5)) == ((0,), (0, 5))
    for row, (begin, end) in enumerate(itertools.pairwise(block_borders(weight, block_grid=(3, 2))[0])):
        weight[begin:end] = row + 1.0
    _, columns = block_line_norms(weight, block_grid=(3, 2))  # what the borders say is what the norms are of
    assert (columns[:, 0] ** 2).tolist() == pytest.approx([3, 8, 18])


def test_block_group_lasso_gradcheck() -> None:
    weight = random_matrix(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: block_group_lasso(w, block_shape=(2, 3)), weight)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_a_matrix_without_elements(shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    assert block_group_lasso(weight).item() == 0.0
    assert block_group_lasso(weight, block_shape=(2, 2)).item() == 0.0
    assert block_group_lasso_prox_(weight, 0.1).shape == shape


def test_block_group_lasso_of_half_precision() -> None:
    weight = torch.full((2, 4), 6e4, dtype=torch.float16)
    penalty = block_group_lasso(weight)
    assert penalty.dtype == torch.float32
    expected = float(weight[0, 0]) * (2 * 2 + 4 * math.sqrt(2))
    assert penalty.item() == pytest.approx(expected)


@every_division
@pytest.mark.parametrize("transposed", [False, True])
def test_block_prox_equals_a_loop_over_blocks(division, transposed: bool) -> None:
    weight = random_matrix(9, 6).T if transposed else random_matrix(6, 9)
    weight[1] = 0
    expected, step = weight.clone(), 0.4
    for rows_first in (True, False):  # all rows, then all columns
        for tile in tiles(weight, division.get("block_shape"), division.get("block_grid")):
            for line in expected[tile] if rows_first else expected[tile].T:
                size = length(line.tolist())
                line.mul_(max(0.0, 1 - step / size) if size else 0.0)
    assert block_group_lasso_prox_(weight, step, **division) is weight
    torch.testing.assert_close(weight, expected)


def test_block_prox_of_a_parameter_reaches_exact_zero_line_by_line() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with torch.no_grad():
        weight[:2, 2:] = 0.1
    version = weight._version
    block_group_lasso_prox_(weight, 0.2, block_grid=(2, 2))
    assert weight.grad_fn is None
    assert weight._version > version  # autograd knows
    alive = (weight != 0).int().tolist()
    assert alive == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_prox_of_half_precision_is_the_rounded_result(dtype: torch.dtype) -> None:
    weight = random_matrix(4, 6).to(dtype)
    expected = block_group_lasso_prox_(weight.float(), 0.3, block_shape=(2, 4))
    result = block_group_lasso_prox_(weight, 0.3, block_shape=(2, 4))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, atol=0, rtol=0.02)


def test_one_pass_lowers_the_proximal_objective_but_is_not_its_minimum() -> None:
    start, step = vector([2.0, 0.7, 0.7, 0.7]).view(2, 2), 0.6

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (x - start).square().sum() + step * block_group_lasso(x)

    once = block_group_lasso_prox_(start.clone(), step)
    best = once.clone().requires_grad_()
    optimizer = torch.optim.SGD([best], lr=0.2)
    for _ in range(500):
        optimizer.zero_grad()
        objective(best).backward()
        optimizer.step()
    assert objective(best) + 0.01 < objective(once) < objective(start)
    assert (once[:, 1] == 0).all()  # the start is symmetric; rows first leaves too little for the second column
    assert best.min() > 0.05


@pytest.mark.parametrize("function", [block_group_lasso, lambda w, *b: block_group_lasso_prox_(w, 0.1, *b)])
def test_block_arguments_are_checked(function) -> None:
    weight = torch.ones(4, 6)
    with pytest.raises(TypeError, match=r"Expected weight to be a floating-point tensor, but got dtype torch.int32"):
        function(weight.int())
    with pytest.raises(ValueError, match=r"to be a matrix .* but got shape \(4, 6, 1\).*weight.flatten\(1\)"):
        function(weight.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"but got both: block_shape=.*block_grid="):
        function(weight, (2, 2), (2, 2))
    for block in (2, (2,), (2, 2.0), (True, 2)):
        with pytest.raises(TypeError, match=r"Expected block_shape to be two integers \(out, in\), but got"):
            function(weight, block)
    for block in ((0, 2), (2, -1)):
        with pytest.raises(ValueError, match="Expected the numbers of block_shape to be at least 1"):
            function(weight, block)
        with pytest.raises(ValueError, match="Expected the numbers of block_grid to be at least 1"):
            function(weight, None, block)
    for grid in ((5, 1), (1, 7)):
        with pytest.raises(ValueError, match=r"Expected block_grid to have at most .* \(4, 6\).*Use a coarser grid"):
            function(weight, None, grid)
    assert (weight == 1).all()


def test_a_refused_block_step_changes_nothing() -> None:
    weight = torch.ones(4, 6)
    with pytest.raises(ValueError, match="Expected step, the learning rate times the strength, to be finite"):
        block_group_lasso_prox_(weight, -1.0)
    assert (weight == 1).all()


# What the proximal step is for


def test_the_subgradient_reaches_no_exact_zero_and_the_proximal_step_reaches_all() -> None:
    """Twenty groups whose best value is zero: the pull of the loss towards its target is weaker than the penalty."""
    strength, learning_rate, target = 1.0, 0.01, 0.1 * random_matrix(20, 8)
    assert group_norms(target, 0).max() < strength
    by_gradient = (target + random_matrix(20, 8, seed=1)).requires_grad_()
    by_proximal_step = by_gradient.detach().clone()
    for _ in range(3000):
        loss = 0.5 * (by_gradient - target).square().sum() + strength * group_lasso(group_norms(by_gradient, 0))
        (gradient,) = torch.autograd.grad(loss, by_gradient)
        with torch.no_grad():
            by_gradient -= learning_rate * gradient
        by_proximal_step -= learning_rate * (by_proximal_step - target)
        factors = group_lasso_factors(group_norms(by_proximal_step, 0), learning_rate * strength)
        by_proximal_step *= factors.unsqueeze(1)
    norms = group_norms(by_gradient.detach(), 0)
    assert (norms == 0).sum() == 0
    assert norms.max() < 2 * learning_rate * strength  # it got near, and oscillates there
    assert (by_proximal_step == 0).all(1).sum() == 20


# Names


def test_the_table_holds_three_regularizers_under_their_own_names() -> None:
    assert sorted(REGULARIZERS) == ["block_group_lasso", "group_lasso", "hoyer_square"]
    for name in REGULARIZERS:
        assert regularizer(name).name == name


def test_every_entry_of_the_table_is_called_as_it_says() -> None:
    for entry in REGULARIZERS.values():
        if entry.acts_on == "norms":
            norms, weights = vector([3.0, 1.0]), vector([1.0, 1.0])
            assert entry.penalty(norms, weights=weights).shape == ()
            assert entry.factors(norms, 0.5, weights=weights).shape == (2,)
        else:
            weight = random_matrix(4, 4)
            assert entry.penalty(weight, block_shape=(2, 2), block_grid=None).shape == ()
            assert entry.factors(weight, 0.5, block_shape=None, block_grid=(2, 2)) is weight


def test_an_unknown_regularizer_is_refused_with_the_names() -> None:
    known = "one of 'block_group_lasso', 'group_lasso', 'hoyer_square', but got"
    with pytest.raises(
        ValueError, match=rf"Expected the regularizer to be {known} 'group_laso'. Did you mean 'group_lasso'\?"
    ):
        regularizer("group_laso")
    with pytest.raises(ValueError, match=rf"{known} 'xyz'\.$"):
        regularizer("xyz")


# TPrune


def described(strategy: str) -> dict[str, set[str]]:
    """In the paper's words: y = x W, so columns are output units."""
    words: dict[str, set[str]] = {"encoder": set(), "decoder": set()}
    for stack, matrix, axis in tprune_strategy(strategy):
        words[stack].add(f"{matrix} {'columns' if axis == 0 else 'rows'}")
    return words


def test_tprune_strategies_in_the_words_of_the_paper() -> None:
    recipe = {"query columns", "key columns", "value columns", "output rows", "ffn_in columns", "ffn_out rows"}
    both = {line.split()[0] + side for line in recipe for side in (" rows", " columns")}
    assert described("fine") == {"encoder": recipe, "decoder": {"query columns", "key columns"}}
    assert described("coarse") == {"encoder": recipe, "decoder": recipe}
    assert described("naive") == {"encoder": both, "decoder": both}
    assert sorted(TPRUNE_STRATEGIES) == ["coarse", "fine", "naive"]


def test_a_tprune_axis_is_the_one_whose_units_a_linear_layer_writes_or_reads() -> None:
    """An output unit that is zeroed along axis 0 is silent; an input unit zeroed along axis 1 is not read."""
    layer, x = torch.nn.Linear(3, 4, bias=False), torch.randn(2, 3)
    axis = {matrix: axis for stack, matrix, axis in tprune_strategy("coarse") if stack == "encoder"}
    with torch.no_grad():
        layer.weight.select(axis["ffn_in"], 3).zero_()
        assert (layer(x)[:, 3] == 0).all()
        layer.weight.select(axis["ffn_out"], 2).zero_()
        assert torch.equal(layer(x), layer(x * torch.tensor([1.0, 1.0, 5.0])))


def test_an_unknown_strategy_is_refused_with_the_names() -> None:
    expected = (
        r"Expected the TPrune strategy to be one of 'coarse', 'fine', 'naive', but got 'corse'. Did you mean 'coarse'\?"
    )
    with pytest.raises(ValueError, match=expected):
        tprune_strategy("corse")
