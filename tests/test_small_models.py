"""Layers and styles that people write, each in a few lines: what is found in them, and that it goes exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.exact import check, doubled

Found = list[tuple[str, int]]
Build = Callable[[], nn.Module]


class Forward(nn.Module):
    """``forward(self, *args)`` over the given modules and parameters."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


ROWS, SEQUENCE, SIGNAL, IMAGE = noise(4, 9), noise(2, 6, 9), noise(2, 3, 12), noise(2, 3, 8, 8)
CASES: dict[str, tuple[Build, tuple[Any, ...], Found]] = {}


def case(name: str, found: Found, *args: Any) -> Callable[[Build], Build]:
    """Enter a model with what must be found in it and proven."""

    def enter(build: Build) -> Build:
        CASES[name] = (build, args, found)
        return build

    return enter


def linears(transform: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        transform(nn.Linear(9, 12)), nn.Tanh(), transform(nn.Linear(12, 10)), nn.Tanh(), nn.Linear(10, 4)
    )


def masked(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.random_unstructured(layer, "bias", 0.2)


# Weights that are computed from others. The old functions warn that they are old.
TRANSFORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over inputs": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight_norm over everything": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "masks": masked,
}
for name, transform in TRANSFORMS.items():
    CASES[name] = (lambda transform=transform: linears(transform), (ROWS,), [("ffn", 12), ("ffn", 10)])


@case("weight_norm, transposed convolution", [("channel", 6), ("channel", 8)], SIGNAL)
def _transposed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(3, 6, 3)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.ConvTranspose1d(6, 8, 3)),
        nn.Tanh(),
        nn.Conv1d(8, 2, 1),
    )


@case("weight_norm behind a literal size", [("ffn", 3), ("ffn", 4)], ROWS)
def _literal() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(9, 12))
    return Forward(lambda s, x: s.b(s.a(x).view(4, 3, 4).reshape(4, 12)), a=layer, b=nn.Linear(12, 2))


@case("more returned than read", [("head", 3), ("qk_dim", 4), ("vo_dim", 4), ("ffn", 12)], SEQUENCE)
def _attention() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.embed(x))
        return s.out(s.attention(y, y, y)[0])  # averages its weights over the heads, for nobody

    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    return Forward(forward, embed=nn.Linear(9, 12), norm=nn.LayerNorm(12), attention=attention, out=nn.Linear(12, 2))


@case("bilinear", [("ffn", 5), ("ffn", 6), ("ffn", 7)], ROWS)
def _bilinear() -> nn.Module:
    return Forward(
        lambda s, x: s.o(torch.tanh(s.q(s.a(x), s.b(x)))),
        a=nn.Linear(9, 5),
        b=nn.Linear(9, 6),
        q=nn.Bilinear(5, 6, 7),
        o=nn.Linear(7, 2),
    )


@case("rotary positions as complex numbers", [("head", 3), ("vo_dim", 4), ("qk_dim", 2)], SEQUENCE)
def _rotary() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 6, s.heads, -1) for part in (s.q, s.k, s.v))
        angles = torch.outer(torch.arange(6, dtype=x.dtype), s.frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]

        def turned(t: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(t.reshape(2, 6, t.shape[2], -1, 2)) * turn).flatten(3)

        q, k, v = (t.transpose(1, 2) for t in (turned(q), turned(k), v))
        return s.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    model = Forward(forward, q=nn.Linear(9, 12), k=nn.Linear(9, 12), v=nn.Linear(9, 12), o=nn.Linear(12, 2), heads=3)
    model.register_buffer("frequencies", torch.tensor([1.0, 0.3]))
    return model


@case("heads beside dimensions that do not line up", [("head", 3), ("qk_dim", 4), ("vo_dim", 4)], SEQUENCE)
def _skewed() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 6, s.heads, -1).transpose(1, 2) for part in (s.q, s.k, s.v))
        scores = q @ k.mT  # (2, heads, 6, 6), moved by one: relative positions
        scores = F.pad(scores, (1, 0)).view(2, -1, 7, 6)[:, :, 1:]
        return s.o(scores.softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    return Forward(forward, q=nn.Linear(9, 12), k=nn.Linear(9, 12), v=nn.Linear(9, 12), o=nn.Linear(12, 2), heads=3)


@case("PReLU with a slope per channel", [("channel", 6)], IMAGE)
def _prelu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 2, 1))


@case("windows and back", [("channel", 6), ("channel", 5)], IMAGE)
def _windows() -> nn.Module:
    return Forward(
        lambda s, x: s.o(F.fold(s.m(F.unfold(s.c(x), 2, stride=2).mT).mT, 8, 2, stride=2)),
        c=nn.Conv2d(3, 6, 1),
        m=nn.Linear(24, 20),
        o=nn.Conv2d(5, 2, 1),
    )


@case("sampled at given places, pooled and unpooled", [("channel", 6)], IMAGE)
def _sampled() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        grid = torch.tanh(s.g(x)).permute(0, 2, 3, 1)
        y = F.grid_sample(s.c(x), grid, align_corners=False)
        pooled, places = F.max_pool2d(y, 2, return_indices=True)
        return s.o(F.max_unpool2d(pooled, places, 2))

    return Forward(forward, c=nn.Conv2d(3, 6, 1), g=nn.Conv2d(3, 2, 1), o=nn.Conv2d(6, 2, 1))


@case("packed sequences", [("ffn", 5), ("ffn", 7)], noise(3, 4, 9), torch.tensor([4, 2, 3]))
def _packed() -> nn.Module:
    def forward(s: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(s.e(x), lengths, batch_first=True, enforce_sorted=False)
        return s.o(nn.utils.rnn.pad_packed_sequence(s.r(packed)[0], batch_first=True)[0])

    return Forward(forward, e=nn.Linear(9, 5), r=nn.GRU(5, 7, batch_first=True), o=nn.Linear(7, 2))


@case("rows chosen by a mask, and written back", [("ffn", 8), ("ffn", 5)], ROWS)
def _mask() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        chosen = x[:, 0] > -5
        y = torch.zeros(4, s.a.out_features, dtype=x.dtype)
        y[chosen] = s.a(x[chosen])
        y[y < 0] = 0.0
        return s.c(s.b(y))

    return Forward(forward, a=nn.Linear(9, 8), b=nn.Linear(8, 5), c=nn.Linear(5, 2))


@case("masks as buffers", [("ffn", 8), ("ffn", 5)], ROWS)
def _boolean() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        weight = s.b.weight.masked_fill(~s.connections, 0.0)
        return s.c(torch.tanh(F.linear(torch.tanh(s.a(x)) * s.keep, weight, s.b.bias)))

    model = Forward(forward, a=nn.Linear(9, 8), b=nn.Linear(8, 5), c=nn.Linear(5, 2))
    model.register_buffer("keep", torch.arange(8) % 3 > 0)
    model.register_buffer("connections", torch.arange(40).view(5, 8) % 4 > 0)
    return model


@case("messages along edges", [("ffn", 8), ("ffn", 5)], noise(6, 9), torch.tensor([[0, 1, 2, 5], [1, 1, 3, 0]]))
def _graph() -> nn.Module:
    def forward(s: Any, x: Tensor, edges: Tensor) -> Tensor:
        y = torch.tanh(s.a(x))
        place = edges[1][:, None].expand(-1, y.shape[1])
        y = torch.zeros_like(y).scatter_reduce(0, place, y[edges[0]], "amax", include_self=False)
        y = s.b(y)
        place = edges[1][:, None].expand(-1, y.shape[1])
        return s.c(torch.zeros_like(y).scatter_add_(0, place, y[edges[0]]))

    return Forward(forward, a=nn.Linear(9, 8), b=nn.Linear(8, 5), c=nn.Linear(5, 2))


@case("Fourier transform along another dimension", [("ffn", 8)], SEQUENCE)
def _fourier() -> nn.Module:
    return Forward(
        lambda s, x: s.b(torch.fft.irfft(torch.fft.rfft(s.a(x), dim=1) * 0.5, n=6, dim=1)),
        a=nn.Linear(9, 8),
        b=nn.Linear(8, 2),
    )


@case("inverse of a matrix per head", [("head", 3), ("qk_dim", 2), ("vo_dim", 2)], SEQUENCE)
def _inverse() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, v = (part(x).view(2, 6, s.heads, -1).transpose(1, 2) for part in (s.q, s.v))
        return s.o((torch.linalg.inv(q @ q.mT + torch.eye(6)) @ v).transpose(1, 2).flatten(2))

    return Forward(forward, q=nn.Linear(9, 6), v=nn.Linear(9, 6), o=nn.Linear(6, 2), heads=3)


@case("gradient inside the forward", [("ffn", 8), ("ffn", 5)], ROWS)
def _gradient() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = s.c(F.softplus(s.b(F.silu(s.a(x))))).sum()
            return torch.autograd.grad(energy, x)[0]

    return Forward(forward, a=nn.Linear(9, 8), b=nn.Linear(8, 5), c=nn.Linear(5, 1))


@case("running maximum over time", [("ffn", 8)], SEQUENCE)
def _running() -> nn.Module:
    return Forward(lambda s, x: s.b(torch.cummax(s.a(x), 1)[0]), a=nn.Linear(9, 8), b=nn.Linear(8, 2))


@case("a weight that would divide by zero", [("ffn", 7)], ROWS)
def _division() -> nn.Module:
    """The units of ``a`` cannot be silenced: what reads them is divided by its own size, per unit."""

    def forward(s: Any, x: Tensor) -> Tensor:
        weight = s.b.weight / s.b.weight.norm(dim=0)
        return s.c(torch.tanh(F.linear(s.a(x), weight)))

    return Forward(forward, a=nn.Linear(9, 8), b=nn.Linear(8, 7), c=nn.Linear(7, 2))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated:FutureWarning")
def test_what_is_found_goes_exactly(name: str) -> None:
    build, args, expected = CASES[name]
    torch.manual_seed(0)
    structures = check(doubled(build()), args)
    assert sorted((s.kind, s.units) for s in structures) == sorted(expected)


class Hostile(nn.Module):
    """An object graph with cycles, large containers, properties that raise or compute, many integers of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(9, 12), nn.Linear(12, 8), nn.Linear(8, 2)
        self.config = type("Config", (), {})()
        self.config.itself, self.config.width = self.config, 12
        self.table = {"inner": [list(range(100_000)), 12]}
        self.table["again"] = self.table
        self.__dict__["parent"] = [self]
        for number in range(24):
            setattr(self, f"size_{number}", 12)

    @property
    def broken(self) -> int:
        raise RuntimeError("this property is not for reading")

    @property
    def expensive(self) -> int:
        raise AssertionError("nobody has asked for this")

    def forward(self, x: Tensor) -> dict[str, Any]:
        calls["forward"] += 1
        chain: list[Any] = [torch.ones(1)]
        for _ in range(1500):
            chain = [chain]
        y = self.c(torch.tanh(self.b(torch.tanh(self.a(x)).view(-1, self.size_17))))
        result: dict[str, Any] = {"logits": y, "chain": chain}
        result["itself"] = result
        return result


calls = {"forward": 0}


def test_the_search_ends_on_hostile_objects() -> None:
    calls["forward"] = 0
    structures = check(doubled(Hostile()), (ROWS,))
    assert sorted((s.kind, s.units) for s in structures) == [("ffn", 8), ("ffn", 12)]
    assert calls["forward"] < 500
