"""Attention in a fused kernel that the model itself asks for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.examination import examine
from lightning_compress.discovery import trace_structures

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))


class Fused(nn.Module):
    def __init__(self, kernel: SDPBackend, masked: bool = False) -> None:
        super().__init__()
        self.kernel, self.masked, self.heads = kernel, masked, 2
        self.query, self.key, self.value = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 24)
        self.out, self.table = nn.Linear(24, 16), nn.Parameter(torch.randn(1, 2, 1, 5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.query, self.key, self.value))
        mask = self.table.expand(2, -1, 5, -1) if self.masked else None
        with sdpa_kernel([self.kernel]):
            mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_structures_are_those_of_the_unfused_form(masked: bool) -> None:
    found = [
        Counter((s.kind, s.units, len(s.slices)) for s in trace_structures(Fused(kernel, masked), (X,)))
        for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    ]
    assert found[0] == found[1] and {kind for kind, *_ in found[1]} == {"head", "qk_dim", "vo_dim"}


def test_they_go_exactly() -> None:
    verdict = examine(lambda: Fused(SDPBackend.FLASH_ATTENTION), (X,))
    assert verdict.complete, verdict.kinds
