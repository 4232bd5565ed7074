"""The parts of token pruning in a fit, one by one: schedule, thresholds, targets, recent calls, the wrapped step."""

from statistics import NormalDist
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.token_calls import KEPT, RecentCalls
from lightning_compress.callbacks.token_schedule import SoftSchedule
from lightning_compress.callbacks.token_targets import cascade, meet, ramped, shifted, top_k_for
from lightning_compress.callbacks.token_thresholds import ThresholdLearner
from lightning_compress.callbacks.training_step import with_loss, wrap_training_step
from lightning_compress.token_policies import Thresholds, TokenPolicy, TopK
from lightning_compress.tokens.observation import ScoreObserver, ScoreSpread

CPU = torch.device("cpu")
SPREADS = [ScoreSpread(0.8, 0.4), ScoreSpread(0.25, 0.1), ScoreSpread(1.0, 1.0)]


def test_the_recommended_schedule() -> None:
    schedule = SoftSchedule("recommended")
    assert [schedule.temperature_at(p) for p in (0, 0.5, 1)] == pytest.approx([1.0, 0.316, 0.1], rel=1e-3)
    assert [schedule.straight_through_at(p) for p in (0, 0.1, 0.2, 0.7)] == [False, False, True, True]
    assert [schedule.target_at(p, 0.4) for p in (0, 1 / 3, 2 / 3, 1)] == pytest.approx([1, 0.7, 0.4, 0.4])
    assert schedule.learning_rate_at(0.9, steps=10_000, budget=False) == 0.01
    assert schedule.learning_rate_at(0.9, steps=80, budget=False) == 0.1  # so that thresholds get anywhere
    assert schedule.learning_rate_at(0.9, steps=80) == 0.002  # the budget moves them
    assert SoftSchedule("recommended", learning_rate=0.5).learning_rate_at(0.1, steps=40) == 0.5
    # four spreads below the median, where a mask is 0.98
    values, scales = schedule.first_thresholds(SPREADS)
    assert values == pytest.approx((0.8 - 5 * 0.4, 0.25 - 4 * 0.1, 1 - 3 * 1.0)) and scales == (0.4, 0.1, 1.0)


def test_the_published_schedule() -> None:
    schedule = SoftSchedule("faithful")
    assert schedule.temperature_at(0.1) == schedule.temperature_at(0.9) == pytest.approx(0.128)
    assert not schedule.straight_through_at(1.0)
    assert schedule.learning_rate_at(0.75, steps=7) == pytest.approx(2e-5 * 128 / 4)
    values, scales = schedule.first_thresholds(SPREADS)
    assert values == pytest.approx((-1e4, 0.32, 0.64)) and scales == (1, 1, 1)


def test_median_and_spread_are_those_of_tokens_that_may_leave() -> None:
    observer = ScoreObserver(2)
    scores = torch.tensor([[9.0, 0.2, 0.4, 0.6, 0.8, 1.0], [7.0, 0.3, 0.5, 0.7, 0.0, 0.0]])
    active = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    first = torch.tensor([[True] + [False] * 5] * 2)
    real = torch.tensor([6, 4])
    assert torch.equal(observer.keep(0, scores, active, real, first, 1), active)
    observer.keep(1, torch.full((2, 6), torch.nan), active, real, None, 1)
    free = [s / 0.5 for s in (0.2, 0.4, 0.6, 0.8, 1.0)] + [s / 0.4 for s in (0.3, 0.5, 0.7)]  # without the largest
    low, high = (np.quantile(free, q) for q in (0.25, 0.75))
    normal = NormalDist().inv_cdf(0.75) - NormalDist().inv_cdf(0.25)
    assert observer.spreads()[0].tolist() == pytest.approx([np.quantile(free, 0.5), (high - low) / normal], rel=1e-3)
    assert observer.spreads()[1].tolist() == [1.0, 1e-3]  # nothing to be known


def test_thresholds_move_in_their_scales() -> None:
    learner = ThresholdLearner((1.0, 2.0), CPU, scales=(0.1, 10.0))
    learner.thresholds.sum().backward()
    learner.collect(Processes(), 1.0)
    learner.step(0.5)
    assert learner.values == pytest.approx((1 - 0.05, 2 - 5.0))


def test_gradients_are_unscaled_and_steps_that_are_not_finite_are_left_out() -> None:
    learner = ThresholdLearner((0.0, 0.0), CPU)
    (learner.thresholds * torch.tensor([3.0, -1.0]) * 1024).sum().backward()
    learner.collect(Processes(), 1024.0)
    assert learner._ready[:2] == [3.0, -1.0]
    learner.step(0.1)
    assert learner.values == pytest.approx((-0.1, 0.1))
    assert learner.offsets.grad is None
    learner.step(0.1)  # nothing collected since
    assert learner.values == pytest.approx((-0.1, 0.1))
    (learner.thresholds * torch.inf).sum().backward()
    learner.collect(Processes(), 1024.0)
    learner.step(0.1)
    assert learner.values == pytest.approx((-0.1, 0.1))
    (learner.thresholds * 2).sum().backward()
    learner.collect(Processes(), 1.0)
    learner.skip()  # the weights did not move
    learner.step(0.1)
    assert learner.values == pytest.approx((-0.1, 0.1))


def test_a_shift_brings_a_cost_to_its_target_and_the_loss_decides_the_rest() -> None:
    learner = ThresholdLearner((0.0, 0.0), CPU, scales=(1.0, 2.0))
    for _ in range(400):
        kept = torch.sigmoid(-learner.thresholds)
        learner.budget(kept.mean(), 0.3)
        (kept[1] - kept[0]).backward()  # the loss wants the first to keep more than the second
        learner.collect(Processes(), 1.0)
        learner.step(0.005)
    kept = torch.sigmoid(-learner.thresholds.detach())
    assert float(kept.mean()) == pytest.approx(0.3, abs=0.01)
    assert kept[0] > 0.4 and kept[1] < 0.2
    assert float(learner.offsets.detach().sum()) == pytest.approx(0.0, abs=1e-4)  # the rest is the shift


def test_a_shift_is_bounded_in_a_step() -> None:
    learner = ThresholdLearner((0.0,), CPU)
    for _ in range(2):
        learner.budget(torch.tensor(1.0), 0.1)
        learner.collect(Processes(), 1.0)
        learner.step(0.01)
    assert learner.values == pytest.approx((0.5,))
    learner.budget(torch.tensor(torch.nan), 0.1)
    learner.collect(Processes(), 1.0)
    learner.step(0.01)
    assert learner.values == pytest.approx((0.5,))


def test_thresholds_rise_over_the_depth() -> None:
    schedule = SoftSchedule("recommended")
    spreads = [ScoreSpread(1.0, 0.1)] * 3
    assert schedule.first_thresholds(spreads)[0] == pytest.approx((0.5, 0.6, 0.7))
    assert schedule.first_thresholds(spreads, whole=True)[0] == pytest.approx((-1e4, 0.5, 0.7))
    assert schedule.first_thresholds(spreads[:1])[0] == pytest.approx((0.5,))
    assert schedule.first_thresholds(spreads[:2], whole=True)[0] == pytest.approx((-1e4, 0.5))


def test_a_learner_goes_on_where_its_state_was_taken() -> None:
    def step(learner: ThresholdLearner, factor: float) -> None:
        learner.budget((learner.thresholds * factor).sum(), 0.5)
        (learner.thresholds * factor).square().sum().backward()
        learner.collect(Processes(), 1.0)
        learner.step(0.1)

    one = ThresholdLearner((0.5, 1.0), CPU)
    step(one, 1.0)
    one.budget(one.thresholds.sum(), 0.2)
    one.thresholds.square().sum().backward()  # in the middle of an accumulation
    other = ThresholdLearner.from_state(one.state_dict(), CPU)
    for factor in (2.0, 3.0):
        step(one, factor)
        step(other, factor)
    assert one.values == other.values
    assert one.shift == other.shift


def macs_of(policy: TokenPolicy) -> float:
    """A cost that falls with thresholds and rises with rates."""
    numbers = policy.rates if isinstance(policy, TopK) else [1 / (1 + 2.0**t) for t in policy.values]  # type: ignore[attr-defined]
    return (1 + sum(numbers)) / (1 + len(numbers))


def test_thresholds_are_shifted_together() -> None:
    policy, cost = meet(macs_of, shifted(Thresholds((0.0, 1.0)), (1.0, 1.0)), 0.0, 0.02, 0.5)
    assert isinstance(policy, Thresholds)
    assert policy.values[1] - policy.values[0] == pytest.approx(1.0)
    assert 0.497 <= cost <= 0.5
    policy, cost = meet(
        macs_of, shifted(Thresholds((5.0, 9.0), among_rest=True), (1.0, 2.0)), 0.0, 0.02, 0.8
    )  # back up, each in its own scale
    assert isinstance(policy, Thresholds)
    assert policy.among_rest
    assert policy.values[1] - 9 == pytest.approx(2 * (policy.values[0] - 5))
    assert 0.797 <= cost <= 0.8


def test_a_ramp_ends_at_one_number() -> None:
    policy, cost = meet(macs_of, ramped(4), 1.0, 0.25, 0.6)
    assert isinstance(policy, Thresholds)
    assert policy.values[0] == 0.0
    assert policy.values[2] == pytest.approx(2 * policy.values[1])
    assert 0.597 <= cost <= 0.6


def test_a_target_out_of_reach_gives_the_cheapest() -> None:
    policy, cost = meet(macs_of, shifted(Thresholds((0.0, -1e4)), (1.0, 1.0)), 0.0, 0.02, 0.5)
    assert cost == pytest.approx(2 / 3, abs=1e-3)
    assert policy.values[0] > 50  # type: ignore[attr-defined]


@pytest.mark.parametrize(("layers", "target", "whole"), [(12, 0.7, 3), (12, 0.5, 0), (6, 0.7, 2), (6, 0.35, 0)])
def test_a_cascade_leaves_as_many_layers_whole_as_it_can(layers: int, target: float, whole: int) -> None:
    policy, cost = top_k_for(macs_of, layers, target)
    assert isinstance(policy, TopK)
    assert len(policy.rates) == layers - 1
    assert list(policy.rates).count(1.0) == whole
    assert 0.99 * target <= cost <= target
    assert cascade(6, 2)(0.3).rates == pytest.approx((1.0, 1.0, 0.7, 0.4, 0.1))


def test_recent_calls_are_few_and_survive_a_checkpoint() -> None:
    calls = RecentCalls()
    for number in range(KEPT + 2):
        calls.add((torch.full((2,), number), None), {"mask": torch.ones(2), "many": [1, "a"]}, torch.tensor([True]))
    assert len(calls) == KEPT
    again = RecentCalls()
    again.load(calls.state(), CPU)
    first = next(iter(again))
    assert first.call.args[0].tolist() == [2, 2]
    assert first.call.kwargs["many"] == [1, "a"]
    assert first.protected is not None
    calls.add((object(),), {}, None)  # nothing that a checkpoint should hold
    assert len(calls.state()) == KEPT - 1


class Module(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return [batch, batch_idx]


def test_a_step_is_wrapped_from_the_inside_out_by_name_and_given_back_in_any_order() -> None:
    module = Module()
    undo = [
        wrap_training_step(module, name, lambda call, name=name: [*call(), name])  # type: ignore[misc]
        for name in ("B", "A")
    ]
    assert module.training_step("x", 3) == ["x", 3, "A", "B"]
    with pytest.raises(ValueError, match="replaced on the instance, for example by another A"):
        wrap_training_step(module, "A", lambda call: call())
    undo[0]()
    assert module.training_step("x", 3) == ["x", 3, "A"]
    undo[1]()
    undo[1]()
    assert "training_step" not in vars(module)


def test_a_loss_is_changed_where_it_lies() -> None:
    assert with_loss(torch.tensor(1.0), lambda loss: loss + 1) == 2
    assert with_loss({"loss": 1.0, "other": 5}, lambda loss: loss + 1) == {"loss": 2.0, "other": 5}
    with pytest.raises(ValueError, match=r"to return a 'loss', but got the keys \['x'\]"):
        with_loss({"x": 1}, lambda loss: loss)
