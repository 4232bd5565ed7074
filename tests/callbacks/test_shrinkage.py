"""The shrinkage of coupled units and of lines, without a Trainer."""

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.callbacks.groups import chosen_groups
from lightning_compress.callbacks.optimizer_steps import OptimizerSteps
from lightning_compress.callbacks.shrinkage import CoupledShrinkage, MatrixGroups, MatrixShrinkage, unit_costs
from lightning_compress.regularizers import regularizer
from tests.hand_made import FeedForward, feed_forward_structures

LR = 0.1


def shrinkage(name: str = "group_lasso") -> tuple[FeedForward, CoupledShrinkage, OptimizerSteps]:
    torch.manual_seed(0)
    model = FeedForward(units=6).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    steps = OptimizerSteps()
    steps.attach([optimizer])
    optimizer.step()
    structures = feed_forward_structures(units=6)
    own = CoupledShrinkage(
        dict(model.named_parameters()), list(structures), regularizer(name), steps, unit_costs(structures, "macs")
    )
    return model, own, steps


def norms(model: FeedForward) -> Tensor:
    rows = model.up.weight.square().sum(1) + model.up.bias.square() + model.down.weight.square().sum(0)
    return rows.sqrt().detach()


@pytest.mark.parametrize("steps_left", [1, 5, 40])
def test_the_strength_is_the_one_that_is_needed(steps_left: int) -> None:
    model, own, _ = shrinkage()
    (key,) = set(own.rates.keys.values())
    protected = torch.tensor([False, True, False, False, True, False])
    before = norms(model)
    own.observe()
    own.protect({own.structures[0].name: protected})
    strength = own.strength(steps_left)
    for left in reversed(range(steps_left)):
        assert (norms(model)[~protected] > 0).any()
        own.apply(strength, {key: LR})
        if left > 0.02 * steps_left:
            assert norms(model).max() > 0
    assert norms(model)[~protected].max() == 0
    assert torch.equal(norms(model)[protected], before[protected])


def test_a_unit_that_was_zero_once_is_not_revived() -> None:
    model, own, _ = shrinkage()
    (key,) = set(own.rates.keys.values())
    with torch.no_grad():
        model.up.weight[2] *= 1e-3
        model.up.bias[2] = 0
        model.down.weight[:, 2] = 0
    own.apply(0.1, {key: LR})
    assert [bool(n == 0) for n in norms(model)] == [False, False, True, False, False, False]
    own.observe()
    assert own.dead()[own.structures[0].name].tolist() == [False, False, True, False, False, False]
    with torch.no_grad():
        model.down.weight[:, 2] = 1.0  # as momentum would
    own.apply(1e-9, {key: LR})
    assert norms(model)[2] == 0


def test_nothing_happens_without_a_step() -> None:
    model, own, _ = shrinkage()
    before = norms(model)
    own.apply(5.0, {})
    assert torch.equal(norms(model), before)


def test_costs_order_what_goes_first() -> None:
    """A unit of twice the cost per scalar shrinks sqrt(2) times as fast."""
    parameters = {n: nn.Parameter(torch.ones(4, 4)) for n in ("a", "b")}
    table = torch.arange(4).unsqueeze(1)
    from lightning_compress.structures import Slice, Structure

    structures = [Structure(n, "ffn", 4, (Slice(n, 0, 4, table, "producer"),)) for n in ("a", "b")]
    steps = OptimizerSteps()
    steps.attach([torch.optim.SGD(parameters.values(), lr=LR)])
    own = CoupledShrinkage(parameters, structures, regularizer("group_lasso"), steps, {"a": 8.0, "b": 4.0})
    (key,) = set(own.rates.keys.values())
    own.apply(0.1, {key: LR})
    fell = [2.0 - float(parameters[n].detach()[0].norm()) for n in ("a", "b")]
    assert fell[0] / fell[1] == pytest.approx(2**0.5, rel=1e-4)


def test_lines_of_protected_units_are_exempt() -> None:
    model = FeedForward(units=6).double()
    steps = OptimizerSteps()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    steps.attach([optimizer])
    optimizer.step()
    parameters = dict(model.named_parameters())
    structures = list(feed_forward_structures(units=6))
    lines = chosen_groups(parameters, structures, "rows", None, None, ())
    own = MatrixShrinkage(parameters, lines, regularizer("group_lasso"), steps)
    (key,) = set(own.rates.keys.values())
    protected = torch.tensor([True, False, False, False, False, True])
    before = model.up.weight.detach().clone()
    own.protect({structures[0].name: protected})
    own.apply(own.strength(3), {key: 3 * LR})
    assert torch.equal(model.up.weight[protected], before[protected])
    assert model.up.weight[~protected].abs().max() == 0


@pytest.mark.parametrize("mode", ["proximal", "loss"])
@pytest.mark.parametrize("name", ["group_lasso", "hoyer_square"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_part_of_a_packed_matrix_is_a_matrix_of_its_own(axis: int, name: str, mode: str) -> None:
    rows = torch.tensor([1, 2, 5])  # they need not lie side by side
    packed = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    alone = nn.Parameter(packed.detach()[rows].clone())
    before = packed.detach().clone()
    changed = []
    for weight, part in ((packed, (0, rows)), (alone, None)):
        weight.grad = torch.zeros_like(weight)
        steps = OptimizerSteps()
        optimizer = torch.optim.SGD([weight], lr=LR)
        steps.attach([optimizer])
        optimizer.step()
        owner = ("unit", torch.arange(3)) if axis == 0 else None
        own = MatrixShrinkage({"w": weight}, [MatrixGroups("w", axis, owner, part)], regularizer(name), steps)
        own.protect({"unit": torch.tensor([False, True, False])})
        if mode == "loss":
            own.add_gradient(0.5, {"w": weight.grad})
        else:
            (key,) = set(own.rates.keys.values())
            own.apply(1.5, {key: LR})
        changed.append(weight.grad if mode == "loss" else weight.detach())
    others = torch.tensor([0, 3, 4])
    torch.testing.assert_close(changed[0][rows], changed[1])
    assert torch.equal(changed[0][others], before[others] if mode == "proximal" else torch.zeros(3, 4).double())
    assert not torch.equal(changed[1], before[rows] if mode == "proximal" else torch.zeros(3, 4).double())
