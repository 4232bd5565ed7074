"""The theorem on one model: zeroed equals removed, on the example and elsewhere, and discovery leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import Structures
from lightning_compress.surgery import apply_plan, zero_units

EXACT = 1e-9


def doubled(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64 and evaluation mode, with nothing left at a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def elsewhere(args: Sequence[Any]) -> tuple[Any, ...]:
    """Another batch of the same sizes."""
    return tuple(a.flip(0) * 0.7 + 0.1 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def outputs(model: nn.Module, args: Sequence[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in output_tensors(model(*args))]


def gap(first: list[Tensor], second: list[Tensor]) -> float:
    assert [t.shape for t in first] == [t.shape for t in second]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(first, second, strict=True))


def check(model: nn.Module, args: Sequence[Any], seed: int = 0) -> Structures:
    """Discover, prove, remove random units of every structure, compare; returns the proven structures.

    The model must be in float64 and evaluation mode (``doubled``).
    """
    before = copy.deepcopy(model.state_dict())
    dense = outputs(model, args)
    structures = discover(model, args, prove=True)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before), "discovery changed the model"
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, args), dense, strict=True))
    if not structures:
        return structures

    chance = random.Random(seed)
    kept = {s.name: sorted(chance.sample(range(s.units), chance.randint(1, s.units - 1))) for s in structures}
    plan = PruningPlan.of(model, structures, kept)
    zeroed, removed, replayed = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    zero_units(zeroed, plan)
    report = apply_plan(removed, plan, verify=(tuple(args), {}))
    apply_plan(replayed, report.plan)  # as after loading a file: by the edits that were verified, without a check
    for batch in (args, elsewhere(args)):
        expected = outputs(zeroed, batch)
        assert gap(outputs(removed, batch), expected) < EXACT
        assert gap(outputs(replayed, batch), expected) < EXACT
    count = sum(p.numel() for p in removed.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    assert report.parameters_after == count
    found = {s.name: s.slices for s in discover(model, args)}
    if all(s.slices == found[s.name] for s in structures):  # a shim may leave what lies between the weights whole
        assert count == structures.params.evaluate(plan.counts)
    small, shapes = removed.state_dict(), plan.new_shapes()
    for name, tensor in before.items():
        if name in small:
            assert tuple(small[name].shape) == tuple(shapes.get(name, tensor.shape)), name
    return structures
