"""A model, and a measurer whose clock is arithmetic on the model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import discover
from lightning_compress.structures import Structures
from lightning_compress.timing import Latency


class Block(nn.Module):
    """One pair of layers with a residual path."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, units), nn.Linear(units, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks of the given numbers of units: one ffn structure each."""

    def __init__(self, *units: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, n) for n in units)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


CALL = (torch.zeros(4, 8),)


def proven(model: nn.Module) -> Structures:
    return discover(model, CALL, kinds=("ffn",), prove=True)


def linear(out_features: int) -> float:
    return float(out_features)


def steps_of_8(out_features: int) -> float:
    """Widths run at the pace of the next multiple of 8, and misaligned ones a quarter slower on top."""
    return -(-out_features // 8) * 8 * (1.0 if out_features % 8 == 0 else 1.25)


class Clock:
    """Stands in for ``measure_latency``: milliseconds by the widths of the ``up`` layers, and a constant for the rest.

    Args:
        pace: milliseconds of a width.
        rest: milliseconds of everything else.
        noise: relative error of each measurement, by its number.
        spread: what the measurements say of themselves.
    """

    def __init__(
        self,
        pace: Callable[[int], float] = linear,
        rest: float = 20.0,
        noise: Callable[[int], float] = lambda number: 0.0,
        spread: float = 0.0,
    ) -> None:
        self.pace, self.rest, self.noise, self.spread = pace, rest, noise, spread
        self.calls: list[dict[str, tuple[int, ...]]] = []
        self.seconds: list[float] = []
        self.measured = 0

    def widths(self, model: nn.Module) -> tuple[int, ...]:
        return tuple(block.up.weight.shape[0] for block in model.get_submodule("blocks"))  # type: ignore[union-attr]

    def time(self, model: nn.Module) -> float:
        return (self.rest + sum(self.pace(n) for n in self.widths(model))) / 1e3

    def __call__(
        self, models: Mapping[str, nn.Module], args: Any, kwargs: Any, *, max_seconds: float, **options: Any
    ) -> dict[str, Latency]:
        self.calls.append({name: self.widths(model) for name, model in models.items()})
        self.seconds.append(max_seconds)
        times = {}
        for name, model in models.items():
            with torch.no_grad():
                model(*args, **kwargs)  # a copy that does not run would not be worth a time
            self.measured += 1
            seconds = self.time(model) * (1 + self.noise(self.measured))
            times[name] = Latency(seconds, seconds, 9, self.spread)
        return times
