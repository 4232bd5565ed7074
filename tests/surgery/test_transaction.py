from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_compress.surgery.edits import write_attribute
from lightning_compress.surgery.slicing import cut
from lightning_compress.surgery.transaction import Transaction
from tests.surgery.state_of import state_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.config = SimpleNamespace(units=4)
        self.sizes, self.table, self.names = [4, 4], OrderedDict(a=1), {"x"}
        self.register_buffer("mask", torch.ones(4), persistent=False)


class Other(Block):
    pass


def damage(model: Block, optimizer: torch.optim.Optimizer) -> None:
    cut(model.layer.weight, {0: torch.tensor([0, 1])})
    cut(model.mask, {0: torch.tensor([2])})
    model.layer.out_features = 2
    model.sizes[0], model.table["b"] = 2, 2
    model.names.add("y")
    model.layer.new_attribute = 1
    del model.table["a"]
    write_attribute(model, "config.units", 2)
    write_attribute(model, "sizes[1]", 2)
    model.__class__ = Other
    model.layer.register_forward_hook(lambda *_: None)
    model.layer.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    model.layer.register_buffer("positions", torch.arange(2), persistent=False)
    model.norm.bias = None
    optimizer.state[model.layer.weight]["exp_avg"] = torch.zeros(2)
    optimizer.state[model.layer.weight]["added"] = 1
    optimizer.state[model.norm.weight] = {"step": 7}
    model.eval()


@pytest.fixture
def model_and_optimizer() -> tuple[Block, torch.optim.Optimizer]:
    model = Block()
    optimizer = torch.optim.Adam(model.layer.parameters())
    model.layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_exception_restores_everything(model_and_optimizer: tuple[Block, torch.optim.Optimizer]) -> None:
    model, optimizer = model_and_optimizer
    before = state_of(model, [optimizer])

    def fail() -> None:
        with Transaction(model.modules(), [optimizer]):
            damage(model, optimizer)
            assert state_of(model, [optimizer]) != before
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert state_of(model, [optimizer]) == before
    assert model.layer(torch.randn(2, 3)).shape == (2, 4)


def test_without_an_exception_changes_stay(model_and_optimizer: tuple[Block, torch.optim.Optimizer]) -> None:
    model, optimizer = model_and_optimizer
    with Transaction(model.modules(), [optimizer]):
        damage(model, optimizer)
    assert type(model) is Other and model.layer.weight.shape == (2, 3) and model.config.units == 2


def test_rollback_can_be_asked_for_more_than_once(model_and_optimizer: tuple[Block, torch.optim.Optimizer]) -> None:
    model, optimizer = model_and_optimizer
    before = state_of(model, [optimizer])
    transaction = Transaction(model.modules(), [optimizer])
    for _ in range(2):
        damage(model, optimizer)
        transaction.rollback()
        assert state_of(model, [optimizer]) == before


def test_a_tied_parameter_and_a_dtype_come_back() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    before = state_of(model)
    transaction = Transaction(model.modules())
    model[0].weight.data = model[0].weight.data.double()[:1]
    transaction.rollback()
    assert state_of(model) == before


def test_an_optimizer_that_had_no_state_has_none_again() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail() -> None:
        with Transaction([model], [optimizer]):
            optimizer.state[model.weight]["momentum_buffer"] = torch.ones(1)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert not optimizer.state
