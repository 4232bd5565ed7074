"""The theorem for residual width: norms that leave units out, and the model without them, are the same function."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import EXACT_KINDS, PruningPlan, apply_plan, discover, zero_units
from lightning_compress.structures import Normalisation, Structures
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.silence import silence
from tests.test_theorem import EXACT, call, double, error, kept_masks, other_batch, restricted, step
from tests.zoo import MODELS

FAMILIES = [
    "nn.TransformerEncoder",
    "nn.Transformer",
    "nn.MultiheadAttention",
    "packed attention, literal sizes",
    "separate attention",
    "BERT",
    "RoBERTa",
    "DistilBERT",
    "GPT-2",
    "Llama",
    "ViT",
]


def removals(plan: PruningPlan) -> list[Removal]:
    return [Removal(s, plan.kept[s.name]) for s in plan.structures]


@pytest.mark.parametrize("kinds", [("hidden",), (*EXACT_KINDS, "hidden")], ids=["alone", "with all others"])
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_removed(name: str, kinds: tuple[str, ...]) -> None:
    example = MODELS[name]
    dense = example.model().double()
    args, kwargs = double(example.args), double(example.kwargs or {})
    structures = discover(dense, args, kwargs, kinds=kinds, prove=True)
    (hidden,) = (s for s in structures if s.kind == "hidden")
    assert hidden.tier == "native" and hidden.norms

    masked = copy.deepcopy(dense)
    optimizer = torch.optim.Adam(masked.parameters(), lr=1e-2, eps=1e-3)
    step(masked, optimizer, args, kwargs)
    small, small_optimizer = copy.deepcopy((masked, optimizer))
    before = call(masked, args, kwargs)
    plan = PruningPlan.of(dense, structures, {s.name: list(range(0, s.units, 2)) for s in structures})
    apply_plan(small, plan, optimizers=[small_optimizer], verify=(args, kwargs))
    zero_units(masked, plan, [optimizer])
    masks = kept_masks(masked, plan)
    with silence(dict(masked.named_modules()), removals(plan)):
        assert error(call(masked, args, kwargs), before) > 1e-6
        assert error(call(small, args, kwargs), call(masked, args, kwargs)) < EXACT
        elsewhere = other_batch(example)
        assert error(call(small, *elsewhere), call(masked, *elsewhere)) < EXACT
        for parameter, state in optimizer.state.items():
            names = {id(p): n for n, p in masked.named_parameters()}
            mask = masks.get(names[id(parameter)])
            for key, value in state.items():
                if mask is not None and isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = value * mask
        step(masked, optimizer, args, kwargs, masks)
        step(small, small_optimizer, args, kwargs)
        assert error(call(small, args, kwargs), call(masked, args, kwargs)) < EXACT
    cut = dict(small.named_parameters())
    for parameter_name, parameter in masked.named_parameters():
        mask = masks.get(parameter_name, torch.ones_like(parameter))
        expected = restricted(parameter.detach(), mask, cut[parameter_name].shape)
        assert torch.allclose(cut[parameter_name].detach(), expected, rtol=1e-9, atol=1e-10), parameter_name


def test_without_masks_the_models_differ() -> None:
    """The masks are what the theorem needs: zero weights alone leave the statistics as they were."""
    model, example = MODELS["BERT"].model().double(), MODELS["BERT"]
    args, kwargs = double(example.args), double(example.kwargs)
    structures = discover(model, args, kwargs, kinds=("hidden",), prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(0, s.units, 2) for s in structures})
    small = copy.deepcopy(model)
    apply_plan(small, plan, unverified=True)
    zero_units(model, plan)
    assert error(call(small, args, kwargs), call(model, args, kwargs)) > 1e-3


def test_it_is_found_only_when_asked_for() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(5, 4)
    structures = discover(model, (x,))
    assert not structures
    (pinned,) = (p for p in structures.pinned if p.kind == "hidden")
    assert pinned.reasons == ("it is normalised over (native_layer_norm in 1)",)
    (hidden,) = discover(model, (x,), kinds=("hidden",), prove=True)
    assert (hidden.name, hidden.kind, hidden.units, hidden.tier) == ("hidden", "hidden", 8, "native")
    assert hidden.norms == (Normalisation("1", -1),)


class RootMeanSquare(nn.Module):
    """A norm written by hand, over any dimension."""

    def __init__(self, width: int, dim: int = -1) -> None:
        super().__init__()
        self.gain, self.dim = nn.Parameter(torch.randn(width)), dim

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain if self.dim == -1 else self.gain[:, None]
        return x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-6) * gain


class ChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = RootMeanSquare(6, 1), nn.Conv1d(6, 3, 1)
        self.stem = nn.Conv1d(2, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.stem(x)))


@pytest.mark.parametrize(
    ("model", "shape", "dim"),
    [
        (nn.Sequential(nn.Linear(4, 8), RootMeanSquare(8), nn.Linear(8, 3)), (5, 4), -1),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)), (5, 4), -1),
        (nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 3)), (5, 4), -1),
        (nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(1, 8), nn.Conv1d(8, 3, 1)), (5, 4, 7), -2),
        (ChannelsFirst(), (5, 2, 7), -2),
    ],
    ids=["by hand", "without weights", "RMSNorm", "one group", "channels first"],
)
def test_norms_of_all_sorts(model: nn.Module, shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    structures = discover(model, (x,), kinds=("hidden",), prove=True)
    assert [(s.kind, [n.dim for n in s.norms]) for s in structures] == [("hidden", [dim])], structures.pinned
    before = sum(p.numel() for p in model.parameters())
    plan = PruningPlan.of(model, structures, {structures[0].name: (1, 3, 4)})
    report = apply_plan(copy.deepcopy(model), plan, verify=((x,), {}))
    assert report.parameters_after < before and report.error is not None and report.error < 1e-12


class Functional(nn.Module):
    """Normalises inside a module that does other things too: nothing there can leave units out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.down(nn.functional.layer_norm(self.up(x), (8,)))


class Halves(nn.Module):
    """A norm over two families at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.down = nn.Linear(4, 5), nn.Linear(4, 3), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.cat([self.a(x), self.b(x)], -1)))


class Residual(nn.Module):
    """A norm in a module whose input and output are the stream, beside weights that a narrower input would not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner, self.down = nn.Linear(4, 8), nn.Module(), nn.Linear(8, 3)
        self.inner.weight = nn.Parameter(torch.randn(8, 8))
        self.inner.forward = lambda x: x + nn.functional.layer_norm(x, (8,)) @ self.inner.weight

    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(self.up(x)))


@pytest.mark.parametrize(
    "model", [Functional(), Halves(), Residual()], ids=["functional", "two families", "beside other weights"]
)
def test_what_no_mask_can_say_stays_whole_with_the_reason(model: nn.Module) -> None:
    structures = discover(model, (torch.randn(5, 4),), kinds=(*EXACT_KINDS, "hidden"))
    assert isinstance(structures, Structures) and not structures
    hidden = [p for p in structures.pinned if p.kind == "hidden"]
    assert hidden and all(any("it is normalised over" in reason for reason in p.reasons) for p in hidden)


def test_a_module_is_masked_once_and_missing_ones_are_named() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(5, 4)
    (hidden,) = discover(model, (x,), kinds=("hidden",))
    removal, modules = Removal(hidden, (0, 1)), dict(model.named_modules())
    dense = model(x)
    with silence(modules, [removal]):
        with pytest.raises(SurgeryError, match="Expected LayerNorm to be masked once, but it has a mask"):
            silence(modules, [removal])
        assert not torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)
    with pytest.raises(SurgeryError, match="Expected the model to have a module '1', but it has none"):
        silence({}, [removal])


def test_a_failing_norm_gets_its_weights_back() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    (hidden,) = discover(model, (torch.randn(5, 4),), kinds=("hidden",))
    weight = model[1].weight
    with silence(dict(model.named_modules()), [Removal(hidden, (0, 1))]):
        with pytest.raises((IndexError, RuntimeError), match=r"index|INDICES"):
            model[1](torch.randn(5, 1))
        with pytest.raises(TypeError, match="Expected a tensor among the inputs of LayerNorm, but got none"):
            model[1]("text")
    assert model[1].weight is weight and model[1].normalized_shape == (8,)
