"""Structures that go in spite of what surrounds them: every module here hides something from a naive comparison."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import AttributeEdit, Structures, named_tensors
from lightning_compress.surgery import SurgeryError, apply_plan, zero_units
from lightning_compress.surgery.calibration import calibrate
from lightning_compress.surgery.precision import DoubleWeights
from lightning_compress.surgery.verify import Rehearsal, difference


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def built(kind: type[nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).eval()


def halve(model: nn.Module, *args: Tensor, but: int = 0) -> Structures:
    """Remove half of everything that is found, but for so many structures, and hold the theorem on what is left."""
    found = discover(model, args)
    proven = discover(model, args, prove=True)
    assert len(proven) == len(found) - but, proven.pinned
    plan = PruningPlan.of(model, proven, {s.name: range(s.units // 2, s.units) for s in proven})
    zeroed = copy.deepcopy(model)
    done = apply_plan(model, plan, verify=(args, {})).plan
    zero_units(zeroed, done)
    with DoubleWeights(zeroed), Rehearsal(zeroed) as rehearsal:
        expected = rehearsal.reference(args, {})
    with DoubleWeights(model), Rehearsal(model) as rehearsal:
        assert difference(expected, rehearsal.run(model, args, {})) < 1e-10
    return proven


class Attention(nn.Module):
    """Attention that returns its weights, too; ``literal`` makes the width of a head follow from that of the input."""

    def __init__(self, literal: bool = False, width: int = 20, heads: int = 4, relative: bool = False) -> None:
        super().__init__()
        self.literal, self.heads, self.dims = literal, heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.distances = nn.Parameter(torch.randn(6, self.dims)) if relative else None

    def forward(self, x: Tensor, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, _, width = x.shape
        dims = width // self.heads if self.literal else self.dims

        def split(y: Tensor) -> Tensor:
            return y.view(batch, -1, self.heads, dims).transpose(1, 2)

        q, k, v = split(self.q(x if queries is None else queries)), split(self.k(x)), split(self.v(x))
        scores = q @ k.transpose(-1, -2)
        if self.distances is not None:
            scores = scores + q @ self.distances.T
        weights = scores.softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    """One attention; its weights are returned to nobody."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.inside, self.attention, self.out = nn.Linear(6, 20), Attention(*args), nn.Linear(20, 3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        return self.out(torch.tanh(y + self.attention(y)[0]).flip(-1))


@pytest.mark.parametrize(("literal", "tier"), [(False, "native"), (True, "shim")])
def test_weights_of_attention_that_a_module_returns_to_nobody_do_not_hold_its_heads(literal: bool, tier: str) -> None:
    proven = halve(built(Block, literal), noise(2, 6, 6))
    assert {s.kind: s.tier for s in proven}["head"] == tier


def test_a_bare_table_that_meets_the_queries_stays_whole_and_reads_zeros() -> None:
    model = built(Block, True, 20, 4, True)
    proven = halve(model, noise(2, 6, 6))
    dims = next(s for s in proven if s.kind == "qk_dim")
    assert dims.tier == "shim" and "attention.distances" not in dims.parameters
    assert model.attention.distances.shape == (6, 5) and model.attention.q.weight.shape[0] < 20


class Packed(nn.Linear):
    """A linear layer that keeps its size under a name of its own."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__(inputs, size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(*x.shape[:-1], self.size)


class CrossAttention(nn.Module):
    """Keys and values in one projection, queries in another of the same class, with sizes of different form."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.q, self.o = Packed(6, 24), Packed(6, 12), nn.Linear(12, 3)
        self.part = 12

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in self.packed(x).split(self.part, -1))
        return self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_two_layers_of_one_class_may_hold_sizes_of_different_form() -> None:
    head = next(s for s in halve(built(CrossAttention), noise(2, 6, 6)) if s.kind == "head")
    assert head.tier == "native"


class Starting(nn.Module):
    """A decoder that starts from zeros: what its queries see first is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Attention(), Attention(), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 5, 20) + self.first(torch.zeros(x.shape[0], 5, 20))[0]
        return self.out(y + self.second(x, y)[0])


def test_a_module_that_sees_only_zeros_is_compared_on_other_inputs() -> None:
    halve(built(Starting), noise(2, 6, 20))


def test_what_cannot_influence_anything_goes_where_zeros_take_its_place() -> None:
    proven = halve(built(Block, True), noise(2, 1, 6))  # a softmax over one key is 1, whatever the queries say
    assert {s.kind: s.tier for s in proven} == {"head": "shim", "qk_dim": "shim", "vo_dim": "shim"}


class Deep(nn.Module):
    """Forty layers with a small gain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1, groups=1) for _ in range(40))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.sum(-1)


def test_calibrated_weights_let_the_first_layer_of_a_deep_network_speak() -> None:
    model, x = built(Deep), noise(2, 8, 12)
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    with torch.no_grad(), DoubleWeights(model, perturbed=True), Rehearsal(model) as rehearsal:
        calibrate(rehearsal, model, (x,), {})
        a = rehearsal.run(model, (x,), {})
        model.layers[0].weight.data.mul_(torch.linspace(0.5, 2, 8)[:, None, None])
        assert difference(a, rehearsal.run(model, (x,), {})) > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())
    assert len(halve(model, x)) == 39


def test_calibration_survives_a_call_that_fails() -> None:
    model = built(Deep)
    with DoubleWeights(model), Rehearsal(model) as rehearsal:
        calibrate(rehearsal, model, (noise(2, 9, 12),), {})
        with pytest.raises(SurgeryError, match="Expected the example call to run"):
            rehearsal.reference((noise(2, 9, 12),), {})
    assert not any(module._forward_hooks for module in model.modules())


class Codes(nn.Module):
    """Only the places of maxima leave the encoder, and small changes do not move them."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 5)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.book, self.out = self.Encoder(), nn.Embedding(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.book((self.encoder(x) - torch.tensor([100.0, 0, 0, 0, 0])).argmin(-1))))


def test_layers_in_a_list_are_compared_at_the_module_that_calls_them() -> None:
    model = built(Codes)
    assert "encoder.layers.ffn" in [s.name for s in halve(model, noise(2, 6))]


class Sized(nn.Module):
    """A linear layer whose weight is viewed with the module's own sizes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.kernel = inputs, outputs, nn.Linear(3 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.weight.view(self.outputs, 3, self.inputs).transpose(1, 2)
        return torch.relu(nn.functional.conv1d(x, weight, self.kernel.bias))


def test_equal_sizes_of_neighbouring_layers_are_told_apart() -> None:
    model = built(nn.Sequential, Sized(5, 12), Sized(12, 12), Sized(12, 12), nn.Flatten(), nn.Linear(36, 2))
    assert all(s.tier == "native" for s in halve(model, noise(2, 5, 9)))


class Shifted(nn.Module):
    """Attention whose scores are viewed by windows only where they are masked."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(20, 20) for _ in range(4))
        self.masked, self.heads, self.width = masked, 4, 20

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(len(x), 6, -1, 5).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        if self.masked:
            scores = (scores.view(-1, 2, self.heads, 6, 6) + torch.arange(2.0).view(2, 1, 1, 1)).view(scores.shape)
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), -1, self.width))


def test_a_look_alike_that_needs_one_attribute_more_gets_it() -> None:
    model = built(nn.Sequential, nn.Linear(6, 20), Shifted(False), Shifted(True), nn.Linear(20, 3))
    assert all(s.tier == "native" for s in halve(model, noise(2, 6, 6)) if s.kind == "head")


class Pooling(nn.Module):
    """Learned queries read a sequence: what they meet in the scores comes from weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.attention = (
            nn.Parameter(torch.randn(1, 2, 20)),
            nn.MultiheadAttention(20, 4, batch_first=True),
        )
        self.inside, self.out = nn.Linear(6, 20), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        return self.out(self.attention(self.queries.expand(len(x), -1, -1), y, y, need_weights=False)[0].flatten(1))


def test_attention_of_learned_queries_loses_heads_and_dims() -> None:
    proven = halve(built(Pooling), noise(2, 6, 6))
    assert [s.units for s in proven if "attention.in_proj_weight" in s.parameters and s.units < 20] == [4, 5, 5]


class TwoByTwo(nn.Module):
    """Two heads of two dims: where every count loses one, two heads of one dim compute what one head does."""

    def __init__(self, scale: float = 0.4) -> None:
        super().__init__()
        self.heads, self.scale = 2, scale
        self.q, self.k, self.v = (nn.Linear(3, 4) for _ in range(3))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_are_counted_although_their_dims_go_too() -> None:
    proven = discover(built(TwoByTwo), (noise(2, 3, 3),), prove=True)
    edits = {s.kind: [edit.attribute for edit in s.edits if isinstance(edit, AttributeEdit)] for s in proven}
    assert edits == {"head": ["heads"], "qk_dim": [], "vo_dim": []}
    halve(built(TwoByTwo), noise(2, 3, 3))


def test_an_exact_way_is_preferred_to_one_within_the_tolerance() -> None:
    proven = discover(built(TwoByTwo, 1e-7), (noise(2, 3, 3),), prove=True)  # nearly uniform, however heads are cut
    (head,) = (s for s in proven if s.kind == "head")
    assert [edit.attribute for edit in head.edits if isinstance(edit, AttributeEdit)] == ["heads"]
