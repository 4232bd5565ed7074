"""Costs of layers against closed forms, and relative costs against sums by hand."""

import pytest
import torch
from torch import nn

from lightning_compress.tokens.costs import LayerCosts, counted_macs, fit_costs, relative_macs


def encoder_layer(width=8, heads=2, inner=12):
    return nn.TransformerEncoderLayer(width, heads, inner, batch_first=True).eval()


@pytest.mark.parametrize("grad", [False, True])
def test_an_encoder_layer_costs_what_theory_says(grad):
    layer = encoder_layer().requires_grad_(grad)
    costs = fit_costs(lambda n: counted_macs(lambda: layer(torch.randn(1, n, 8))), (3, 5, 8, 13))
    # queries, keys, values and output; two linear layers; Q K^T and A V
    assert costs == LayerCosts((2 * 8.0,), (4 * 8 * 8.0 + 2 * 8 * 12,), (0.0,))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_fixed_part_and_halves_are_fitted_exactly():
    assert fit_costs(lambda n: n * (n + 1) // 2 + 7, (10, 1, 4, 100, 33)) == LayerCosts((0.5,), (0.5,), (7.0,))
    big = 10**15 + 1
    assert fit_costs(lambda n: big * n * n, (128, 256, 384, 511)).a == (float(big),)


def test_costs_that_are_no_polynomial_are_refused():
    with pytest.raises(ValueError, match=r"16, 16 and 64 .* with 3, 4 and 5 tokens go on as 160 with 6, but got 64"):
        fit_costs(lambda n: (-(-n // 4) * 4) ** 2, (3, 4, 5, 6))


@pytest.mark.parametrize("lengths", [(1, 2, 3), (1, 2, 3, 3), (0, 1, 2, 3)])
def test_too_few_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="at least four different positive lengths, but got"):
        fit_costs(lambda n: n, lengths)


COSTS = LayerCosts.joined([LayerCosts((2.0,), (3.0,), (0.0,)), LayerCosts((1.0,), (5.0,), (7.0,))])


def test_costs_per_call_and_example():
    assert LayerCosts((2.0, 1.0), (3.0, 5.0), (0.0, 7.0)) == COSTS
    assert COSTS.macs(torch.tensor([[1, 2], [3, 0]])).tolist() == [[5.0, 14.0], [31.0, 7.0]]
    assert COSTS.macs(torch.tensor([1, 2])).tolist() == [[5.0, 14.0], [13.0, 21.0]]


def test_relative_costs_are_of_the_sums():
    entering, real = torch.tensor([[4, 2], [1, 2]]), torch.tensor([4, 2])
    want = (44 + 14 + 13 + 21) / (44 + 14 + 43 + 21)
    assert relative_macs(COSTS, entering, real) == pytest.approx(want, rel=1e-15)
    assert relative_macs(COSTS, real.expand(2, 2), real) == 1.0
    assert COSTS.relative(entering.half(), real.half()).item() == pytest.approx(want, rel=1e-6)
    long = torch.tensor([40_000.0, 60_000.0]).half()
    assert COSTS.relative(long.expand(2, 2), long).item() == 1.0


def test_soft_counts_get_gradients():
    entering = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([3, 1, 2])
    assert torch.autograd.gradcheck(lambda soft: COSTS.relative(soft, real), (entering,))


def test_nothing_to_compute_is_all_of_it():
    free = LayerCosts((1.0,), (1.0,), (0.0,))
    entering = torch.zeros(1, 2, requires_grad=True)
    value = free.relative(entering, torch.zeros(2))
    value.backward()
    assert value.item() == 1.0 and entering.grad.isfinite().all()
    assert relative_macs(free, torch.zeros(1, 0), torch.zeros(0)) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerCosts((), (), ()), r"of at least one call, .* but got a=\(\)"),
        (lambda: LayerCosts((1.0,), (1.0, 2.0), (0.0,)), r"b=\(1.0, 2.0\)"),
        (lambda: LayerCosts((0.0,), (0.0,), (0.0,)), "some of them positive"),
        (lambda: COSTS.macs(torch.ones(3, 2)), r"\(2, examples\) or \(examples,\), but got \(3, 2\)"),
        (lambda: COSTS.relative(torch.ones(2, 3), torch.ones(2)), r"\(examples,\), but got \(2, 3\) and \(2,\)"),
        (lambda: COSTS.relative(torch.ones(3), torch.ones(3)), r"but got \(3,\) and \(3,\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
