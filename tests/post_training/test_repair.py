"""The theorem of the repair: where a unit that goes is a combination of units that stay, nothing is lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import PruningPlan, apply_plan, discover, repair_readers
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.post_training.calibration import Calibration, default_call, default_loss, real_tokens
from lightning_compress.structures import Structures
from tests import families, zoo
from tests.exact import doubled
from tests.post_training.test_fisher import double

MODELS = {**families.MODELS, **zoo.MODELS}


def calibration(batches: list[Any], call: Any = default_call) -> Calibration:
    return Calibration(tuple(batches), call, default_loss, real_tokens)


class Copies(nn.Module):
    """Units 0 and 1 go; before the matrix that reads them they are combinations of 2, 3 and a constant."""

    def __init__(self, read: nn.Module, *, image: bool = False) -> None:
        super().__init__()
        self.image = image
        self.make = nn.Conv2d(3, 6, 1) if image else nn.Linear(3, 6)
        self.read = read
        with torch.no_grad():
            weight, bias = self.make.weight, self.make.bias
            weight[0], bias[0] = 2 * weight[2] - weight[3], 2 * bias[2] - bias[3]
            weight[1], bias[1] = -weight[3], 0.7 - bias[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.make(x))


READERS = {
    "linear": (nn.Linear(6, 4), False),
    "convolution": (nn.Conv2d(6, 4, 3, stride=2), True),
    "convolution, dilated": (nn.Conv2d(6, 4, 2, dilation=2), True),
}


@pytest.mark.parametrize("name", READERS)
def test_what_others_can_say_is_not_lost(name: str) -> None:
    reader, image = READERS[name]
    model = Copies(copy.deepcopy(reader), image=image).double().eval().requires_grad_(False)
    batches = [torch.randn(8, 3, 7, 7) if image else torch.randn(8, 5, 3) for _ in range(5)]
    batches = [b.double() for b in batches]
    structures = discover(model, (batches[0],), prove=True)
    assert [s.units for s in structures] == [6]
    plan = PruningPlan.of(model, structures, {structures[0].name: [2, 3, 4, 5]})
    expected, weights = model(batches[-1]).detach(), copy.deepcopy(model.state_dict())
    (repair,) = repair_readers(model, structures, plan, calibration(batches), dampings=(0.0,))
    assert repair.before > 1e-3 and repair.after < 1e-12 and repair.damping == 0
    apply_plan(model, plan, verify=((batches[0],), {}))
    elsewhere = torch.randn_like(batches[0])
    dense = Copies(reader, image=image).double().eval().requires_grad_(False)
    dense.load_state_dict(weights)
    for batch, wanted in ((batches[-1], expected), (elsewhere, dense(elsewhere).detach())):
        assert float((model(batch).detach() - wanted).abs().max() / wanted.abs().max()) < 1e-8


def combined(model: nn.Module, structures: Structures) -> PruningPlan:
    """Makes the last unit of each structure a copy of the first, and plans to remove it."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for structure in structures:
            for piece in structure.slices:
                if piece.role == "producer":
                    rows = tensors[piece.parameter]
                    rows.index_copy_(
                        piece.axis, piece.indices[-1], rows.index_select(piece.axis, piece.indices[0]).clone()
                    )
    return PruningPlan.of(model, structures, {s.name: range(s.units - 1) for s in structures})


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "nn.TransformerEncoder", "functional weights", "ViT"])
def test_copies_of_heads_and_ffn_units_cost_nothing_in_any_family(name: str) -> None:
    example = MODELS[name]
    model = doubled(example.model())
    args, kwargs = double(example.args), double(example.kwargs or {})
    structures = discover(model, args, kwargs, kinds=("head", "ffn"), prove=True)
    plan = combined(model, structures)

    def varied(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def another(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if t.is_floating_point():
                return torch.randn(t.shape, generator=generator, dtype=t.dtype)
            return t if int(t.max()) < 2 else torch.randint(3, 99, t.shape, generator=generator)

        return {"args": tuple(map(another, args)), "kwargs": {k: another(v) for k, v in kwargs.items()}}

    def call(model: nn.Module, batch: dict[str, Any]) -> Any:
        return model(*batch["args"], **batch["kwargs"])

    def outputs(batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return next(t for t in output_tensors(call(model, batch)) if t.is_floating_point()).clone()

    batches = [varied(seed) for seed in range(60)]
    expected, elsewhere = outputs(batches[0]), varied(99)
    other = outputs(elsewhere)
    repairs = repair_readers(model, structures, plan, calibration(batches, call), dampings=(0.0,))
    assert len(repairs) == len(structures)
    apply_plan(model, plan, verify=(args, kwargs))
    assert float((outputs(batches[0]) - expected).abs().max() / expected.abs().max()) < 1e-8
    assert float((outputs(elsewhere) - other).abs().max() / other.abs().max()) < 1e-8
