"""The central theorem: a model with units zeroed and the model with the units removed are the same function.

In float64, for every kind of structure on every model of the zoo: the same outputs on the batch that discovery saw and
on another one, the same gradients, and the same model after one more Adam step with the optimizer state carried over.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import Structures
from lightning_compress.surgery import apply_plan, zero_units
from tests.zoo import MODELS, Example

EXACT = 1e-10  # relative; an error in the logic shows as 1e-3 or more

# Kinds that each model has; "all" removes half of everything at once.
KINDS_OF = {
    **dict.fromkeys(MODELS, ("head", "qk_dim", "vo_dim", "ffn")),
    "packed attention, literal sizes": ("head", "qk_dim", "vo_dim"),
    "packed attention": ("head", "qk_dim", "vo_dim"),
    "separate attention": ("head", "qk_dim", "vo_dim"),
    "MLP": ("ffn",),
    "LSTM": ("ffn",),
    "ResNet": ("channel",),
    "depthwise CNN": ("channel",),
}
CASES = [(name, kind) for name, kinds in KINDS_OF.items() for kind in (*kinds, "all")]


def double(value: Any) -> Any:
    """Nested inputs with floating-point tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: double(v) for k, v in value.items()}
    return tuple(double(v) for v in value) if isinstance(value, tuple) else value


@cache
def proven(name: str) -> tuple[nn.Module, Structures]:
    """A model in float64 and its proven structures; callers copy the model."""
    example = MODELS[name]
    model = example.model().double()
    return model, discover(model, double(example.args), double(example.kwargs or {}), prove=True)


def call(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    outputs = model(*args, **kwargs)
    return [t for t in output_tensors(outputs) if t.is_floating_point()]


def other_batch(example: Example) -> tuple[Any, Any]:
    """Another batch: the examples in reverse order, the tensors changed."""

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        flipped = value.flip(0)
        return flipped.double() * 0.7 + 0.1 if value.is_floating_point() else flipped

    return tuple(change(a) for a in example.args), {k: change(v) for k, v in (example.kwargs or {}).items()}


def error(first: list[Tensor], second: list[Tensor]) -> float:
    assert [t.shape for t in first] == [t.shape for t in second]
    pairs = [(a.detach(), b.detach()) for a, b in zip(first, second, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, masks: dict[str, Tensor] | None = None
) -> None:
    """One optimizer step on a smooth loss; ``masks`` keeps removed positions at zero gradient."""
    optimizer.zero_grad()
    sum((t**2).sum() + t.sum() for t in call(model, args, kwargs)).backward()
    for name, parameter in model.named_parameters():
        if masks and name in masks and parameter.grad is not None:
            parameter.grad.mul_(masks[name])
    optimizer.step()


def kept_masks(model: nn.Module, plan: PruningPlan) -> dict[str, Tensor]:
    """1 where a position stays, for every tensor that loses some."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    masks: dict[str, Tensor] = {}
    for (name, axis), positions in plan.removed_positions().items():
        mask = masks.setdefault(name, torch.ones_like(tensors[name]))
        mask.index_fill_(axis, positions, 0.0)
    return masks


def restricted(tensor: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    return tensor[mask.bool()].reshape(shape)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_zeroed_equals_removed(name: str, kind: str) -> None:
    example = MODELS[name]
    dense, structures = proven(name)
    chosen = [s for s in structures if kind in (s.kind, "all")]
    assert chosen, f"no {kind} in {name} can be removed"
    args, kwargs = double(example.args), double(example.kwargs or {})

    zeroed = copy.deepcopy(dense)
    # A bias of keys has no gradient but rounding noise (a shift of all scores); Adam's usual eps would make it a step.
    optimizer = torch.optim.Adam(zeroed.parameters(), lr=1e-2, eps=1e-3)
    step(zeroed, optimizer, args, kwargs)  # so that there is a state to carry over
    removed, removed_optimizer = copy.deepcopy((zeroed, optimizer))
    before = call(zeroed, args, kwargs)

    # every second unit goes, so that kept units are not simply the first ones
    plan = PruningPlan.of(dense, structures, {s.name: list(range(0, s.units, 2)) for s in chosen})
    identities = [id(p) for p in removed.parameters()]
    report = apply_plan(removed, plan, optimizers=[removed_optimizer], verify=(args, kwargs))
    zero_units(zeroed, plan)
    masks = kept_masks(zeroed, plan)
    names = {id(p): n for n, p in zeroed.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and names[id(parameter)] in masks:
                state[key] = value * masks[names[id(parameter)]]

    assert report.error is not None and report.error <= 1e-6
    assert sum(p.numel() for p in removed.parameters()) < sum(p.numel() for p in dense.parameters())
    assert [id(p) for p in removed.parameters()] == identities
    assert error(call(zeroed, args, kwargs), before) > 1e-6  # zeroing did something
    assert error(call(removed, args, kwargs), call(zeroed, args, kwargs)) < EXACT
    elsewhere = other_batch(example)
    assert error(call(removed, *elsewhere), call(zeroed, *elsewhere)) < EXACT

    step(zeroed, optimizer, args, kwargs, masks)
    step(removed, removed_optimizer, args, kwargs)
    assert error(call(removed, args, kwargs), call(zeroed, args, kwargs)) < EXACT
    small = dict(removed.named_parameters())
    for parameter_name, parameter in zeroed.named_parameters():
        mask = masks.get(parameter_name, torch.ones_like(parameter))
        expected = restricted(parameter.detach(), mask, small[parameter_name].shape)
        assert torch.allclose(small[parameter_name].detach(), expected, rtol=1e-9, atol=1e-10), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_every_structure_is_removable(name: str) -> None:
    """Nothing that discovery finds free in these models is refused by the proof."""
    example = MODELS[name]
    model, structures = proven(name)
    found = discover(model, double(example.args), double(example.kwargs or {}))
    assert [s.name for s in structures] == [s.name for s in found]
    assert all(s.tier in ("native", "shim") for s in structures)
