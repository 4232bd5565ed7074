"""The watched steps are those that happened, with the learning rates they happened with."""

import pytest
import torch
from torch import nn

from lightning_compress.callbacks.optimizer_steps import OptimizerSteps


def test_learning_rates_are_summed_per_group_and_step() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}])
    steps = OptimizerSteps()
    steps.attach([optimizer])
    steps.attach([optimizer])  # watched once
    pending = steps.pending()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert steps.count == 3
    key_a, key_b = steps.owner(a), steps.owner(b)
    assert key_a is not None and key_b is not None and steps.owner(c) is None
    assert pending.count == 3
    assert pending.take() == {key_a: 0.1 + 0.05 + 0.025, key_b: 0.01 + 0.005 + 0.0025}
    optimizer.step()
    assert (pending.count, pending.take()[key_a]) == (1, 0.1 * 0.5**3)  # bit for bit, whatever was summed up before
    assert steps.count == 4
    assert steps.learning_rate(key_a) == pytest.approx(0.0125)  # of the last step, not of the next
    steps.detach()
    optimizer.step()
    assert steps.count == 4


def test_a_step_that_a_fused_optimizer_skips_is_no_step() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
    steps = OptimizerSteps()
    steps.attach([optimizer])
    optimizer.found_inf = torch.tensor(1.0)  # as a gradient scaler sets it
    optimizer.step()
    assert steps.count == 0
    assert parameter.tolist() == [1.0, 1.0]
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert steps.count == 1


def test_a_group_that_is_added_later_is_found() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([a], lr=0.1)
    steps = OptimizerSteps()
    steps.attach([optimizer])
    assert steps.owner(b) is None
    optimizer.add_param_group({"params": [b]})
    steps.forget_owners()
    assert steps.owner(b) == (0, 1)


def test_what_cannot_be_observed_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected optimizers to be torch.optim.Optimizer, .* but got object"):
        OptimizerSteps().attach([object()])  # type: ignore[list-item]
