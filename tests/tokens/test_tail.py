"""The tail of a layer: found by what a run shows, proven, skipped by tokens that the layer decides against."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.token_policies import Thresholds, TopK
from lightning_compress.tokens.costs import LayerCosts
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.forward import SoftPruning
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.record import read_token_record, token_records
from lightning_compress.tokens.stack import TokenTail
from lightning_compress.tokens.stack_costs import stack_costs
from tests.tokens.encoders import CALLS, WIDTH, built, furthest, lengths, outputs, shaken

HEADS, INNER = 2, 20


class Block(nn.Module):
    """Attention in the forward of the block itself; the feed-forward part is told by ``part``."""

    def __init__(self, part: Callable[[], nn.Module], residual: bool = True) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.part, self.residual = part(), residual

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.part(x) if self.residual else self.part(x)


class Model(nn.Module):
    def __init__(self, part: Callable[[], nn.Module], residual: bool = True, layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(part, residual) for _ in range(layers))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, real[:, None, None])
        return x


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


class WithResidual(nn.Module):
    """A feed-forward part that adds its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = feed_forward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Bare(nn.Module):
    """Parameters of its own and no sub-modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(INNER, WIDTH)), nn.Parameter(torch.randn(WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.up).relu(), self.down)


class Mixing(nn.Module):
    """A convolution over neighbours: tokens that leave would move the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Ranked(nn.Module):
    """Nothing about it depends on the order of tokens, but every token sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(1, keepdim=True))


def call(batch: int = 4, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"x": x, "real": torch.arange(tokens) < lengths(batch, tokens, seed)[:, None]}


FOUND = {
    "bert-classes-sdpa": TokenTail("intermediate", "output", "args.1"),
    "distilbert-tags-eager": TokenTail("ffn", "ffn"),
    "albert-base-sdpa": TokenTail("albert_layers.0.ffn", "albert_layers.0.ffn_output"),
    "modernbert-base-sdpa": TokenTail("mlp", "mlp"),
    "torch-post-all-padded": TokenTail("linear1", "linear2"),
    "torch-pre-first-whole": TokenTail("linear1", "linear2"),
}


@pytest.mark.parametrize("name", list(FOUND))
def test_it_is_found_in_the_families(name: str) -> None:
    assert prove_tokens(built(name), (), CALLS[name](4, seed=7)).stack.tail == FOUND[name]


@pytest.mark.parametrize(
    "part,residual,tail",
    [
        (feed_forward, True, TokenTail("part", "part")),
        (Bare, True, TokenTail("part", "part")),
        (WithResidual, False, TokenTail("part", "part", "args.0")),
        (nn.Identity, True, TokenTail("out", "out")),  # the projection of the attention is left
    ],
)
def test_hand_written_blocks(part: Callable[[], nn.Module], residual: bool, tail: TokenTail) -> None:
    torch.manual_seed(0)
    model = shaken(Model(part, residual))
    proof = prove_tokens(model, (), call(seed=3))
    assert proof.stack.tail == tail and proof.error < 1e-10
    policy = Thresholds((0.9, 1.0))
    for batch in (1, 16):
        with torch.no_grad():
            masked, _ = outputs(model, proof, policy, "mask", call(batch, 11, batch), worthwhile=0.0, saving=1)
            gathered, _ = outputs(model, proof, policy, "gather", call(batch, 11, batch), worthwhile=0.0, saving=1)
        assert furthest(masked, gathered) < 1e-10


@pytest.mark.parametrize("part", [Mixing, Ranked])
def test_a_part_that_mixes_tokens_is_refused_or_left_whole(part: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = shaken(Model(part))
    with pytest.raises(TokenPruningError, match=r"Expected the layer 'blocks\.\d' to compute the same for tokens"):
        prove_tokens(model, (), call(seed=3))


@pytest.mark.parametrize(("part", "residual"), [(feed_forward, True), (WithResidual, False)])
def test_a_token_that_leaves_has_what_the_attention_made_of_it(part: Callable[[], nn.Module], residual: bool) -> None:
    torch.manual_seed(0)
    model = shaken(Model(part, residual))
    proof = prove_tokens(model, (), call(seed=3))
    given = call(1, 6)
    states: list[Tensor] = []
    handle = model.blocks[0].part.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        model(**given)
        handle.remove()
        output, runtime = outputs(model, proof, TopK((0.5, 0.5)), "gather", given)
    left = runtime.counts.layers_of_tokens()[0] == 1
    assert left.sum() == 3
    torch.testing.assert_close(output[0, left], states[0][0, left])


@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_only_tokens_that_stay_go_through(mode: str) -> None:
    torch.manual_seed(0)
    model = shaken(Model(feed_forward))
    proof = prove_tokens(model, (), call(seed=3))
    seen: list[int] = []
    for block in model.blocks:
        block.part[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    with torch.no_grad():
        _, runtime = outputs(model, proof, TopK((0.6, 0.3)), mode, call(5, 10), worthwhile=0.0, saving=10**9)
    entering = runtime.counts.entering.sum(1).tolist()
    assert entering[0] > entering[1] > entering[2]
    longest = int(runtime.counts.entering[2].max())
    assert seen == ([entering[1], entering[2], 5 * longest] if mode == "gather" else [50, 50, 50])


def test_soft_decisions_near_a_step_are_hard_ones() -> None:
    torch.manual_seed(0)
    model = shaken(Model(feed_forward))
    proof = prove_tokens(model, (), call(seed=3))
    thresholds = torch.tensor([0.9, 1.0], requires_grad=True)
    policy = Thresholds((0.9, 1.0))
    hard, _ = outputs(model, proof, policy, "mask", call(6, 10))
    soft, runtime = outputs(model, proof, policy, "soft", call(6, 10), soft=SoftPruning(thresholds, 1e-6))
    real = call(6, 10)["real"]
    # a pruned token adds nothing in either; where all others leave, a soft mask of -60 is not quite minus infinity
    assert furthest(hard[real], soft[real]) < 1e-9
    soft.sum().backward()
    assert torch.isfinite(thresholds.grad).all()
    assert runtime.counts.entering.requires_grad


def test_costs_of_the_tail() -> None:
    torch.manual_seed(0)
    model = shaken(Model(feed_forward))
    proof = prove_tokens(model, (), call(seed=3))
    costs = stack_costs(model, (), call(seed=3), proof.stack)
    pairs, attention, tail = 2.0 * WIDTH, 4.0 * WIDTH**2, 2.0 * WIDTH * INNER
    assert costs == LayerCosts((pairs,) * 3, (attention + tail,) * 3, (0.0,) * 3, (tail,) * 3)
    entering = torch.tensor([[8.0, 5.0], [4.0, 5.0], [1.0, 2.0]])
    expected = [
        [pairs * n**2 + attention * n + tail * behind for n, behind in zip(row, after, strict=True)]
        for row, after in zip(entering.tolist(), [*entering[1:].tolist(), entering[2].tolist()], strict=True)
    ]
    assert costs.macs(entering).tolist() == expected


@pytest.mark.parametrize("tail", [(1.0,), (1.0, -1.0), (1.0, 9.0)])
def test_impossible_tails_are_refused(tail: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="Expected a tail of every call, from 0 to b"):
        LayerCosts((1.0, 1.0), (3.0, 3.0), (0.0, 0.0), tail)


def test_records_have_it_and_damaged_ones_are_refused() -> None:
    torch.manual_seed(0)
    model = shaken(Model(feed_forward))
    proof = prove_tokens(model, (), call(seed=3))
    install_tokens(model, proof.runtime(Thresholds((0.9, 1.0))))
    (record,) = token_records(model)
    expected = model(**call(5))
    remove_tokens(model)
    state = {"module": "", "runtime": record.state}
    runtime = read_token_record(state, "file").install(model)
    assert runtime.stack == proof.stack
    assert torch.equal(model(**call(5)), expected)
    tail = record.state["stack"]["tail"]
    for key, value in (("base", "elsewhere"), ("first", 3), ("last", None)):
        broken = {**record.state, "stack": {**record.state["stack"], "tail": {**tail, key: value}}}
        with pytest.raises(ValueError, match=rf"file\.runtime\.stack\.tail\.{key}"):
            read_token_record({"module": "", "runtime": broken}, "file")
    elsewhere = {**record.state, "stack": {**record.state["stack"], "tail": {**tail, "first": "gone"}}}
    remove_tokens(model)
    with pytest.raises(TokenPruningError, match="Expected a model with the modules"):
        read_token_record({"module": "", "runtime": elsewhere}, "file").install(model)


def test_a_part_that_changes_its_ways_is_refused() -> None:
    torch.manual_seed(0)
    model = shaken(Model(feed_forward))
    proof = prove_tokens(model, (), call(seed=3))
    model.blocks[1].part[2] = nn.Linear(INNER, WIDTH).double()
    model.blocks[1].part.append(nn.Unflatten(1, (1, -1)))
    with pytest.raises(TokenPruningError, match=r"Expected 'blocks\.1\.part', behind the attention of its layer"):
        outputs(model, proof, TopK((0.5, 0.5)), "gather", call(3))
