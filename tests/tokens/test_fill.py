"""What tokens that left have behind the layers: where only the mean is read, it is the mean of those that are left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.token_policies import Thresholds, TopK
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.forward import SoftPruning
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import ProvenTokens, prove_tokens
from lightning_compress.tokens.record import read_token_record, token_records
from lightning_compress.tokens.runtime import TokenRuntime
from tests.tokens.encoders import WIDTH, built, furthest, outputs, shaken, states, words


class Read(nn.Module):
    """An encoder of PyTorch whose states are read by a function of states (batch, tokens, width) and real tokens."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head, self.read = nn.Linear(WIDTH, 2), read

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.encoder(x, src_key_padding_mask=mask)
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else ~mask
        return self.head(self.read(hidden, real.unsqueeze(-1).to(hidden.dtype))).tanh()


def mean(hidden: Tensor, real: Tensor) -> Tensor:
    return (hidden * real).sum(1) / real.sum(1)


READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "mean": (mean, True),
    "normalised mean": (lambda hidden, real: nn.functional.normalize(mean(hidden, real), dim=-1), True),
    "sum": (lambda hidden, real: (hidden * real).sum(1), True),
    "mean and first": (lambda hidden, real: mean(hidden, real) + hidden[:, 0], False),
    "mean over padding": (lambda hidden, real: hidden.mean(1), False),
    "largest": (lambda hidden, real: hidden.masked_fill(real == 0, -torch.inf).amax(1), False),
    "mean of squares": (lambda hidden, real: mean(hidden.square(), real), False),
    "all": (lambda hidden, real: hidden, False),
}


def model(read: str) -> nn.Module:
    torch.manual_seed(0)
    return shaken(Read(READS[read][0]))


@pytest.mark.parametrize("read", list(READS))
def test_who_reads_only_the_mean_is_found(read: str) -> None:
    proof = prove_tokens(model(read), (), states(4, seed=7))
    assert proof.pooled == READS[read][1]
    assert proof.runtime(TopK((0.5, 0.5))).fill == proof.fill == ("mean" if proof.pooled else "state")
    assert proof.read is None and proof.scatter and proof.error < 1e-10


@pytest.mark.parametrize("name", ["bert-classes-sdpa", "bert-tags-sdpa", "modernbert-base-sdpa"])
def test_other_readers_keep_the_states(name: str) -> None:
    assert not prove_tokens(built(name), (), words(4, seed=7)).pooled


def test_the_mean_is_that_of_the_tokens_that_are_left() -> None:
    encoder = model("mean")
    proof = prove_tokens(encoder, (), states(4, seed=7))
    call = states(6, 10)
    with torch.no_grad():
        output, runtime = outputs(encoder, proof, TopK((0.6, 0.3)), "mask", call)
        stays = runtime.counts.layers_of_tokens() == 3
        whole, _ = outputs(encoder, proof, TopK((0.6, 0.3)), "mask", call, fill="state")
        assert not torch.equal(output, whole)
        # the same decisions with the states left as they are, and the mean taken over the right tokens here
        encoder.read = lambda hidden, real: mean(hidden, stays.unsqueeze(-1).to(hidden.dtype))
        expected, _ = outputs(encoder, proof, TopK((0.6, 0.3)), "mask", call, fill="state")
    assert furthest(expected, output) < 1e-12
    assert stays.sum() < runtime.counts.real.sum()


@pytest.mark.parametrize("fill", ["mean", "state"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("batch", [1, 16])
def test_masked_is_gathered(fill: str, padded: bool, batch: int) -> None:
    encoder = model("mean")
    proof: ProvenTokens = prove_tokens(encoder, (), states(4, seed=7))
    for policy in (Thresholds((0.8, 1.0)), TopK((0.7, 0.3)), Thresholds((9.0, 9.0)), Thresholds((-1.0, -1.0))):
        for settings in ({"worthwhile": 0.0, "saving": 1}, {"worthwhile": 0.4}):
            call = states(batch, 9, seed=batch, padded=padded)
            with torch.no_grad():
                masked, _ = outputs(encoder, proof, policy, "mask", call, fill=fill, **settings)
                gathered, _ = outputs(encoder, proof, policy, "gather", call, fill=fill, **settings)
            assert furthest(masked, gathered) < 1e-10
            assert torch.isfinite(gathered).all()


def test_nothing_changes_where_nothing_leaves() -> None:
    encoder = model("mean")
    proof = prove_tokens(encoder, (), states(4, seed=7))
    call = states(5)
    for mode in ("mask", "gather"):
        with torch.no_grad():
            assert furthest(encoder(**call), outputs(encoder, proof, Thresholds((-1.0, -1.0)), mode, call)[0]) < 1e-12


def test_soft_masks_near_a_step_give_the_hard_mean_and_gradients() -> None:
    encoder = model("mean")
    proof = prove_tokens(encoder, (), states(4, seed=7))
    call = states(5, 10)
    values = torch.tensor([0.9, 1.0], requires_grad=True)
    hard, _ = outputs(encoder, proof, Thresholds((0.9, 1.0)), "mask", call)
    soft, _ = outputs(encoder, proof, Thresholds((0.9, 1.0)), "soft", call, soft=SoftPruning(values, 1e-6))
    assert furthest(hard, soft) < 1e-9
    warm, _ = outputs(encoder, proof, Thresholds((0.9, 1.0)), "soft", call, soft=SoftPruning(values, 0.3))
    warm.sum().backward()
    assert torch.isfinite(values.grad).all() and bool((values.grad != 0).all())


def test_it_is_saved_and_other_words_are_refused() -> None:
    encoder = model("mean")
    proof = prove_tokens(encoder, (), states(4, seed=7))
    install_tokens(encoder, proof.runtime(TopK((0.5, 0.5))))
    (record,) = token_records(encoder)
    expected = encoder(**states(3))
    remove_tokens(encoder)
    runtime = read_token_record({"module": "", "runtime": record.state}, "file").install(encoder)
    assert runtime.fill == "mean" and torch.equal(encoder(**states(3)), expected)
    with pytest.raises(ValueError, match=r"file\.runtime\.fill"):
        read_token_record({"module": "", "runtime": {**record.state, "fill": "zero"}}, "file")
    with pytest.raises(TokenPruningError, match=r"Expected fill to be one of \['state', 'mean'\], but got 'zero'"):
        TokenRuntime(proof.stack, TopK((0.5, 0.5)), fill="zero")
