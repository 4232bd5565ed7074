"""Rearrangement: as many units, never a larger loss, and the best pair where the best is near."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_compress import PruningPlan, discover, joint_scores, rearranged, rearranged_plan
from lightning_compress.post_training.search import joint_loss


@pytest.mark.parametrize("seed", range(5))
def test_it_never_raises_the_loss_and_often_lowers_it(seed: int) -> None:
    torch.manual_seed(seed)
    gradients = torch.randn(30, 12, dtype=torch.float64)
    fisher = gradients.T @ gradients
    removed = torch.zeros(12, dtype=torch.bool)
    removed[fisher.diagonal().argsort()[:5]] = True
    after = rearranged(fisher, removed)
    assert int(after.sum()) == 5
    assert joint_loss(fisher, after) < joint_loss(fisher, removed)
    best = min(
        joint_loss(fisher, torch.isin(torch.arange(12), torch.tensor(units)))
        for units in itertools.combinations(range(12), 5)
    )
    assert best <= joint_loss(fisher, after) <= best + 0.75 * (joint_loss(fisher, removed) - best)


def test_units_that_cancel_go_together() -> None:
    gradients = torch.randn(20, 1, dtype=torch.float64)
    others = 3 * torch.randn(20, 4, dtype=torch.float64)
    fisher = torch.cat([gradients, -gradients, others], 1)
    fisher = fisher.T @ fisher
    removed = torch.tensor([True, False, True, False, False, False])
    after = rearranged(fisher, removed)
    assert after.tolist() == [True, True, False, False, False, False]
    assert joint_loss(fisher, after) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [0, 4])
def test_nothing_or_everything_stays(count: int) -> None:
    removed = torch.arange(4) < count
    assert torch.equal(rearranged(torch.eye(4), removed), removed)


def test_independent_units_stay_as_they_are() -> None:
    removed = torch.tensor([True, False, True, False])
    assert torch.equal(rearranged(torch.diag(torch.tensor([1.0, 2.0, 1.0, 2.0])), removed), removed)


def test_a_plan_keeps_its_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    structures = discover(model, (torch.randn(3, 4),))
    plan = PruningPlan.of(model, structures, {"ffn": [0, 1, 2], "ffn_2": [0, 1]})
    gradients = torch.randn(9, 6)
    after = rearranged_plan(model, plan, {"ffn": gradients.T @ gradients})
    assert after.counts == plan.counts
    assert after.kept["ffn_2"] == plan.kept["ffn_2"] and after.kept["ffn"] != plan.kept["ffn"]


def test_joint_scores_add_up_to_the_joint_loss() -> None:
    gradients = torch.rand(30, 9, dtype=torch.float64)  # all push the same way
    fisher = gradients.T @ gradients
    scores = joint_scores(fisher)
    for count in range(1, 10):
        gone = torch.zeros(9, dtype=torch.bool)
        gone[scores.argsort()[:count]] = True
        assert float(scores[gone].sum()) == pytest.approx(joint_loss(fisher, gone))
    assert float(scores.sum()) > 5 * float(fisher.diagonal().sum())
    assert torch.equal(joint_scores(torch.diag(torch.arange(4.0))), torch.arange(4.0).double())


def test_joint_scores_are_never_negative() -> None:
    gradients = torch.randn(20, 1, dtype=torch.float64)
    fisher = torch.cat([gradients, -gradients, 3 * torch.randn(20, 1, dtype=torch.float64)], 1)
    scores = joint_scores(fisher.T @ fisher)
    assert scores[0] == scores[1] < scores[2]
