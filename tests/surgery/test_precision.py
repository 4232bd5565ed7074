from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.surgery.precision import DoublePrecision, DoubleWeights, to_double, zero_positions
from tests.surgery.state_of import state_of


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.float(),
        lambda x: x.half() + 1,
        lambda x: x.to(torch.bfloat16),
        lambda x: x.type(torch.float32),
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
        lambda x: x.mean(-1, dtype=torch.float32),
        lambda x: x + torch.zeros(3),
        lambda x: x * torch.full((3,), 0.1, dtype=torch.float16),
        lambda x: x @ torch.ones(3, 3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: torch.where(x > 0, x, torch.tensor(0.5)),
        lambda x: x.new_zeros(2, dtype=torch.bfloat16),
        lambda x: nn.functional.linear(x, CONSTANT),
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x, torch.zeros(2, 2)),
    ],
)
def test_a_forward_stays_in_float64(compute) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 3, dtype=torch.float64)
    with DoublePrecision():
        assert compute(x).dtype == torch.float64


CONSTANT = torch.randn(4, 3)  # a plain attribute of a module, say


def test_casts_lose_nothing() -> None:
    x = torch.tensor([1 + 2**-40], dtype=torch.float64)
    with DoublePrecision():
        assert torch.equal(x.half().float().bfloat16(), x)
    assert not torch.equal(x.half().double(), x)


@pytest.mark.parametrize(
    ("left", "right", "grouped"),
    [((10, 8), (3, 8, 4), True), ((3, 8, 4), (4, 12), True), ((8, 12), (12, 4), True), ((3, 8, 4), (3, 4, 8), False)],
)
def test_grouped_products_work_in_float64(left, right, grouped) -> None:  # type: ignore[no-untyped-def]
    """Torch's own kernel takes no float64."""
    a, b = torch.randn(left), torch.randn(right)
    offs = torch.tensor([4, 4, 8 if left == (10, 8) else 12], dtype=torch.int32) if grouped else None
    expected = F.grouped_mm(a, b, offs=offs)
    with DoublePrecision():
        result = F.grouped_mm(a.double(), b.double(), offs=offs)
    rows = 8 if left == (10, 8) else None  # rows beyond the last group are undefined
    assert result.dtype == torch.float64 and torch.allclose(result.float()[:rows], expected[:rows], atol=1e-5)


def test_masks_of_the_lowest_number_do_not_overflow() -> None:
    scores, hidden = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([True, True, False])
    with DoublePrecision():
        lowest = torch.finfo(scores.dtype).min
        padding = torch.zeros(3, dtype=torch.float64).masked_fill(hidden, lowest)
        masked = scores + torch.full((2, 3), lowest) + padding * 1.0 + lowest
        assert masked.softmax(-1).isfinite().all()
        assert (torch.ones(2).float() * -inf).isinf().all()  # infinity itself stays


def test_casts_keep_strides() -> None:
    """In its own precision a model need not copy, and a view with odd strides is refused by some operations."""
    pairs = torch.randn(2, 3, 7, dtype=torch.float64)[..., :6]
    with DoublePrecision():
        cast = pairs.float()
        assert cast.stride() == pairs.stride() == (21, 7, 1) and torch.equal(cast, pairs)
        with pytest.raises(RuntimeError, match="divisible by 2"):
            torch.view_as_complex(cast.unflatten(-1, (3, 2)))
        assert pairs.expand(4, 2, 3, 6).float().shape == (4, 2, 3, 6)


def test_integers_and_booleans_are_left_alone() -> None:
    with DoublePrecision():
        assert torch.arange(3).dtype == torch.int64 and (torch.arange(3) > 1).dtype == torch.bool
        assert torch.randn(2, dtype=torch.complex64).dtype == torch.complex128


def test_a_tensor_written_in_place_keeps_its_dtype() -> None:
    cache, x = torch.zeros(3), torch.ones(3, dtype=torch.float64)
    with DoublePrecision():
        cache.copy_(x)
        cache.add_(x)
    assert cache.dtype == torch.float32 and cache.tolist() == [2, 2, 2]


Pair = namedtuple("Pair", "a b")


@dataclass
class Batch:
    x: Tensor
    name: str


def test_nested_inputs_are_copied() -> None:
    x, ids = torch.ones(2), torch.arange(2)
    value = {"pair": Pair(x, [ids, None]), "batch": Batch(x.half(), "n"), "more": OrderedDict(y=(x, 3))}
    double = to_double(value)
    assert double["pair"].a.dtype == double["batch"].x.dtype == double["more"]["y"][0].dtype == torch.float64
    assert isinstance(double["pair"], Pair) and isinstance(double["more"], OrderedDict) and double["batch"].name == "n"
    assert double["pair"].b[0].dtype == torch.int64 and double["pair"].b[0] is not ids and double["pair"].b[1] is None
    double["pair"].a.zero_()
    assert x.tolist() == [1, 1] and double["more"]["y"][1] == 3


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    model(torch.randn(5, 3).bfloat16()).sum().backward()
    return model


@pytest.mark.parametrize("perturbed", [False, True])
def test_weights_come_back_exactly(perturbed: bool) -> None:
    model = network()
    before = state_of(model)
    with DoubleWeights(model, perturbed=perturbed, buffers=["1.running_var"]):
        assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="anything"), DoubleWeights(model, perturbed=perturbed):
        raise RuntimeError("anything")
    assert state_of(model) == before


def test_unperturbed_weights_are_the_weights() -> None:
    model = network()
    expected = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with DoubleWeights(model):
        for name, tensor in expected.items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_noise_moves_every_parameter_and_the_buffers_that_are_named_the_same_way_each_time() -> None:
    model = network()
    nn.init.zeros_(model[2].weight)
    with DoubleWeights(model, perturbed=True, buffers=["1.running_var"]):
        first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with DoubleWeights(model, perturbed=True, buffers=["1.running_var"]):
        assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())
    assert first["2.weight"].all() and first["2.weight"].unique().numel() == 8
    assert (first["1.running_var"] > model[1].running_var).all()  # a variance stays positive
    assert torch.equal(first["1.running_mean"], model[1].running_mean.double())


def test_noise_for_weights_longer_than_the_noise_and_not_contiguous() -> None:
    model = nn.Linear(200, 150)
    model.weight.data = torch.zeros(200, 150).t()
    with DoubleWeights(model, perturbed=True):
        rows = model.weight.data
        assert rows.std() > 0.02 and not torch.equal(rows[0], rows[1])
        assert rows.shape == (150, 200)


def test_zero_positions() -> None:
    tensors = {"a": torch.ones(2, 3)}
    zero_positions(tensors, {("a", 1): torch.tensor([0, 2]), ("a", 0): torch.tensor([1])})
    assert tensors["a"].tolist() == [[0, 1, 0], [0, 0, 0]]


class Cache:
    """What a model writes its keys into."""

    def __init__(self) -> None:
        self.keys, self.calls = [torch.zeros(2)], 0


def test_objects_that_hold_tensors_are_copied() -> None:
    cache = Cache()
    (copied,) = to_double((cache,))
    copied.keys.append(torch.ones(1))
    assert copied is not cache and copied.keys[0].dtype == torch.float64 and cache.keys[0].dtype == torch.float32
    assert len(cache.keys) == 1
    settings, stuck = type("Settings", (), {})(), Cache()
    stuck.stream = (n for n in "")  # type: ignore[attr-defined]  # cannot be copied
    assert to_double(settings) is settings and to_double(stuck) is stuck
