"""Channels that networks group, shuffle, pad and multiply: found free, and removed exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.examination import examine
from lightning_compress.discovery import trace_structures
from lightning_compress.surgery import SurgeryError
from lightning_compress.surgery.slicing import cut, repair

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """A stem of 12 channels, a body, and a head that reads what the body makes."""

    def __init__(self, body: nn.Module, channels: int = 12) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 12, 3, padding=1), body, nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


class Padded(nn.Module):
    """A shortcut that is widened by channels of zeros."""

    def __init__(self, inputs: int = 12, outputs: int = 17) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + F.pad(x, (0, 0, 0, 0, 1, y.shape[1] - x.shape[1] - 1))


def grouped(inputs: int, outputs: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


# body, channels that it makes, units of the structures that are found
CASES: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    "groups": (lambda: grouped(12, 20, 4), 20, [3, 4, 5]),
    "groups of a transposed convolution": (lambda: nn.ConvTranspose2d(12, 20, 2, groups=4), 20, [3, 4, 5]),
    "groups, one after the other": (lambda: nn.Sequential(grouped(12, 24, 4), grouped(24, 12, 2)), 12, [2, 2, 3, 6, 6]),
    "depthwise with a multiplier": (lambda: grouped(12, 36, 12), 36, [3, 12]),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(12, 20, 1), nn.GroupNorm(5, 20), nn.ReLU()), 20, [5, 12]),
    "shuffled groups": (
        lambda: nn.Sequential(grouped(12, 16, 4), Shuffle(4), grouped(16, 16, 16), grouped(16, 12, 4)),
        12,
        [3, 3, 4, 4],
    ),
    "padded shortcut": (Padded, 17, [4, 12]),
}


@pytest.mark.parametrize("case", CASES)
def test_found_and_removed_exactly(case: str) -> None:
    build, channels, units = CASES[case]
    assert sorted(s.units for s in trace_structures(Net(build(), channels), (IMAGE,))) == units
    verdict = examine(lambda: Net(build(), channels), (IMAGE,))
    assert not verdict.flags, verdict.notes
    assert verdict.complete, verdict.kinds


def test_groups_must_keep_equally_many_channels() -> None:
    layer, kept = grouped(4, 4, 2), torch.tensor([0, 1, 3])
    cut(layer.weight, {0: kept})
    with pytest.raises(SurgeryError, match=r"Expected the groups of a convolution to keep .* each, but got \[2, 1\]"):
        repair(layer, {0: kept})
