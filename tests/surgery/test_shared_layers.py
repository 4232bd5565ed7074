"""A shim where several layers share one parameter: all of them are cut at once, so all of them need it."""

import copy

import torch
from torch import Tensor, nn

from lightning_compress import PruningPlan, apply_plan, discover, zero_units


class Literal(nn.Module):
    """A forward that only the original width fits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).view(-1, 12))


class Twins(nn.Module):
    """Two modules, with layers of their own around the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Literal(), Literal(), nn.Linear(4, 2)
        for name in ("up", "down"):
            getattr(self.second, name).weight = getattr(self.first, name).weight
            getattr(self.second, name).bias = getattr(self.first, name).bias

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x)))


def test_all_layers_that_share_a_parameter_get_the_shim() -> None:
    torch.manual_seed(0)
    model, x = Twins().double(), torch.randn(5, 4, dtype=torch.float64)
    structures = discover(model, (x,), kinds=("ffn",), prove=True)
    units = structures["ffn"] if "ffn" in structures.counts else next(s for s in structures if s.units == 12)
    assert units.tier == "shim"
    assert {edit.module for edit in units.edits} == {"first.up", "first.down", "second.up", "second.down"}
    plan = PruningPlan.of(model, structures, {units.name: (0, 3, 7)})
    small = copy.deepcopy(model)
    apply_plan(small, plan, verify=((x,), {}))
    zero_units(model, plan)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    assert small.second.up.weight is small.first.up.weight and small.first.up.weight.shape == (3, 4)
