"""What a forward remembers must not outlive the weights that it was made of."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque

import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.discovery.memory import forgotten
from lightning_compress.plan import PruningPlan
from lightning_compress.surgery import apply_plan, zero_units

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(4))


class Remembering(nn.Module):
    """A table of biases that is looked up once and kept in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.table = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8, 5))
        self.register_buffer("index", torch.tensor([0, 2, 1, 2]), persistent=False)
        self.cache: dict[str, list[Tensor]] = {"biases": []}

    def forward(self, x: Tensor) -> Tensor:
        if not self.cache["biases"]:
            self.cache["biases"].append(self.table[:, self.index].T)
        return self.down((self.up(x) + self.cache["biases"][0]).relu())


def test_a_dict_that_a_forward_fills_is_empty_again() -> None:
    model = Remembering().double().eval()
    structures = discover(model, (X.double(),), prove=True)
    assert [(s.kind, s.units, s.tier) for s in structures] == [("ffn", 8, "native")]
    assert model.cache == {"biases": []}
    zeroed, plan = copy.deepcopy(model), PruningPlan.of(model, structures, {structures[0].name: [0, 3, 5]})
    zero_units(zeroed, plan)
    apply_plan(model, plan, verify=((X.double(),), {}))
    assert model.cache == {"biases": []}
    assert torch.allclose(model(X.double()), zeroed(X.double()), rtol=0, atol=1e-12)


def test_attributes_and_containers_are_restored() -> None:
    module = nn.Identity()
    values = {"a": 1, "b": [1, {2}], "c": OrderedDict(x={}), "d": deque([1]), "e": (1, 2)}
    for name, value in values.items():
        setattr(module, name, value)
    same = dict(module.__dict__)
    with forgotten([module]):
        module.a, module.f, module.e = 2, 3, (3,)
        module.b[1].add(5)
        module.b.append(module.b)
        module.c["x"]["y"] = module.c["z"] = 1
        module.d.append(2)
        del module.training
    assert module.__dict__ == same and all(module.__dict__[name] is value for name, value in values.items())
    assert (module.b, module.c, module.d) == ([1, {2}], OrderedDict(x={}), deque([1]))
