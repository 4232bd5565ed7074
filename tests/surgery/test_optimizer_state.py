"""State follows its parameter for every optimizer that torch has."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan
from lightning_compress.surgery import SurgeryError, apply_plan, zero_units
from lightning_compress.surgery.optimizer_state import state_axes
from tests.hand_made import FeedForward, feed_forward_structures

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
# these do not treat elements one by one: root mean squares of whole tensors, matrix products, one history of all
WHOLE_TENSOR = {"Adafactor", "Muon", "LBFGS"}
SPARSE_ONLY = {"SparseAdam"}
ELEMENTWISE = sorted(OPTIMIZERS.keys() - WHOLE_TENSOR - SPARSE_ONLY)
EXTRA: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
}
KEPT = (0, 3, 4)
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model_and_plan() -> tuple[FeedForward, PruningPlan]:
    model = FeedForward(units=6).double()
    with torch.no_grad():
        model.up.bias += 2.0  # all units alive, so that every moment is not zero
    structures = feed_forward_structures(units=6)
    return model, PruningPlan.of(model, structures, {structures[0].name: KEPT})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, freeze: dict[str, Tensor] | None = None) -> None:
    optimizer.zero_grad()
    (model(X) ** 2).sum().backward()
    for name, mask in (freeze or {}).items():
        model.get_parameter(name).grad.mul_(mask)
    optimizer.step()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_step_of_the_small_model_is_the_step_of_the_zeroed_one(name: str) -> None:
    zeroed, plan = model_and_plan()
    optimizer = OPTIMIZERS[name](zeroed.parameters(), lr=1e-2, **EXTRA.get(name, {}))
    for _ in range(2):
        step(zeroed, optimizer)
    removed, small_optimizer = copy.deepcopy((zeroed, optimizer))

    zero_units(zeroed, plan, [optimizer])
    apply_plan(removed, plan, [small_optimizer], verify=((X,), {}))
    for state in small_optimizer.state.values():
        assert all(v.dim() <= 2 for v in state.values() if isinstance(v, Tensor))
    for parameter, state in small_optimizer.state.items():
        assert any(isinstance(v, Tensor) and v.shape == parameter.shape for v in state.values()) or name == "SGD"

    for _ in range(3):
        step(zeroed, optimizer)
        zero_units(zeroed, plan, [optimizer])
        step(removed, small_optimizer)
    kept = list(KEPT)
    assert torch.allclose(removed.up.weight, zeroed.up.weight[kept], rtol=1e-12, atol=1e-14)
    assert torch.allclose(removed.up.bias, zeroed.up.bias[kept], rtol=1e-12, atol=1e-14)
    assert torch.allclose(removed.down.weight, zeroed.down.weight[:, kept], rtol=1e-12, atol=1e-14)
    assert torch.allclose(removed.down.bias, zeroed.down.bias, rtol=1e-12, atol=1e-14)


def test_the_list_of_optimizers_is_complete() -> None:
    assert {"Adam", "AdamW", "SGD", "Adagrad", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"} <= set(ELEMENTWISE)


def test_factored_moments_of_adafactor_are_cut_on_the_axis_they_have() -> None:
    model, plan = model_and_plan()
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer)
    before = copy.deepcopy({n: optimizer.state[p] for n, p in model.named_parameters()})
    apply_plan(model, plan, [optimizer], verify=((X,), {}))
    kept = list(KEPT)
    after = {n: optimizer.state[p] for n, p in model.named_parameters()}
    assert torch.equal(after["up.weight"]["row_var"], before["up.weight"]["row_var"][kept])
    assert torch.equal(after["up.weight"]["col_var"], before["up.weight"]["col_var"])
    assert torch.equal(after["down.weight"]["row_var"], before["down.weight"]["row_var"])
    assert torch.equal(after["down.weight"]["col_var"], before["down.weight"]["col_var"][:, kept])
    assert torch.equal(after["up.bias"]["variance"], before["up.bias"]["variance"][kept])
    step(model, optimizer)


@pytest.mark.skipif("Muon" not in OPTIMIZERS, reason="this torch has no Muon")
def test_muon_keeps_stepping() -> None:
    model, plan = model_and_plan()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizers = [OPTIMIZERS["Muon"](matrices, lr=1e-2), torch.optim.AdamW(rest)]
    for optimizer in optimizers:
        step(model, optimizer)
    apply_plan(model, plan, optimizers, verify=((X,), {}))
    assert {tuple(s["momentum_buffer"].shape) for s in optimizers[0].state.values()} == {(3, 3), (2, 3)}
    for optimizer in optimizers:
        step(model, optimizer)


def test_several_groups_and_optimizers_and_a_parameter_in_none() -> None:
    model, plan = model_and_plan()
    first = torch.optim.Adam([{"params": [model.up.weight], "lr": 1e-3}, {"params": [model.up.bias], "lr": 1e-2}])
    second = torch.optim.SGD([model.down.weight], lr=1e-2, momentum=0.9)
    step(model, first)
    step(model, second)
    apply_plan(model, plan, [first, second], verify=((X,), {}))
    assert [len(g["params"]) for g in first.param_groups] == [1, 1]
    assert first.param_groups[0]["params"][0] is model.up.weight
    assert first.state[model.up.weight]["exp_avg"].shape == (3, 3)
    assert second.state[model.down.weight]["momentum_buffer"].shape == (2, 3)
    assert model.down.bias not in first.state and model.down.bias not in second.state
    step(model, first)


def test_an_optimizer_without_state_gets_none() -> None:
    model, plan = model_and_plan()
    optimizer = torch.optim.Adam(model.parameters())
    apply_plan(model, plan, [optimizer], verify=((X,), {}))
    assert not optimizer.state


def test_lbfgs_is_refused_by_name_and_nothing_changes() -> None:
    model, plan = model_and_plan()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(SurgeryError, match=r"LBFGS for 'up\.weight': its history is one flat vector"):
        apply_plan(model, plan, [optimizer], verify=((X,), {}))
    assert model.up.weight.shape == (6, 3)


def test_state_of_an_unknown_shape_is_refused_by_name() -> None:
    model, plan = model_and_plan()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.up.weight]["sketch"] = torch.zeros(7, 7)
    with pytest.raises(
        SurgeryError, match=r"state 'sketch' of SGD for 'up.weight' to have the parameter's shape \(6, 3\).*\(7, 7\)"
    ):
        apply_plan(model, plan, [optimizer], verify=((X,), {}))
    assert model.up.weight.shape == (6, 3)


def test_what_is_no_optimizer_is_refused() -> None:
    model, plan = model_and_plan()
    with pytest.raises(TypeError, match=r"Expected optimizers to be torch\.optim\.Optimizer instances, but got list"):
        apply_plan(model, plan, [[torch.optim.SGD(model.parameters())]], verify=((X,), {}))  # type: ignore[list-item]


def test_lists_of_state_tensors_follow() -> None:
    model, plan = model_and_plan()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.up.bias]["history"] = [torch.arange(6.0), torch.arange(6.0) + 10]
    apply_plan(model, plan, [optimizer], verify=((X,), {}))
    assert [t.tolist() for t in optimizer.state[model.up.bias]["history"]] == [[0, 3, 4], [10, 13, 14]]


KEPT_AXES = {0: torch.tensor([0]), 1: torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("key", "shape", "parameter", "axes"),
    [
        ("exp_avg", (4, 5), (4, 5), {0, 1}),
        ("step", (), (4, 5), set()),
        ("step", (1,), (4, 5), set()),
        ("row_var", (4, 1), (4, 5), {0}),
        ("col_var", (1, 5), (4, 5), {1}),
        ("exp_avg_sq_row", (4,), (4, 5), {0}),
        ("exp_avg_sq_col", (5,), (4, 5), {0}),  # the only axis it has is the parameter's second
        ("exp_avg_sq_row", (4,), (4, 4), {0}),
        ("exp_avg_sq_col", (4,), (4, 4), {0}),
        ("other", (4,), (4, 4), None),  # rows or columns? unknown
        ("other", (9, 9), (4, 5), None),
        ("other", (4, 5, 6), (4, 5), None),
    ],
)
def test_axes_of_a_state_tensor(
    key: str, shape: tuple[int, ...], parameter: tuple[int, ...], axes: set[int] | None
) -> None:
    found = state_axes(key, torch.zeros(shape), parameter, KEPT_AXES)
    assert (None if found is None else set(found)) == axes
    if found and key == "exp_avg_sq_col":
        assert found[0] is KEPT_AXES[1]


def test_zero_units_also_clears_gradients_and_moments() -> None:
    model, plan = model_and_plan()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    zero_units(model, plan, [optimizer])
    gone = [1, 2, 5]
    for tensor in (model.down.weight, model.down.weight.grad, optimizer.state[model.down.weight]["exp_avg"]):
        assert not tensor[:, gone].any() and tensor[:, list(KEPT)].all()
    assert model.up.weight[gone].all()  # the producer of a unit that nobody reads may stay as it is
