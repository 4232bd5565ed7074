"""Fisher information of units: equal to what real masks give, example by example, whatever reads the units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_compress import FisherAccumulator, TaylorAccumulator, discover
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.post_training.calibration import default_loss, singles
from lightning_compress.structures import Structure
from tests import families, zoo
from tests.exact import doubled

MODELS = {**families.MODELS, **zoo.MODELS}
# name -> structures (beside Q/K dims) that are differentiated example by example: nothing reads them in a product
FAMILIES: dict[str, set[str]] = {
    "BERT": set(),
    "GPT-2": set(),  # addmm over rows that were merged
    "Swin": set(),  # windows merged with the batch
    "nn.MultiheadAttention": set(),  # inside of a function of torch, where the batch is the inner of two dims
    "functional weights": set(),  # matmul with bare parameters
    "ResNet": set(),  # convolutions
    "ALBERT": set(),  # one layer that is called twice
    "einsum": {"body.0.head", "body.0.vo_dim"},
    "depthwise CNN": {"channel_2"},
}


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: double(v) for k, v in value.items()}
    return tuple(double(v) for v in value) if isinstance(value, tuple) else value


class Case:
    """A family in float64, its call as a batch, and a loss that is a mean over examples."""

    def __init__(self, name: str, kinds: tuple[str, ...] | None = None) -> None:
        example = MODELS[name]
        self.model = doubled(example.model())
        self.batch = {"args": double(example.args), "kwargs": double(example.kwargs or {})}
        self.structures = discover(self.model, self.batch["args"], self.batch["kwargs"], kinds=kinds)

    @staticmethod
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        outputs = [t for t in output_tensors(model(*batch["args"], **batch["kwargs"])) if t.is_floating_point()]
        return outputs[0].square().flatten(1).sum(1).mean()

    def gradient(self, structure: Structure, batch: dict[str, Any]) -> Tensor:
        """Of the loss by a mask of ones that multiplies each unit wherever zeros would silence it, (units,)."""
        mask = torch.ones(structure.units, dtype=torch.float64, requires_grad=True)
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        masked = {}
        for piece in structure.slices:
            if piece.zero:
                weight = masked.get(piece.parameter, weights[piece.parameter])
                owner = piece.unit_of_position()
                factor = torch.where(owner >= 0, mask[owner.clamp(min=0)], 1.0)
                shape = [1] * weight.dim()
                shape[piece.axis] = -1
                masked[piece.parameter] = weight * factor.view(shape)

        class Loss(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, batch: dict[str, Any]) -> Tensor:
                return Case.loss(self.model, batch)

        value = functional_call(Loss(self.model), {f"model.{n}": w for n, w in masked.items()}, (batch,))
        (gradient,) = torch.autograd.grad(value, mask)
        return gradient


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradients_are_those_of_masks_for_each_example(name: str) -> None:
    case = Case(name)
    structures = case.structures[:6]
    accumulator = FisherAccumulator(case.model, structures, full=True)
    accumulator.update(case.batch, case.loss)
    assert accumulator.alone is not None
    assert {n for n in accumulator.alone if not n.endswith("qk_dim")} == FAMILIES[name]
    for structure in structures:
        rows = torch.stack([case.gradient(structure, example) for example in singles(case.batch)])
        expected = rows.T @ rows / len(rows)
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(accumulator.matrices()[structure.name], expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(accumulator.scores()[structure.name], expected.diagonal(), rtol=1e-8, atol=0)


def test_as_mini_batches_it_is_the_taylor_score() -> None:
    case = Case("BERT", ("head", "ffn"))
    fisher = FisherAccumulator(case.model, case.structures, per_sample=False)
    taylor = TaylorAccumulator(case.model, case.structures)
    for seed in range(2):
        torch.manual_seed(seed)
        batch = {"args": (), "kwargs": {**case.batch["kwargs"], "input_ids": torch.randint(3, 99, (2, 9))}}
        fisher.update(batch, case.loss)
        case.model.zero_grad()
        case.loss(case.model, batch).backward()
        taylor.update()
    for name, scores in taylor.scores().items():
        torch.testing.assert_close(fisher.scores()[name], scores, rtol=1e-9, atol=0)


def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2)])
def test_sums_over_examples_count_like_means(sizes: tuple[int, int]) -> None:
    model = doubled(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)))
    structures = discover(model, (torch.randn(2, 6, dtype=torch.float64),))
    accumulators = [FisherAccumulator(model, structures) for _ in range(2)]
    for size in sizes:
        batch = (torch.randn(size, 6, dtype=torch.float64), torch.randint(3, (size,)))
        accumulators[0].update(batch, default_loss)
        accumulators[1].update(batch, summed)
    assert accumulators[0].alone == accumulators[1].alone == set()
    torch.testing.assert_close(accumulators[0].scores()["ffn"], accumulators[1].scores()["ffn"], rtol=1e-9, atol=0)


def test_a_loss_that_does_not_come_apart_is_differentiated_example_by_example() -> None:
    model = doubled(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)))
    batch = (torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,)))
    accumulator = FisherAccumulator(model, discover(model, batch[:1]))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        weights = torch.arange(1, len(batch[0]) + 1, dtype=torch.float64)
        return (
            nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * weights
        ).sum() / weights.sum()

    accumulator.update(batch, loss)
    assert accumulator.alone == {"ffn"}


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Dropout(0.5), nn.Linear(10, 3)).train()
    model[0].bias.requires_grad_(False)
    batch = (torch.randn(4, 6), torch.randint(3, (4,)))
    structures = discover(model, batch[:1])
    before = torch.get_rng_state()
    FisherAccumulator(model, structures).update(batch, default_loss)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    batch = (torch.randn(4, 6), torch.randint(3, (4,)))
    accumulator = FisherAccumulator(model, discover(model, batch[:1]))
    with pytest.raises(ValueError, match="Expected an update before scores"):
        accumulator.scores()
    with pytest.raises(ValueError, match=r"Expected the loss .* finite scalar tensor, but got NoneType"):
        accumulator.update(batch, lambda model, batch: None)
    with pytest.raises(ValueError, match=r"Expected the loss .* but got nan"):
        accumulator.update(batch, lambda model, batch: model(batch[0]).sum() * torch.nan)
    accumulator.update(batch, default_loss)
    with pytest.raises(ValueError, match="full=True"):
        accumulator.matrices()
