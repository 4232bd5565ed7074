import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.surgery import SurgeryError
from lightning_compress.surgery.verify import Mismatch, Rehearsal, difference, flatten
from tests.surgery.state_of import state_of


@dataclass
class Result:
    logits: Tensor
    extra: None = None


def outputs(*tensors: Tensor) -> dict:  # type: ignore[type-arg]
    return flatten(tensors)


def test_flatten_finds_tensors_and_names_them() -> None:
    cache = SimpleNamespace(keys=[torch.ones(3)])
    found = flatten({"a": (torch.ones(1), [torch.ones(2)]), "b": Result(torch.ones(4)), "cache": cache, "n": 3})
    assert {path: tuple(o.tensor.shape) for path, o in found.items()} == {
        "output['a'][0]": (1,),
        "output['a'][1][0]": (2,),
        "output['b'].logits": (4,),
        "output['cache'].keys[0]": (3,),
    }
    assert [path for path, o in found.items() if o.internal] == ["output['cache'].keys[0]"]


def test_flatten_survives_cycles() -> None:
    value: list = [torch.ones(1)]  # type: ignore[type-arg]
    value.append(value)
    assert list(flatten(value)) == ["output[0]"]


def test_difference_is_relative_only_to_large_outputs() -> None:
    a = torch.tensor([0.5, 0.1])
    assert difference(outputs(a), outputs(a + torch.tensor([0.0, 0.25]))) == pytest.approx(0.25)
    assert difference(outputs(a * 100), outputs(a * 100 + 1)) == pytest.approx(1 / 50)
    assert difference(outputs(a, a * 0), outputs(a, a * 0)) == 0.0


def test_difference_is_the_largest_over_outputs() -> None:
    a = torch.zeros(2)
    assert difference(outputs(a, a), outputs(a + 0.1, a + 0.2)) == pytest.approx(0.2)


def test_equal_infinities_are_equal() -> None:
    a = torch.tensor([1.0, -torch.inf])
    assert difference(outputs(a), outputs(a.clone())) == 0.0
    assert difference(outputs(a), outputs(torch.tensor([1.5, -torch.inf]))) == pytest.approx(0.5)
    assert difference(outputs(a), outputs(torch.tensor([1.0, 2.0]))) == torch.inf


def test_integers_must_be_equal() -> None:
    a = torch.tensor([1, 2])
    assert difference(outputs(a), outputs(a.clone())) == 0.0
    assert difference(outputs(a), outputs(a + 1)) == 1.0


def test_empty_outputs_are_equal() -> None:
    assert difference(outputs(torch.zeros(0, 3)), outputs(torch.zeros(0, 3))) == 0.0


def test_mismatches_name_the_output() -> None:
    a = torch.zeros(2)
    with pytest.raises(Mismatch, match=r"output\[0\] has shape \(3,\) instead of \(2,\)"):
        difference(outputs(a), outputs(torch.zeros(3)))
    with pytest.raises(Mismatch, match=r"output\[1\] is missing"):
        difference(outputs(a, a), outputs(a))
    with pytest.raises(Mismatch, match=r"output\[0\] holds NaN"):
        difference(outputs(a), outputs(a + torch.nan))


def test_what_lies_inside_other_objects_may_shrink() -> None:
    a = torch.zeros(2)
    before = flatten({"a": a, "cache": SimpleNamespace(k=torch.zeros(4), v=torch.zeros(1))})
    after = flatten({"a": a, "cache": SimpleNamespace(k=torch.zeros(3))})
    assert difference(before, after) == 0.0
    with pytest.raises(Mismatch, match="missing"):
        difference(before, flatten({"cache": SimpleNamespace(k=torch.zeros(3))}))


def test_what_lies_inside_other_objects_is_compared_if_nothing_else_is_returned() -> None:
    before, after = (flatten(SimpleNamespace(logits=torch.full((2,), value))) for value in (1.0, 2.0))
    assert difference(before, after) == 1.0


class Restless(nn.Module):
    """Draws random numbers, counts its calls in a buffer, writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x += torch.rand(()) + random.random()
        return self.drop(self.layer(x)) * torch.rand(3) * self.calls


def test_a_rehearsal_repeats_itself_and_leaves_nothing_behind() -> None:
    model, x = Restless().double(), torch.zeros(2, 3)
    model.drop.eval()  # a flag of its own
    before, python = state_of(model), random.getstate()
    with Rehearsal(model) as rehearsal:
        first = rehearsal.run(model, (x,), {})
        assert difference(first, rehearsal.run(model, (), {"x": x})) == 0.0
        assert not torch.is_grad_enabled() and not model.training
        assert first["output"].tensor.dtype == torch.float64
    assert state_of(model) == before and random.getstate() == python
    assert model.training and not model.drop.training and not x.any() and torch.is_grad_enabled()


def test_a_rehearsal_ends_after_an_error() -> None:
    model = nn.Linear(2, 2).double()
    before = state_of(model)
    with pytest.raises(RuntimeError), Rehearsal(model) as rehearsal:
        rehearsal.run(model, (torch.zeros(3),), {})
    assert state_of(model) == before and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: None, "Expected the example call to return a tensor, but it returns none"),
        (lambda x: SimpleNamespace(count=3), "Expected the example call to return a tensor, but it returns none"),
        (lambda x: {"logits": x / 0}, r"output\['logits'\] holds NaN before anything is removed"),
        (lambda x: x.no_such_method(), "float64, but it raised AttributeError: .*no_such_method"),
    ],
)
def test_a_reference_must_be_worth_a_comparison(function, message: str) -> None:  # type: ignore[no-untyped-def]
    class Model(nn.Module):
        def forward(self, x: Tensor) -> object:
            return function(x)

    model = Model()
    with Rehearsal(model) as rehearsal, pytest.raises(SurgeryError, match=message):
        rehearsal.reference((torch.zeros(2),), {})
