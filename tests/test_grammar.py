"""The theorem on modules that nobody wrote: a grammar composes them, hypothesis looks for one that breaks it.

    model     = start block* end            start: rows | ids | image
    block     = linear | norm | attention | residual | split and concatenate | reshape | shared weights | gate | ...

For every model: what discovery finds free goes (unless sizes are literals and weights bare), zeroed equals removed on
the example and on another batch, the smaller model has the shapes that the plan predicts, and discovery leaves the
model as it was, bit for bit.

``GRAMMAR_EXAMPLES`` sets the number of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.analysis import discover
from lightning_compress.surgery.workbench import NO_INFLUENCE
from tests.exact import check, doubled

EXAMPLES = int(os.environ.get("GRAMMAR_EXAMPLES", "500"))
BATCH, TIME, SIDE, VOCABULARY = 2, 3, 4, 11

Pick = Callable[[Sequence[Any]], Any]
Block = tuple[nn.Module, int]  # a module and the width of what it returns
ACTIVATIONS = (F.relu, torch.tanh, F.gelu, torch.sin, F.silu)
WIDTHS = (2, 3, 4, 5, 6, 8, 9, 12)


class Part(nn.Module):
    """A forward over a few modules and parameters.

    Args:
        forward: called with the part and its input.
        literal: whether sizes are written into it, which no attribute can repair.
        bare: whether it uses weights outside of the layers that they belong to, where nothing can be put in between.
    """

    def __init__(
        self, forward: Callable[..., Tensor], *, literal: bool = False, bare: bool = False, **parts: Any
    ) -> None:
        super().__init__()
        self.function, self.literal, self.bare = forward, literal, bare
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def factors(width: int) -> list[int]:
    """Ways to cut a width into more than one group of more than one position; empty where there are none."""
    return [n for n in range(2, width) if width % n == 0]


# ------------------------------------------------------------------------------------------- rows: (batch, time, width)


def linear(pick: Pick, width: int) -> Block:
    new = pick(WIDTHS)
    return nn.Linear(width, new, bias=pick((True, False))), new


def weights(pick: Pick, width: int) -> Block:
    """A product with bare parameters."""
    new = pick(WIDTHS)
    part = Part(
        lambda s, x: x @ s.w + s.b, bare=True, w=nn.Parameter(torch.randn(width, new)), b=nn.Parameter(torch.zeros(new))
    )
    return part, new


def normed_weight(pick: Pick, width: int) -> Block:
    new = pick(WIDTHS)
    transform = pick((nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm))
    return transform(nn.Linear(width, new)), new


def activation(pick: Pick, width: int) -> Block:
    function = pick(ACTIVATIONS)
    return Part(lambda s, x: function(x)), width


def norm(pick: Pick, width: int) -> Block:
    kind = pick(("layer", "rms", "batch", "unit", "softmax"))
    if kind == "batch":
        return Part(lambda s, x: s.norm(x.flatten(0, 1)).view(x.shape), norm=nn.BatchNorm1d(width)), width
    if kind == "unit":
        return Part(lambda s, x: F.normalize(x, dim=-1)), width
    if kind == "softmax":
        return Part(lambda s, x: x.softmax(-1)), width
    return (nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-5)), width


def residual(pick: Pick, width: int) -> Block:
    inner, function = pick(WIDTHS), pick(ACTIVATIONS)
    up, down = nn.Linear(width, inner), nn.Linear(inner, width)
    return Part(lambda s, x: x + s.down(function(s.up(x))), up=up, down=down), width


def gated(pick: Pick, width: int) -> Block:
    inner, new, packed = pick(WIDTHS), pick(WIDTHS), pick(("chunk", "glu", "split", "two"))
    down = nn.Linear(inner, new)
    if packed == "two":
        up, gate = nn.Linear(width, inner), nn.Linear(width, inner)
        return Part(lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x)), up=up, gate=gate, down=down), new

    def forward(s: Any, x: Tensor) -> Tensor:
        both = s.up(x)
        if packed == "glu":
            return s.down(F.glu(both))
        a, b = both.chunk(2, -1) if packed == "chunk" else both.split(inner, -1)
        return s.down(torch.tanh(a) * b)

    literal = packed == "split"
    return Part(forward, literal=literal, up=nn.Linear(width, 2 * inner), down=down), new


def gate(pick: Pick, width: int) -> Block:
    return Part(lambda s, x: x * torch.sigmoid(s.gate(x)), gate=nn.Linear(width, width)), width


def attention(pick: Pick, width: int) -> Block:
    heads, dims, new = pick((1, 2, 3)), pick((2, 3, 4)), pick((0, 3, 5))
    form, add = pick(("separate", "chunk", "three", "grouped", "literal")), pick((True, False))
    out = width if add else (new or width)
    inner = heads * dims

    def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * 0.4).softmax(-1) @ value

    def forward(s: Any, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        if form == "three":
            q, k, v = s.packed(x).view(batch, time, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
        elif form == "chunk":
            q, k, v = (t.view(batch, time, s.heads, -1).transpose(1, 2) for t in s.packed(x).chunk(3, -1))
        elif form == "literal":
            parts = (s.q(x), s.k(x), s.v(x))
            q, k, v = (t.view(batch, time, heads, dims).transpose(1, 2) for t in parts)
        elif form == "grouped":
            q = s.q(x).view(batch, time, s.heads, -1).transpose(1, 2)
            k, v = (t.view(batch, time, 1, -1).transpose(1, 2).expand(-1, s.heads, -1, -1) for t in (s.k(x), s.v(x)))
        else:
            q, k, v = (p(x).view(batch, time, s.heads, -1).transpose(1, 2) for p in (s.q, s.k, s.v))
        y = s.out(mix(q, k, v).transpose(1, 2).reshape(batch, time, -1))
        return x + y if add else y

    if form in ("chunk", "three"):
        parts = {"packed": nn.Linear(width, 3 * inner)}
    else:
        other = dims if form == "grouped" else inner
        parts = {"q": nn.Linear(width, inner), "k": nn.Linear(width, other), "v": nn.Linear(width, other)}
    out_layer = nn.Linear(inner, out)
    return Part(forward, literal=form == "literal", heads=heads, out=out_layer, **parts), out


def split(pick: Pick, width: int) -> Block:
    """Cut, work on one piece or on both, and concatenate in either order."""
    cut, both, swap, new = pick(range(1, width)), pick((True, False)), pick((True, False)), pick(WIDTHS)
    parts = {"first": nn.Linear(cut, new), "second": nn.Linear(width - cut, new) if both else nn.Identity()}

    def forward(s: Any, x: Tensor) -> Tensor:
        a, b = torch.tanh(s.first(x[..., :cut])), s.second(x[..., cut:])
        return torch.cat([b, a] if swap else [a, b], -1)

    return Part(forward, literal=True, **parts), new + (new if both else width - cut)


def concat(pick: Pick, width: int) -> Block:
    """A dense connection: new units beside the old ones."""
    new, function = pick(WIDTHS), pick(ACTIVATIONS)
    return Part(lambda s, x: torch.cat([x, function(s.up(x))], -1), up=nn.Linear(width, new)), width + new


def reshape(pick: Pick, width: int) -> Block:
    """Groups of positions: shuffled, with a layer for all groups alike, or summed."""
    if not factors(width):
        return activation(pick, width)
    groups, kind, new = pick(factors(width)), pick(("shuffle", "shared", "sum")), pick(WIDTHS)
    inner = width // groups
    if kind == "shuffle":
        return Part(lambda s, x: x.unflatten(-1, (-1, s.inner)).transpose(-1, -2).flatten(-2), inner=inner), width
    if kind == "sum":
        return Part(lambda s, x: x.unflatten(-1, (-1, s.inner)).sum(-2), inner=inner), inner
    layer = nn.Linear(inner, new)
    part = Part(lambda s, x: s.layer(x.unflatten(-1, (-1, s.inner))).flatten(-2), layer=layer, inner=inner)
    return part, groups * new


def shared(pick: Pick, width: int) -> Block:
    """One layer applied twice."""
    inner, square = pick(WIDTHS), pick((True, False))
    if square:
        return Part(lambda s, x: s.layer(torch.tanh(s.layer(x))), layer=nn.Linear(width, width)), width

    def forward(s: Any, x: Tensor) -> Tensor:
        x = x + s.down(torch.tanh(s.up(x)))
        return x + s.down(torch.tanh(s.up(x)))

    return Part(forward, up=nn.Linear(width, inner), down=nn.Linear(inner, width)), width


def transposed(pick: Pick, width: int) -> Block:
    """One weight read in both directions."""
    inner = pick(WIDTHS)
    return Part(lambda s, x: torch.tanh(s.up(x)) @ s.up.weight, bare=True, up=nn.Linear(width, inner)), width


def branches(pick: Pick, width: int) -> Block:
    new, count, join = pick(WIDTHS), pick((2, 3)), pick(("sum", "stack", "max", "product"))

    def forward(s: Any, x: Tensor) -> Tensor:
        made = [torch.tanh(branch(x)) for branch in s.branches]
        if join == "sum":
            return sum(made[1:], made[0])
        if join == "product":
            return made[0] * made[1]
        together = torch.stack(made, -2)
        return together.mean(-2) if join == "stack" else together.amax(-2)

    return Part(forward, branches=nn.ModuleList([nn.Linear(width, new) for _ in range(count)])), new


def over_time(pick: Pick, width: int) -> Block:
    """Convolutions along the time: depthwise, grouped, full."""
    kind, new = pick(("depthwise", "full", "grouped")), pick(WIDTHS)
    if kind == "grouped" and not factors(width):
        kind = "full"
    if kind == "depthwise":
        layer, out = nn.Conv1d(width, width, 3, padding=1, groups=width), width
    elif kind == "full":
        layer, out = nn.Conv1d(width, new, 3, padding=1), new
    else:
        groups = pick(factors(width))
        layer, out = nn.Conv1d(width, groups * pick((1, 2, 3)), 3, padding=1, groups=groups), 0
        out = layer.out_channels
    return Part(lambda s, x: s.layer(x.mT).mT, layer=layer), out


def recurrent(pick: Pick, width: int) -> Block:
    new, kind, both = pick((2, 3, 5)), pick((nn.GRU, nn.LSTM, nn.RNN)), pick((True, False))
    layer = kind(width, new, batch_first=True, bidirectional=both)
    return Part(lambda s, x: s.layer(x)[0], layer=layer), new * (2 if both else 1)


def parameters(pick: Pick, width: int) -> Block:
    """A learned scale, or learned positions."""
    if pick((True, False)):
        return Part(lambda s, x: x * s.scale, bare=True, scale=nn.Parameter(torch.ones(width))), width
    return Part(lambda s, x: x + s.positions, bare=True, positions=nn.Parameter(torch.zeros(TIME, width))), width


def narrow(pick: Pick, width: int) -> Block:
    start = pick(range(width))
    stop = pick(range(start + 1, width + 1))
    return Part(lambda s, x: x[..., start:stop], literal=True), stop - start


def mixed_time(pick: Pick, width: int) -> Block:
    """A layer over the time, as in mixers."""
    inner = pick(WIDTHS)
    up, down = nn.Linear(TIME, inner), nn.Linear(inner, TIME)
    return Part(lambda s, x: x + s.down(torch.tanh(s.up(x.mT))).mT, up=up, down=down), width


ROWS = (
    linear, weights, normed_weight, activation, norm, residual, gated, gate, attention, split, concat, reshape, shared,
    transposed, branches, over_time, recurrent, parameters, narrow, mixed_time,
)  # fmt: skip

# -------------------------------------------------------------------------------- images: (batch, width, side, side)


def convolution(pick: Pick, width: int) -> Block:
    new, size = pick(WIDTHS), pick((1, 3))
    return nn.Conv2d(width, new, size, padding=size // 2, bias=pick((True, False))), new


def upwards(pick: Pick, width: int) -> Block:
    """A transposed convolution, or more pixels, and the size back."""
    new, kind = pick(WIDTHS), pick(("transposed", "nearest", "pixels"))
    pool = nn.AvgPool2d(2)
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(width, new, 2, 2), pool), new
    if kind == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), pool, nn.Conv2d(width, new, 1)), new
    return nn.Sequential(nn.Conv2d(width, 4 * new, 1), nn.PixelShuffle(2), pool), new


def image_norm(pick: Pick, width: int) -> Block:
    kind = pick(("batch", "instance", "group", "prelu"))
    if kind == "batch":
        return nn.BatchNorm2d(width), width
    if kind == "instance":
        return nn.InstanceNorm2d(width, affine=True), width
    if kind == "prelu":
        return nn.PReLU(width), width
    return nn.GroupNorm(pick([1, *factors(width), width]), width), width


def separable(pick: Pick, width: int) -> Block:
    inner, add = pick(WIDTHS), pick((True, False))
    body = nn.Sequential(
        nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.ReLU6(), nn.Conv2d(inner, inner, 3, 1, 1, groups=inner),
        nn.Hardswish(), nn.Conv2d(inner, width, 1),
    )  # fmt: skip
    return Part(lambda s, x: x + s.body(x) if add else s.body(x), body=body), width


def grouped(pick: Pick, width: int) -> Block:
    if not factors(width):
        return convolution(pick, width)
    groups = pick(factors(width))
    new = groups * pick((1, 2, 3))
    return nn.Conv2d(width, new, 3, padding=1, groups=groups), new


def excited(pick: Pick, width: int) -> Block:
    inner = pick(WIDTHS)
    down, up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(s: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3))))))[..., None, None]

    return Part(forward, down=down, up=up), width


def joined(pick: Pick, width: int) -> Block:
    new = pick(WIDTHS)
    return Part(
        lambda s, x: torch.cat([x, F.relu(s.layer(x))], 1), layer=nn.Conv2d(width, new, 3, padding=1)
    ), width + new


def shuffled(pick: Pick, width: int) -> Block:
    if not factors(width):
        return image_norm(pick, width)
    part = Part(lambda s, x: x.unflatten(1, (s.groups, -1)).transpose(1, 2).flatten(1, 2), groups=pick(factors(width)))
    return part, width


def halves(pick: Pick, width: int) -> Block:
    cut = pick(range(1, width))

    def forward(s: Any, x: Tensor) -> Tensor:
        a, b = x.split([cut, width - cut], 1)
        return torch.cat([a, F.relu(s.layer(b))], 1)

    return Part(forward, literal=True, layer=nn.Conv2d(width - cut, width - cut, 3, padding=1)), width


def image_activation(pick: Pick, width: int) -> Block:
    return pick((nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.MaxPool2d(3, 1, 1), nn.Dropout2d())), width


IMAGES = (
    convolution, upwards, image_norm, separable, grouped, excited, joined, shuffled, halves, image_activation,
)  # fmt: skip


@st.composite
def models(draw: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of the grammar and an example call."""

    def pick(options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(options))

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    start, width, outputs = pick(("rows", "ids", "image")), pick(WIDTHS), pick((2, 3))
    blocks: list[nn.Module] = []
    if start == "ids":
        example = torch.randint(0, VOCABULARY, (BATCH, TIME), generator=generator)
        blocks.append(nn.Embedding(VOCABULARY, width))
    elif start == "rows":
        example = torch.randn(BATCH, TIME, 4, generator=generator, dtype=torch.float64)
        blocks.append(nn.Linear(4, width))
    else:
        example = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        blocks.append(nn.Conv2d(3, width, 3, padding=1))
    for _ in range(draw(st.integers(1, 5))):
        block = pick(IMAGES if start == "image" else ROWS)
        if width < 2 or width > 24:
            block = convolution if start == "image" else linear
        module, width = block(pick, width)
        blocks.append(module)
    if start == "image":
        pooled = pick((True, False))
        if pooled:
            blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)]
        else:
            blocks += [nn.Flatten(), nn.Linear(width * SIDE**2, outputs)]
    else:
        end = pick(("each", "mean", "max", "first"))
        pool = {"mean": lambda s, x: x.mean(1), "max": lambda s, x: x.amax(1), "first": lambda s, x: x[:, 0]}
        blocks += [*([Part(pool[end])] if end in pool else []), nn.Linear(width, outputs)]
    return doubled(nn.Sequential(*blocks)), (example,)


def test_any_model_of_the_grammar() -> None:
    smaller = 0

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(model_and_call=models(), seed=st.integers(0, 99))
    def holds(model_and_call: tuple[nn.Module, tuple[Tensor, ...]], seed: int) -> None:
        nonlocal smaller
        model, args = model_and_call
        proven = check(model, args, seed)
        smaller += bool(proven)
        known = discover(model, args).pinned
        refused = [p for p in proven.pinned if p not in known and p.units > 1]
        parts = [part for part in model if isinstance(part, Part)]
        if not (any(part.literal for part in parts) and any(part.bare for part in parts)):
            assert [p for p in refused if NO_INFLUENCE not in p.reasons] == []  # what is free goes

    holds()
    assert smaller >= 0.9 * EXAMPLES
