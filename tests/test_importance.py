from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.importance import (
    TaylorAccumulator,
    gate_gradients,
    unit_norms,
    unit_scores,
    unit_sizes,
)
from lightning_compress.structures import Slice, Structure
from tests.hand_made import Attention, FeedForward, attention_structures, feed_forward_structures


def loss_of(model: FeedForward, batch: Tensor, gates: Tensor | float = 1.0) -> Tensor:
    return model(batch, gates).square().sum()


def backward(model: FeedForward, batch: Tensor) -> None:
    model.zero_grad()
    loss_of(model, batch).backward()


# Norms


def test_the_norm_of_a_unit_is_that_of_its_rows_bias_and_columns() -> None:
    model = FeedForward().double()
    norms = unit_norms(model, feed_forward_structures())["ffn"]
    for unit in range(4):
        members = [model.up.weight[unit], model.up.bias[unit : unit + 1], model.down.weight[:, unit]]
        assert norms[unit] == pytest.approx(torch.cat(members).norm().item(), rel=1e-12)
    assert unit_sizes(model, feed_forward_structures()) == {"ffn": 3 + 1 + 2}


def test_structures_that_share_an_axis_each_count_it() -> None:
    model, structures = Attention(width=4, heads=3, dims=4).double(), attention_structures(width=4, heads=3, dims=4)
    norms = unit_norms(model, structures)
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        squares = model.o.weight[:, rows].square().sum()
        for layer in (model.q, model.k, model.v):
            squares = squares + layer.weight[rows].square().sum() + layer.bias[rows].square().sum()
        assert norms["head"][head] == pytest.approx(squares.sqrt().item(), rel=1e-12)
    for dim in range(4):
        rows = slice(dim, None, 4)
        squares = model.v.weight[rows].square().sum() + model.v.bias[rows].square().sum()
        squares = squares + model.o.weight[:, rows].square().sum()
        assert norms["vo_dim"][dim] == pytest.approx(squares.sqrt().item(), rel=1e-12)
    assert unit_sizes(model, structures) == {"head": 4 * (3 * 5 + 4), "qk_dim": 3 * 10, "vo_dim": 3 * 9}


def test_the_norm_score_is_size_times_mean_square() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
        model.down.weight[:, 2] = 0.0
    scores = unit_scores(model, structures)["ffn"]
    assert scores.tolist() == pytest.approx([6 / 4, 6 / 4, 4 / 4, 6 / 4])
    assert scores.dtype == torch.float64


def test_companions_do_not_count() -> None:
    model, structure = FeedForward(), feed_forward_structures()[0]
    companion = replace(
        structure, slices=(*structure.slices, Slice("up.bias", 0, 4, torch.arange(4)[:, None], "companion"))
    )
    assert torch.equal(unit_norms(model, [companion])["ffn"], unit_norms(model, [structure])["ffn"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # 4096 squares of 8 are 262144: beyond the largest float16, and beyond what bfloat16 can count one by one
    model = FeedForward(inputs=4096).to(dtype)
    nn.init.constant_(model.up.weight, 8.0)
    nn.init.zeros_(model.up.bias)
    nn.init.zeros_(model.down.weight)
    scores = unit_scores(model, feed_forward_structures(inputs=4096))["ffn"]
    assert scores.tolist() == pytest.approx([4096 * 64.0] * 4, rel=1e-6)


# First-order Taylor


def test_gate_gradients_are_those_of_real_gates() -> None:
    model, batch = FeedForward().double(), torch.randn(5, 3, dtype=torch.float64)
    gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(model, batch, gates), gates)
    backward(model, batch)
    assert torch.allclose(gate_gradients(model, feed_forward_structures())["ffn"], expected, rtol=1e-12)
    scores = unit_scores(model, feed_forward_structures(), "taylor")["ffn"]
    assert torch.allclose(scores, expected.square(), rtol=1e-12)


def test_the_producer_side_holds_the_same_derivative() -> None:
    # why one side is enough: relu is homogeneous, so scaling a unit's weights and bias is scaling its output
    model, batch = FeedForward().double(), torch.randn(5, 3, dtype=torch.float64)
    structure = feed_forward_structures()[0]
    other_side = replace(structure, slices=tuple(replace(s, zero=s.role == "producer") for s in structure.slices))
    backward(model, batch)
    consumer, producer = (gate_gradients(model, [s])["ffn"] for s in (structure, other_side))
    assert torch.allclose(consumer, producer, rtol=1e-12)


def test_slices_are_added_before_squaring() -> None:
    model = Attention().double()
    structures = attention_structures()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    scores = unit_scores(model, structures, "taylor")["qk_dim"]
    assert model.k.weight.grad is not None and model.k.bias.grad is not None
    for dim in range(4):
        rows = slice(dim, None, 4)
        gate = (model.k.weight[rows] * model.k.weight.grad[rows]).sum()
        gate = gate + (model.k.bias[rows] * model.k.bias.grad[rows]).sum()
        assert scores[dim] == pytest.approx(gate.item() ** 2, rel=1e-12)


def test_gradients_may_be_given_by_name() -> None:
    model, batch = FeedForward(), torch.randn(5, 3)
    gradient = torch.autograd.grad(loss_of(model, batch), model.down.weight)[0]
    given = unit_scores(model, feed_forward_structures(), "taylor", gradients={"down.weight": gradient})
    backward(model, batch)
    assert torch.equal(given["ffn"], unit_scores(model, feed_forward_structures(), "taylor")["ffn"])


def test_half_precision_products_do_not_vanish() -> None:
    model = FeedForward().half()
    nn.init.constant_(model.down.weight, 2.0**-14)
    model.down.weight.grad = torch.full_like(model.down.weight, 2.0**-14)
    gates = gate_gradients(model, feed_forward_structures())["ffn"]
    assert gates.tolist() == [2 * 2.0**-28] * 4


def test_the_accumulator_is_the_mean_over_batches() -> None:
    model, structures = FeedForward().double(), feed_forward_structures()
    accumulator = TaylorAccumulator(model, structures)
    batches = torch.randn(3, 5, 3, dtype=torch.float64)
    scores = []
    for batch in batches:
        backward(model, batch)
        accumulator.update()
        scores.append(unit_scores(model, structures, "taylor")["ffn"])
    assert torch.allclose(accumulator.scores()["ffn"], sum(scores, torch.zeros(4)) / 3, rtol=1e-12)


def test_decay_forgets_and_is_corrected_for_its_start() -> None:
    model, structures = FeedForward().double(), feed_forward_structures()
    accumulator = TaylorAccumulator(model, structures, decay=0.75)
    scores = []
    for batch in torch.randn(4, 5, 3, dtype=torch.float64):
        backward(model, batch)
        accumulator.update()
        scores.append(unit_scores(model, structures, "taylor")["ffn"])
        weights = [0.75**age for age in reversed(range(len(scores)))]
        mean = sum((w * s for w, s in zip(weights, scores, strict=True)), torch.zeros(4)) / sum(weights)
        assert torch.allclose(accumulator.scores()["ffn"], mean, rtol=1e-12)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_batch_that_overflowed_is_left_out(decay: float | None) -> None:
    model, structures = FeedForward(), feed_forward_structures()
    accumulator = TaylorAccumulator(model, structures, decay)
    backward(model, torch.randn(5, 3))
    accumulator.update()
    before = accumulator.scores()["ffn"]
    assert model.down.weight.grad is not None
    model.down.weight.grad[0, 0] = float("inf")
    accumulator.update()
    assert torch.equal(accumulator.scores()["ffn"], before)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_resumed_accumulator_continues(decay: float | None) -> None:
    model, structures = FeedForward(), feed_forward_structures()
    straight, first = TaylorAccumulator(model, structures, decay), TaylorAccumulator(model, structures, decay)
    batches = torch.randn(4, 5, 3)
    for batch in batches[:2]:
        backward(model, batch)
        straight.update()
        first.update()
    resumed = TaylorAccumulator(model, structures, decay)
    state = first.state_dict()
    resumed.load_state_dict(state)
    first.update()  # what was saved does not follow
    for batch in batches[2:]:
        backward(model, batch)
        straight.update()
        resumed.update()
    assert torch.equal(resumed.scores()["ffn"], straight.scores()["ffn"])


def test_reset_forgets() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    accumulator = TaylorAccumulator(model, structures)
    backward(model, torch.randn(5, 3))
    accumulator.update()
    accumulator.reset()
    with pytest.raises(ValueError, match="Expected gradients for structure 'ffn'"):
        accumulator.scores()


def test_the_state_of_other_structures_is_refused() -> None:
    model, structures = FeedForward(), feed_forward_structures()
    accumulator = TaylorAccumulator(model, structures)
    backward(model, torch.randn(5, 3))
    accumulator.update()
    before = accumulator.scores()
    for sums in ({"ffn": torch.zeros(3)}, {"other": torch.zeros(4)}):
        state = {"sums": sums, "weights": {name: torch.tensor(1.0) for name in sums}}
        with pytest.raises(ValueError, match=r"The state is that of other structures"):
            accumulator.load_state_dict(state)
    assert torch.equal(accumulator.scores()["ffn"], before["ffn"])


def test_decay_is_checked() -> None:
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"decay to be None or in \[0, 1\), but got"):
            TaylorAccumulator(FeedForward(), feed_forward_structures(), decay)


def test_frozen_parameters_have_no_taylor_score() -> None:
    model = FeedForward()
    model.down.weight.requires_grad_(False)
    backward(model, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"gradients for structure 'ffn' in one of \['down.weight'\], .* frozen"):
        unit_scores(model, feed_forward_structures(), "taylor")
    accumulator = TaylorAccumulator(model, feed_forward_structures())
    accumulator.update()
    with pytest.raises(ValueError, match="Expected gradients for structure 'ffn'"):
        accumulator.scores()


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient of 'down.weight' to have shape \(2, 4\), but got \(4, 2\)"):
        gate_gradients(FeedForward(), feed_forward_structures(), {"down.weight": torch.ones(4, 2)})


# The user's own, and errors


def test_a_function_scores_each_structure() -> None:
    def bias_first(model: nn.Module, structure: Structure) -> Tensor:
        return model.get_parameter("up.bias").abs() + structure.units

    model = FeedForward()
    scores = unit_scores(model, feed_forward_structures(), bias_first)
    assert torch.equal(scores["ffn"], (model.up.bias.detach().abs() + 4).double())
    assert not scores["ffn"].requires_grad


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda m, s: [1.0], r"of shape \(4,\) for structure 'ffn', but got list"),
        (lambda m, s: torch.ones(3), r"of shape \(4,\) for structure 'ffn', but got shape \(3,\)"),
        (lambda m, s: torch.ones(4, 1), r"of shape \(4,\) for structure 'ffn', but got shape \(4, 1\)"),
        (lambda m, s: -torch.ones(4), r"without negative scores, but got -1"),
        (
            lambda m, s: torch.tensor([1.0, float("nan"), 0.0, 0.0]),
            "finite scores for structure 'ffn', but unit 1 has nan",
        ),
    ],
)
def test_what_a_function_returns_is_checked(score: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_scores(FeedForward(), feed_forward_structures(), score)


def test_an_unknown_importance_is_refused() -> None:
    with pytest.raises(ValueError, match=r'to be "norm", "taylor" or a function .* but got \'magnitude\''):
        unit_scores(FeedForward(), feed_forward_structures(), "magnitude")  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["norm", "taylor"])
def test_weights_that_are_not_finite_are_named(importance: Any) -> None:
    model = FeedForward()
    backward(model, torch.randn(5, 3))
    with torch.no_grad():
        model.down.weight[0, 2] = float("nan")
    with pytest.raises(ValueError, match="finite scores for structure 'ffn', but unit 2 has nan: look for NaN"):
        unit_scores(model, feed_forward_structures(), importance)


@pytest.mark.parametrize("score", [unit_norms, unit_sizes, gate_gradients])
def test_another_model_is_refused(score: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"to have '(up|down)\.weight' \(structure 'ffn'\), but it has none"):
        score(Attention(), feed_forward_structures())
    with pytest.raises(
        ValueError, match=r"axis . of '(up|down)\.weight' .* to have size 4, but its shape is .* has changed"
    ):
        score(FeedForward(units=2), feed_forward_structures())
