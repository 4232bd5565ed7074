"""Masks, lengths and calls of every kind: masking is gathering, a row is what it is alone, or an error says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.token_policies import Thresholds, TokenPolicy, TopK
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.forward import SoftPruning
from lightning_compress.tokens.install import install_tokens, remove_tokens
from lightning_compress.tokens.proof import prove_tokens
from tests.tokens.agreement import EXACT, POLICY, agree, proven, run
from tests.tokens.encoders import LAYERS, WIDTH, Call, Encoder, furthest, shaken, states, words

TOKENS = 12
NAMES = ("bert-tags-sdpa", "bert-tags-eager", "bert-classes-sdpa", "modernbert-tags-eager", "torch-post-all-padded")
POLICIES: dict[str, TokenPolicy] = {"thresholds": POLICY, "top_k": TopK((0.6, 0.3), accumulated=True)}


def holes(batch: int, tokens: int = TOKENS) -> Tensor:
    real = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) > 0.4
    real[:, 1] = True
    return real


places = torch.arange(TOKENS)
MASKS = {
    "holes": holes(5),
    "holes at the protected token": holes(5) & (places > 0),
    "left padding": places >= torch.tensor([0, 3, 8, 11, 5])[:, None],
    "empty rows": places < torch.tensor([12, 0, 5, 1, 0])[:, None],
    "only empty rows": torch.zeros(2, TOKENS, dtype=torch.bool),
    "single tokens": places[:1] == torch.zeros(3, 1),
    "single tokens in padding": places == torch.tensor([0, 4, 11])[:, None],
    "one row": holes(1),
    "all real": torch.ones(4, TOKENS, dtype=torch.bool),
}


def call_of(name: str, real: Tensor) -> Call:
    if name.startswith("torch"):
        return {**states(*real.shape), "mask": ~real}
    return {**words(*real.shape), "attention_mask": real.long()}


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("kind", list(MASKS))
@pytest.mark.parametrize("name", NAMES)
def test_masks(name: str, kind: str, policy: str) -> None:
    model, proof = proven(name)
    real = MASKS[kind]
    counts = agree(model, proof, call_of(name, real), POLICIES[policy])
    filled = real.any(1)
    assert counts.real[filled].tolist() == real.sum(1)[filled].tolist()
    assert bool((counts.layers_of_tokens()[~real & filled[:, None]] <= 1).all())  # padding is in the first layer only
    assert bool((counts.layers_of_tokens()[:, 0] == LAYERS)[real[:, 0]].all())
    assert bool((counts.entering >= 1).all())


@pytest.mark.parametrize("name", ["bert-tags-sdpa", "bert-tags-eager", "torch-post-all-padded"])
def test_no_mask_is_a_mask_of_all(name: str) -> None:
    model, proof = proven(name)
    call = call_of(name, MASKS["all real"])
    bare = {**call, "mask" if "mask" in call else "attention_mask": None}
    counts = agree(model, proof, bare)
    assert counts.real.tolist() == [TOKENS] * 4
    with torch.no_grad():
        one, other = (run(model, proof, c)[0] for c in (call, bare))
    assert furthest(one, other) < EXACT


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["bert-tags-sdpa", "torch-post-all-padded"])
def test_proof_and_call_may_differ_in_whether_there_is_a_mask(name: str, masked: bool) -> None:
    model, _ = proven(name)
    whole = call_of(name, MASKS["all real"])
    whole.pop("mask" if "mask" in whole else "attention_mask")
    calls = [whole, call_of(name, MASKS["holes"])]
    proof = prove_tokens(model, (), calls[masked])
    counts = agree(model, proof, calls[not masked])
    assert float(counts.entering[-1].sum()) < float(counts.real.sum())


@pytest.mark.parametrize("kind", ["holes", "left padding", "one row", "single tokens in padding"])
@pytest.mark.parametrize("policy", list(POLICIES))
@torch.no_grad()
def test_a_row_is_what_its_tokens_are_alone(policy: str, kind: str) -> None:
    """Without positions, padding anywhere is as if it were not there: every row by itself, its real tokens only."""
    model, proof = proven("torch-post-all-padded")
    real = MASKS[kind]
    call = call_of("torch", real)
    together, runtime = run(model, proof, call, POLICIES[policy], protected=(), min_keep=2)
    for row, there in enumerate(real):
        alone = {"x": call["x"][row : row + 1, there], "mask": None}
        expected, own = run(model, proof, alone, POLICIES[policy], protected=(), min_keep=2)
        assert furthest(expected[0], together[row, there]) < EXACT
        assert runtime.counts is not None and own.counts is not None
        assert torch.equal(own.counts.entering[:, 0], runtime.counts.entering[:, row])


@pytest.mark.parametrize("name", ["bert-tags-sdpa", "bert-classes-sdpa", "torch-post-all-padded"])
def test_only_the_protected_token_stays(name: str) -> None:
    model, proof = proven(name)
    real = places < torch.tensor([12, 7, 1])[:, None]
    for policy in (Thresholds((1e9, 1e9)), TopK((0.0, 0.0))):
        counts = agree(model, proof, call_of(name, real), policy)
        assert counts.entering.tolist() == [[12, 7, 1], [1, 1, 1], [1, 1, 1]]
        assert bool((counts.layers_of_tokens()[:, 0] == LAYERS).all())


@pytest.mark.parametrize("name", ["bert-tags-sdpa", "bert-tags-eager"])
def test_protected_tokens_stay_where_they_are_real(name: str) -> None:
    model, proof = proven(name)
    real = places < torch.tensor([12, 7, 3])[:, None]
    guarded = torch.zeros_like(real)
    guarded[:, [2, 6, 11]] = True  # padding in some rows
    for policy in (Thresholds((1e9, 1e9)), TopK((0.0, 0.0))):
        counts = agree(model, proof, call_of(name, real), policy, protected_mask=guarded, protected=(0, -1, 40))
        stay = (guarded | (places == 0) | (places == TOKENS - 1)) & real
        assert torch.equal(counts.layers_of_tokens() == LAYERS, stay)
        assert counts.entering[1:].tolist() == [stay.sum(1).tolist()] * 2


@pytest.mark.parametrize("policy", list(POLICIES))
def test_rows_shorter_than_min_keep_stay_whole(policy: str) -> None:
    model, proof = proven("bert-tags-sdpa")
    real = places < torch.tensor([12, 4, 3, 1])[:, None]
    harsh = {"thresholds": Thresholds((1e9, -1e9)), "top_k": TopK((0.0, 0.0))}[policy]
    counts = agree(model, proof, call_of("bert-tags-sdpa", real), harsh, min_keep=4)
    assert counts.entering.tolist() == [[12, 4, 3, 1], [4, 4, 3, 1], [4, 4, 3, 1]]
    counts = agree(model, proof, call_of("bert-tags-sdpa", real), harsh, min_keep=100)
    assert counts.entering.tolist() == [[12, 4, 3, 1]] * 3


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(4, TOKENS - 1, dtype=torch.bool), r"torch.bool of shape \(4, 11\)"),
        (torch.ones(1, TOKENS, dtype=torch.bool), r"torch.bool of shape \(1, 12\)"),
        (torch.ones(TOKENS, dtype=torch.bool), r"torch.bool of shape \(12,\)"),
        (torch.ones(4, TOKENS), r"torch.float32 of shape \(4, 12\)"),
        ([[True] * TOKENS] * 4, "list"),
    ],
)
def test_a_protected_mask_of_another_shape_is_refused(mask: Any, got: str) -> None:
    model, proof = proven("bert-tags-sdpa")
    call = call_of("bert-tags-sdpa", MASKS["all real"])
    with pytest.raises(
        TokenPruningError, match=rf"Expected protected_mask to be bool of shape \(4, 12\), but got {got}\."
    ):
        run(model, proof, call, protected_mask=mask)
    agree(model, proof, call)  # nothing is left behind


@pytest.mark.parametrize("name", ["modernbert-tags-eager", "torch-post-all-padded"])
def test_a_mask_of_another_shape_is_the_error_of_the_model(name: str) -> None:
    model, proof = proven(name)
    call = call_of(name, MASKS["holes"])
    key = "mask" if "mask" in call else "attention_mask"
    wrong = {**call, key: call[key][:, :-1]}
    with pytest.raises(Exception) as plain:  # noqa: PT011
        model(**wrong)
    with pytest.raises(type(plain.value)) as pruned:
        run(model, proof, wrong)
    assert str(pruned.value) == str(plain.value)
    agree(model, proof, call)


@pytest.mark.parametrize("shape", [(0, TOKENS), (3, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["gather", "mask", "soft"])
def test_nothing_at_all(shape: tuple[int, int], mode: str) -> None:
    model, proof = proven("torch-post-all-padded")
    x = torch.zeros(*shape, WIDTH, dtype=torch.float64)
    output, runtime = run(model, proof, {"x": x}, mode=mode, soft=SoftPruning(torch.ones(2)))
    assert output.shape == (*shape, 2)
    assert runtime.counts is None


@pytest.mark.parametrize("mode", ["mask", "gather", "soft"])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_nan_in_one_row_stays_there(policy: str, mode: str) -> None:
    model, proof = proven("torch-post-all-padded")
    call = call_of("torch", places < torch.tensor([12, 9, 5])[:, None])
    soft = SoftPruning(torch.tensor([0.9, 1.0]), 0.1)
    with torch.no_grad():
        clean, _ = run(model, proof, call, POLICIES[policy], mode=mode, soft=soft)
        call["x"][1, 3] = torch.nan
        output, runtime = run(model, proof, call, POLICIES[policy], mode=mode, soft=soft)
    assert bool(output[1].isnan().all())
    assert furthest(clean[[0, 2]], output[[0, 2]]) < EXACT
    assert runtime.counts is not None
    if mode != "soft":
        assert bool((runtime.counts.entering >= 1).all())


@pytest.mark.parametrize("name", ["bert-tags-sdpa", "modernbert-tags-eager", "torch-post-all-padded"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 30])
def test_calls_of_other_lengths_than_in_the_proof(name: str, tokens: int) -> None:
    model, proof = proven(name)
    for batch in (1, 4):
        counts = agree(model, proof, call_of(name, holes(batch, max(2, tokens))[:, :tokens]))
        assert counts.tokens == tokens


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (p.unflatten(2, (3, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, 2))
        mask = None if mask is None else mask[:, None, None]
        return x + torch.tanh(self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)))


class Calling(nn.Module):
    """Calls its layers with arguments by position or by keyword."""

    def __init__(self, how: str = "positions") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.how = how

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "positions":
                x = layer(x, real)
            elif self.how == "mask by keyword":
                x = layer(x, mask=real)
            else:
                x = layer(mask=real, x=x)
        return x


@pytest.mark.parametrize("how", ["positions", "mask by keyword", "keywords"])
@pytest.mark.parametrize("called", ["positions", "mask by keyword", "keywords"])
def test_arguments_by_position_and_by_keyword(how: str, called: str) -> None:
    torch.manual_seed(0)
    model = shaken(Calling(how))
    x = torch.randn(4, 9, WIDTH, dtype=torch.float64)
    real = torch.arange(9) < torch.tensor([9, 4, 7, 1])[:, None]
    call = {"x": x, "real": real}
    proof = prove_tokens(model, (), call) if how == "keywords" else prove_tokens(model, (x, real))
    counts = agree(model, proof, call)
    assert float(counts.entering[-1].sum()) < float(counts.real.sum())
    model.how = called
    if (how == "keywords") == (called == "keywords"):
        agree(model, proof, call)
    else:
        place = "kwargs.x" if how == "keywords" else "args.0"
        with pytest.raises(TokenPruningError, match=rf"at {place} of the layer 'layers.0', as in the example, but got"):
            run(model, proof, call)


@torch.no_grad()
def test_the_model_may_be_called_by_position() -> None:
    model, proof = proven("bert-tags-sdpa")
    call = call_of("bert-tags-sdpa", MASKS["holes"])
    expected, _ = run(model, proof, call)
    encoder, own = proven("torch-post-all-padded")
    given = call_of("torch", MASKS["holes"])
    wanted, _ = run(encoder, own, given)
    install_tokens(model, proof.runtime(POLICY))
    install_tokens(encoder, own.runtime(POLICY))
    try:
        assert furthest(expected[0], model(call["input_ids"], call["attention_mask"])[0]) < EXACT
        assert furthest(wanted, encoder(given["x"], given["mask"])) < EXACT
    finally:
        remove_tokens(model)
        remove_tokens(encoder)


def test_a_model_without_attention_to_decide_by_keeps_what_it_was() -> None:
    model = Encoder(layers=1)
    with pytest.raises(TokenPruningError, match=r"layers without a chain: \['encoder'\]"):
        prove_tokens(model.eval(), (), states(2, dtype=torch.float32))
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("protected", [None, ()])
@pytest.mark.parametrize("kind", ["left padding", "holes at the protected token"])
def test_an_example_whose_first_token_is_padding_proves(kind: str, protected: tuple[int, ...] | None) -> None:
    real = MASKS[kind].clone()
    real[0, 1:] = True  # a row of some length
    for name in ("bert-classes-sdpa", "torch-post-all-padded"):
        model, _ = proven(name)
        proof = prove_tokens(model, (), call_of(name, real), protected)  # its places are not where others are, too
        assert proof.scatter
        agree(model, proof, call_of(name, MASKS["left padding"]))
        agree(model, proof, call_of(name, MASKS["all real"]))
