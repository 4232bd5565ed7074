"""Rows that are computed together: the cuts between them, and what a cut must save."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress import attach_input_quantizers, attach_quantizers, convert, select_weights, weight_kinds
from lightning_compress.quantization import activation_named, select_inputs
from lightning_compress.tokens import gathering
from lightning_compress.tokens.gathering import group_rows, scatter_states, slots_worth_a_call
from lightning_compress.tokens.install import install_tokens, remove_tokens
from tests.tokens.agreement import EXACT, POLICY, proven
from tests.tokens.encoders import CALLS, furthest

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(tuple)


def slots(groups: list[gathering.RowGroup]) -> int:
    return sum(group.slots * len(group.rows) for group in groups)


@given(COUNTS, st.integers(1, 200), st.integers(1, 5))
def test_every_row_is_in_one_group_that_is_long_enough(counts: tuple[int, ...], saving: int, most: int) -> None:
    groups = group_rows(counts, saving, most)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(counts)))
    assert all(max(counts[row] for row in group.rows) == group.slots for group in groups)
    assert all(a.slots > b.slots for a, b in pairwise(groups))
    assert slots(group_rows(counts, 10**9)) - slots(groups) >= saving * (len(groups) - 1)
    assert len(groups) <= most


@given(COUNTS)
def test_a_cut_is_made_where_it_saves_enough(counts: tuple[int, ...]) -> None:
    sizes = sorted(counts, reverse=True)
    best = max((len(sizes) - cut) * (sizes[0] - sizes[cut]) for cut in range(len(sizes)))
    assert len(group_rows(counts, best + 1)) == 1
    assert best == 0 or len(group_rows(counts, best)) > 1


def layer(width: int = 384, inner: int = 1536) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 12, inner, batch_first=True).eval()


def test_a_cut_must_save_more_slots_of_a_layer_with_fewer_weights() -> None:
    whole, small = layer(), layer(inner=96)
    weights = 4 * 384 * 384 + 2 * 384 * 1536
    rest = gathering.PER_DIM * 384
    assert slots_worth_a_call(whole, 384, CPU) == round(gathering.CALL["cpu"] / (weights + rest))
    assert slots_worth_a_call(small, 384, CPU) == round(gathering.CALL["cpu"] / (weights - 2 * 384 * 1440 + rest))
    assert slots_worth_a_call(whole, 384, CUDA) > 10 * slots_worth_a_call(whole, 384, CPU)


def test_nothing_at_all_is_worth_a_number_of_slots() -> None:
    assert 1 <= slots_worth_a_call(nn.Identity(), 1, CPU) < 10**9
    assert slots_worth_a_call(nn.Linear(10**5, 10**5, device="meta"), 10**5, CPU) == 1


@pytest.mark.parametrize("backend", ["native", "packed", "unpacked"])
def test_weights_in_integers_count_as_before(backend: str) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    before = slots_worth_a_call(model, 64, CPU)
    kinds = weight_kinds(model, (torch.randn(3, 64),))
    chosen = select_weights(kinds, "int8", None)
    attach_quantizers(model, chosen)
    attach_input_quantizers(model, select_inputs(model, kinds, chosen, activation_named("int8")))
    assert slots_worth_a_call(model, 64, CPU) == before
    convert(model, backend)
    assert slots_worth_a_call(model, 64, CPU) == before


def test_layers_say_what_a_cut_must_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs in one group of rows and in several, and no groups where layers are as small as these."""
    name = "bert-tags-sdpa"
    model, proof = proven(name)
    call = CALLS[name](6, 13, seed=2)
    runtime = install_tokens(model, proof.runtime(POLICY))
    runtime.worthwhile = 0.0
    sizes: list[int] = []
    part = model.get_submodule(runtime.stack.layers[1])
    handle = next(m for m in part.modules() if isinstance(m, nn.LayerNorm)).register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].shape[0])
    )
    try:
        assert runtime.saving is None
        found = []
        for price in (gathering.CALL["cpu"], 1.0):
            monkeypatch.setitem(gathering.CALL, "cpu", price)
            sizes.clear()
            with torch.no_grad():
                found.append((model(**call), list(sizes)))
    finally:
        handle.remove()
        remove_tokens(model)
    assert furthest(found[0][0], found[1][0]) < EXACT
    assert len(found[0][1]) == 1 < len(found[1][1])


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_states_are_put_back_with_their_gradients(fresh: bool, some: bool) -> None:
    full, states = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 2, 3, requires_grad=True)
    index, valid = torch.tensor([[0, 3], [4, 1]]), torch.tensor([[True, True], [True, False]]) if some else None
    held = full * 1
    before = held.detach().clone()
    got = scatter_states(held, states, index, valid, fresh)
    expected = before.clone()
    for row, slot in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if valid is None or valid[row, slot]:
            expected[row, index[row, slot]] = states[row, slot].detach()
    assert torch.equal(got, expected)
    assert torch.equal(held, got if fresh else before)
    got.sum().backward()
    written = 3 * (4 if valid is None else 3)
    assert (full.grad.sum(), states.grad.sum()) == (30 - written, written)


def test_putting_states_back_leaves_what_layers_have_returned() -> None:
    name = "bert-tags-sdpa"
    model, proof = proven(name)
    runtime = install_tokens(model, proof.runtime(POLICY))
    runtime.worthwhile = 0.0
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append((output, output.clone()))

    parts = list(model.get_submodule(runtime.stack.layers[0]).modules())[1:]
    handles = [part.register_forward_hook(see) for part in parts]
    try:
        with torch.no_grad():
            model(**CALLS[name](6, 13, seed=2))
    finally:
        for handle in handles:
            handle.remove()
        remove_tokens(model)
    assert runtime.counts is not None and runtime.counts.entering[1].sum() < runtime.counts.entering[0].sum()
    assert len(seen) > 5 and all(torch.equal(*pair) for pair in seen)
