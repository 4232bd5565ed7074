"""Optimal Brain Surgeon: its saliencies and downdates are those of least squares over the columns that are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import LowRankSignificance, SecondOrder, discover, input_moments
from lightning_compress.post_training import second_order
from lightning_compress.post_training.calibration import Calibration, default_call, default_loss, real_tokens
from lightning_compress.post_training.second_order import Elimination, eliminate


def best_error(weight: Tensor, gram: Tensor, gone: Tensor) -> float:
    """Squared error of the outputs when these columns are gone and the others are fitted anew."""
    stay = ~gone
    fitted = torch.linalg.solve(gram[stay][:, stay], gram[stay] @ weight.T).T
    change = -weight.clone()
    change[:, stay] += fitted
    return float(((change @ gram) * change).sum())


@pytest.mark.parametrize(("p", "block"), [(1, 64), (3, 64), (1, 2), (3, 4)])
def test_each_saliency_is_what_the_unit_adds_to_the_best_error(
    p: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_order, "BLOCK", block)
    units, outputs = 6, 5
    weight = torch.randn(outputs, units * p, dtype=torch.float64)
    inputs = torch.randn(40, units * p, dtype=torch.float64) @ torch.randn(units * p, units * p, dtype=torch.float64)
    gram, damping = inputs.T @ inputs / 40, 0.01
    damped = gram + damping * gram.diagonal().mean() * torch.eye(units * p, dtype=torch.float64)
    table = torch.randperm(units * p).view(units, p)
    part = Elimination(weight, gram, table, damping)
    gone, error = torch.zeros(units * p, dtype=torch.bool), 0.0
    for unit in (4, 0, 5, 1):
        saliency = part.saliency()
        for other in range(units):
            if not gone[table[other]].any():
                without = gone.clone()
                without[table[other]] = True
                expected = best_error(weight, damped, without) - error
                assert float(saliency[other]) == pytest.approx(expected, rel=1e-8)
        part.remove(unit)
        gone[table[unit]] = True
        error = best_error(weight, damped, gone)
    scores = eliminate([Elimination(weight, gram, table, damping)], units)
    order = torch.argsort(scores)
    for k in range(1, units):
        gone = torch.zeros(units * p, dtype=torch.bool)
        gone[table[order[:k]].reshape(-1)] = True
        alone = min(best_error(weight, damped, torch.isin(torch.arange(units * p), row)) for row in table)
        assert float(scores[order[0]]) == pytest.approx(alone, rel=1e-8)
        assert float(scores[order[:k]].sum()) >= best_error(weight, damped, gone) * (1 - 1e-9)
    assert float(scores.sum()) == pytest.approx(float(((weight @ gram) * weight).sum()), rel=0.6)


def moments_of(model: nn.Module, batch: Tensor) -> tuple[list, dict]:
    structures = discover(model, (batch,))
    return structures, input_moments(model, structures, Calibration((batch,), default_call, default_loss, real_tokens))


@pytest.mark.parametrize("image", [False, True])
def test_a_unit_that_others_can_say_goes_first(image: bool) -> None:
    if image:
        model, batch = nn.Sequential(nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 3)), torch.randn(6, 12, 9, 9)
    else:
        model, batch = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), torch.randn(200, 12)
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 3 * model[0].weight[2], 3 * model[0].bias[2]
    model, batch = model.double(), batch.double()
    structures, moments = moments_of(model, batch)
    scores = SecondOrder(moments, damping=1e-9)(model, structures[0])
    first, *_, last = scores.sort().values.tolist()
    assert int(scores.argmin()) in (2, 5)
    assert first < 1e-6 * last
    rows = next(iter(moments.values())).rows
    assert rows == (6 * 49 if image else 200)


def test_relative_errors_do_not_depend_on_the_scale_of_a_layer() -> None:
    model, batch = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double(), torch.randn(50, 12).double()
    structures, moments = moments_of(model, batch)
    relative, absolute = SecondOrder(moments)(model, structures[0]), SecondOrder(moments, relative=False)
    before = absolute(model, structures[0])
    with torch.no_grad():
        model[2].weight *= 10
    torch.testing.assert_close(SecondOrder(moments)(model, structures[0]), relative)
    torch.testing.assert_close(absolute(model, structures[0]), 100 * before)
    weighted = SecondOrder(moments, metrics={"2.weight": torch.full((4,), 0.01)})(model, structures[0])
    torch.testing.assert_close(weighted, before)


def test_what_second_order_refuses() -> None:
    model, batch = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(50, 12)
    structures, moments = moments_of(model, batch)
    with pytest.raises(ValueError, match="Expected damping to be positive, but got 0"):
        SecondOrder(moments, damping=0)
    with pytest.raises(ValueError, match="Expected moments of the inputs of what reads structure 'ffn'"):
        SecondOrder({})(model, structures[0])


# Low-rank significance


def test_the_residual_is_that_of_the_truncated_decomposition() -> None:
    model, batch = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)).double(), torch.randn(50, 12).double()
    structures, moments = moments_of(model, batch)
    weight = model[2].weight.detach()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    rest = (weight - (u[:, :2] * s[:2]) @ vh[:2]).square().sum(0)
    torch.testing.assert_close(LowRankSignificance(1 / 3, "residual")(model, structures[0]), rest)
    relative = rest / weight.square().sum(0)
    torch.testing.assert_close(LowRankSignificance(1 / 3)(model, structures[0]), relative)
    fisher = torch.rand(8)
    combined = LowRankSignificance(1 / 3, scores={"ffn": fisher})(model, structures[0])
    torch.testing.assert_close(combined, fisher.double() * relative)
    # inputs that are uncorrelated and of equal size change nothing but the scale
    moments["2.weight"].gram = 7.0 * torch.eye(8, dtype=torch.float64)
    aware = LowRankSignificance(1 / 3, "activation", moments)(model, structures[0])
    torch.testing.assert_close(aware, rest / weight.square().sum())


def test_a_unit_without_activity_has_no_activation_aware_significance() -> None:
    model, batch = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)).double(), torch.randn(50, 12).double()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, -1
    structures, moments = moments_of(model, batch)
    assert int(LowRankSignificance(form="activation", moments=moments)(model, structures[0]).argmin()) == 3


def test_what_low_rank_significance_refuses() -> None:
    model, batch = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(50, 12)
    structures, _ = moments_of(model, batch)
    with pytest.raises(ValueError, match=r"Expected rank, .* in \(0, 1\), but got 1"):
        LowRankSignificance(1)
    with pytest.raises(ValueError, match="Expected form to be one of"):
        LowRankSignificance(form="residuum")
    with pytest.raises(ValueError, match="Expected moments=input_moments"):
        LowRankSignificance(form="activation")
    with pytest.raises(ValueError, match=r"Expected moments of the inputs of '2.weight'"):
        LowRankSignificance(form="activation", moments={})(model, structures[0])
    silent = [s for s in discover(nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3) if s.kind == "qk_dim"]
    with pytest.raises(ValueError, match="Expected weights that read the units of structure"):
        LowRankSignificance()(model, silent[0])
