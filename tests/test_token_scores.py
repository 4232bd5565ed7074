"""Scores against closed forms and a plain float64 computation; chunks change nothing but the memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.token_scores import (
    attention_with_scores,
    from_padded_scale,
    linear_ramp,
    scores_among_rest,
    scores_of_probabilities,
    soft_mask,
    straight_through,
    to_padded_scale,
)


def tensors(batch=3, heads=4, queries=5, keys=7, dims=6, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dims), (batch, heads, keys, dims), (batch, heads, keys, dims + 1)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


def plain(query, key, value, bias=None, key_bias=None, scale=None, weights=None):
    """Everything at once, row by row, in double precision."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, queries, dims = query.shape
    keys = key.shape[2]
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * (1 / math.sqrt(dims) if scale is None else scale)
    if bias is not None and bias.dtype == torch.bool:
        logits = logits.masked_fill(~bias.expand_as(logits), -torch.inf)
    elif bias is not None:
        logits = logits + bias
    if key_bias is not None:
        logits = logits + key_bias.view(batch, 1, 1, keys)
    probabilities = torch.softmax(logits, -1)
    probabilities = torch.where(torch.isneginf(logits).all(-1, keepdim=True), 0.0, probabilities)
    weights = torch.ones(batch, queries) if weights is None else weights
    scores = torch.einsum("bhqk,bq->bk", probabilities, weights.double()) / heads
    return torch.einsum("bhqk,bhkd->bhqd", probabilities, value), scores


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = {"view", "slice", "transpose", "expand", "_unsafe_view", "unsqueeze", "detach", "alias", "narrow"}
        if isinstance(result, Tensor) and func.overloadpacket._qualified_op_name.split("::")[1] not in views:
            self.bytes = max(self.bytes, result.nbytes)
        return result


BIASES = {
    "none": lambda: None,
    "padding": lambda: torch.arange(7)[None, None, None] < torch.tensor([7, 4, 1])[:, None, None, None],
    "expanded": lambda: (torch.arange(7)[None, None, None] < torch.tensor([7, 4, 1]).view(3, 1, 1, 1)).expand(
        3, 4, 5, 7
    ),
    "full": lambda: torch.rand(3, 4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.4,
    "nothing": lambda: torch.zeros(7, dtype=torch.bool),
    "added": lambda: torch.randn(3, 1, 5, 7, generator=torch.Generator().manual_seed(2)),
    "per query": lambda: torch.randn(5, 1, generator=torch.Generator().manual_seed(2)),
    "per head": lambda: torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3)),
    "lowest": lambda: torch.zeros(3, 1, 1, 7).masked_fill(torch.arange(7) > 3, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 8 * 4 * 7 * 2, 8 * 4 * 7 * 5, 8 * 4 * 7 * 5 * 2, None])
def test_it_is_the_plain_computation_whatever_the_chunks(bias, with_keys, weighted, chunk_bytes):
    query, key, value = tensors()
    key_bias = torch.tensor([[0.0, -1, -torch.inf, -2, 0, 0, 0]]).expand(3, 7).double() if with_keys else None
    weights = torch.rand(3, 5) if weighted else None
    want = plain(query, key, value, BIASES[bias](), key_bias, weights=weights)
    got = attention_with_scores(
        query, key, value, BIASES[bias](), key_bias, query_weights=weights, chunk_bytes=chunk_bytes
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    alone = attention_with_scores(
        query, key, None, BIASES[bias](), key_bias, query_weights=weights, chunk_bytes=chunk_bytes
    )
    assert alone[0] is None
    torch.testing.assert_close(alone[1], want[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [name for name in BIASES if name != "nothing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_output_is_that_of_torch(bias, dtype, scale):
    query, key, value = tensors(dtype=dtype)
    mask = BIASES[bias]()
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        mask = mask.expand(3, 4, 5, 7) if mask.dim() == 4 else mask
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    output, scores = attention_with_scores(query, key, value, mask, scale=scale)
    assert output.dtype == dtype and scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(output, want)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4), st.integers(1, 400), st.booleans())
def test_small_and_empty_batches(batch, heads, queries, keys, chunk_bytes, masked):
    query, key, value = tensors(batch, heads, queries, keys)
    bias = torch.rand(batch, 1, queries, keys) < 0.5 if masked else None
    output, scores = attention_with_scores(query, key, value, bias, chunk_bytes=chunk_bytes)
    assert output.shape == (batch, heads, queries, 7) and scores.shape == (batch, keys)
    if keys:
        torch.testing.assert_close((output, scores), plain(query, key, value, bias), rtol=1e-12, atol=1e-12)
    else:
        assert not output.any()


def test_the_mean_score_over_real_tokens_is_one_at_every_padded_length():
    for length in (9, 20):
        query, key, value = tensors(2, 4, length, length)
        real = torch.arange(length) < torch.tensor([[9], [4]])
        _, scores = attention_with_scores(query, key, value, real[:, None, None], query_weights=real.double())
        torch.testing.assert_close(scores.sum(1), torch.tensor([9.0, 4.0]).double())
        assert (scores[~real] == 0).all()


def test_one_token_receives_everything_and_equal_tokens_the_same():
    one = tensors(2, 3, 1, 1)
    assert attention_with_scores(*one)[1].tolist() == [[1.0], [1.0]]
    query, key, value = (t[:, :, :1].expand(-1, -1, 4, -1) for t in tensors(2, 3, 4, 4))
    torch.testing.assert_close(attention_with_scores(query, key, value)[1], torch.ones(2, 4).double())


@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_queries_without_any_key_give_zeros_and_gradients_without_nan(chunk_bytes):
    query, key, value = tensors(grad=True)
    bias = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    bias[1] = False
    bias[2, :, 3] = False
    output, scores = attention_with_scores(query, key, value, bias, chunk_bytes=chunk_bytes)
    assert not output[1].any() and not scores[1].any() and not output[2, :, 3].any()
    torch.testing.assert_close(scores.sum(1), torch.tensor([5.0, 0, 4]).double())
    (output.sum() + scores.square().sum()).backward()
    assert all(t.grad.isfinite().all() for t in (query, key, value))
    assert not query.grad[1].any() and query.grad[0].any()


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 2 * 3 * 2, None])
def test_gradients_reach_everything_through_output_and_scores(chunk_bytes):
    query, key, value = tensors(2, 2, 3, 3, 2, grad=True)
    bias = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    key_bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_scores(*given[:5], query_weights=given[5], chunk_bytes=chunk_bytes)

    assert torch.autograd.gradcheck(run, (query, key, value, bias, key_bias, weights))


def test_dropout_changes_the_output_but_not_the_scores():
    query, key, value = tensors(grad=True)
    _, want = attention_with_scores(query, key, value)
    for chunk_bytes in (None, 500):
        torch.manual_seed(0)
        output, scores = attention_with_scores(query, key, value, dropout=0.5, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(scores, want)
        assert not torch.allclose(output, attention_with_scores(query, key, value)[0])
        # the backward pass repeats the chunks with the same dropout: the output is linear in the values
        (gradient,) = torch.autograd.grad(output.sum(), value)
        torch.testing.assert_close((gradient * value).sum(), output.sum())


def test_grouped_queries_share_keys():
    query, key, value = tensors(heads=6)
    key, value = key[:, :2], value[:, :2]
    want = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    output, scores = attention_with_scores(query, key, value, enable_gqa=True, chunk_bytes=800)
    torch.testing.assert_close(output, want)
    repeated = attention_with_scores(query, key.repeat_interleave(3, 1), None)[1]
    torch.testing.assert_close(scores, repeated)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("chunk", ["examples", "queries"])
def test_no_tensor_is_larger_than_a_chunk(grad, chunk):
    query, key, value = tensors(8, 4, 64, 64, 2, dtype=torch.float32, grad=grad)
    bias = torch.ones(8, 1, 1, 64, dtype=torch.bool)
    chunk_bytes = 4 * 64 * 64 * 4 * 2 if chunk == "examples" else 4 * 64 * 4 * 16
    largest = max(chunk_bytes, value.nbytes)  # the output has the size of the values
    assert largest < 8 * 4 * 64 * 64 * 4 / 3
    with Largest() as seen:
        output, scores = attention_with_scores(query, key, value, bias, chunk_bytes=chunk_bytes)
        if grad:
            (output.sum() + scores.square().sum()).backward()
    assert seen.bytes <= largest


def test_chunks_are_computed_again_only_where_there_are_several_and_gradients_are_wanted():
    class Softmaxes(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._softmax.default
            return func(*args, **(kwargs or {}))

    for chunk_bytes, grad, forward, both in ((None, True, 1, 1), (8 * 4 * 7 * 5, True, 3, 6), (1, False, 15, 15)):
        inputs = tensors(grad=grad)
        with Softmaxes() as seen:
            output, _ = attention_with_scores(*inputs, chunk_bytes=chunk_bytes)
            assert seen.count == forward
            if grad:
                output.sum().backward()
        assert seen.count == both


def test_it_runs_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, value = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 6)
        output, scores = attention_with_scores(query, key, value, torch.ones(2, 1, 5, 7, dtype=torch.bool))
    assert output.shape == (2, 4, 5, 6) and scores.shape == (2, 7)


def test_autocast_is_followed():
    query, key, value = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = F.scaled_dot_product_attention(query, key, value)
        output, scores = attention_with_scores(query, key, value)
        double = attention_with_scores(*tensors())[0]
    assert output.dtype == want.dtype == torch.bfloat16 and scores.dtype == torch.float32
    assert double.dtype == torch.float64
    torch.testing.assert_close(output, want)
    rounded = attention_with_scores(query.bfloat16().float(), key.bfloat16().float(), None)[1]
    torch.testing.assert_close(scores, rounded)


def test_scores_of_given_probabilities():
    probabilities = torch.softmax(torch.randn(3, 4, 5, 7), -1)
    weights = torch.rand(3, 5)
    torch.testing.assert_close(scores_of_probabilities(probabilities), probabilities.sum(2).mean(1))
    want = torch.einsum("bhqk,bq->bk", probabilities, weights) / 4
    torch.testing.assert_close(scores_of_probabilities(probabilities, weights), want)
    half = scores_of_probabilities(probabilities.half(), weights.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, want, rtol=2e-3, atol=2e-3)
    assert scores_of_probabilities(torch.zeros(0, 4, 5, 7), torch.zeros(0, 5)).shape == (0, 7)
    assert scores_of_probabilities(torch.zeros(2, 4, 0, 7)).tolist() == [[0.0] * 7] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "Expected attention that is not causal"),
        ({"chunk_bytes": 0}, "at least one byte, but got chunk_bytes=0"),
        (
            {"query": torch.zeros(4, 5, 6)},
            r"Expected query of shape \(batch, heads, tokens, dims\), but got \(4, 5, 6\)",
        ),
        ({"key": torch.zeros(3, 2, 7, 6)}, "Expected key of 4 heads .* got 2: grouped queries need enable_gqa=True"),
        (
            {"value": torch.zeros(3, 3, 7, 6), "enable_gqa": True},
            "Expected value of 4 heads .*, or a divisor, but got 3",
        ),
        ({"key": torch.zeros(3, 4, 7, 5)}, r"Expected key .*, \(3, 4, 7, 6\), but got \(3, 4, 7, 5\)"),
        ({"key": torch.zeros(2, 4, 7, 6)}, r"\(3, 4, 7, 6\), but got \(2, 4, 7, 6\)"),
        ({"value": torch.zeros(3, 4, 6, 6)}, r"Expected value .*, \(3, 4, 7, 6\), but got \(3, 4, 6, 6\)"),
        (
            {"bias": torch.zeros(3, 7)},
            r"broadcast to \(batch, heads, queries, keys\), \(3, 4, 5, 7\), but got \(3, 7\)",
        ),
        ({"bias": torch.zeros(1, 1, 1, 1, 7)}, r"but got \(1, 1, 1, 1, 7\)"),
        ({"key_bias": torch.zeros(3, 5)}, r"Expected a key bias of shape \(batch, keys\), \(3, 7\), but got \(3, 5\)"),
        ({"query_weights": torch.zeros(3, 7)}, r"Expected query weights .*, \(3, 5\), but got \(3, 7\)"),
    ],
)
def test_bad_input(change, message):
    given = dict(zip(("query", "key", "value"), tensors(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        attention_with_scores(**{**given, **change})


def test_probabilities_of_another_shape():
    with pytest.raises(ValueError, match=r"\(batch, heads, queries, keys\), but got \(4, 5, 5\)"):
        scores_of_probabilities(torch.zeros(4, 5, 5))
    with pytest.raises(ValueError, match=r"Expected query weights .*, \(2, 5\), but got \(5,\)"):
        scores_of_probabilities(torch.zeros(2, 4, 5, 6), torch.ones(5))


def test_the_soft_mask_is_half_at_the_threshold_and_a_step_when_cold():
    scores = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    threshold = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(soft_mask(scores, threshold, 0.5), 1 / (1 + torch.exp(-(scores - 1) / 0.5)))
    assert soft_mask(scores, 1.0, 1e-4).tolist() == [0.0, 0.0, 0.5, 1.0]
    assert torch.autograd.gradcheck(lambda t: soft_mask(scores, t, 0.3), (threshold,))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="Expected a positive temperature"):
            soft_mask(scores, 1.0, temperature)


def test_straight_through_is_hard_forward_and_soft_backward():
    soft = torch.tensor([0.1, 0.3, 0.7], requires_grad=True)
    through = straight_through(soft, soft > 0.2)
    assert through.tolist() == [0.0, 1.0, 1.0]
    through.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert soft.grad.tolist() == [1.0, 2.0, 3.0]


def test_padded_scale():
    assert from_padded_scale(0.01, 128) == 1.28 and to_padded_scale(1.28, 128) == 0.01
    torch.testing.assert_close(to_padded_scale(torch.tensor([1.0, 2.0]), 4), torch.tensor([0.25, 0.5]))
    for convert in (from_padded_scale, to_padded_scale):
        with pytest.raises(ValueError, match="padded length of at least 1, but got 0"):
            convert(0.01, 0)


def test_the_ramp_starts_at_zero_and_ends_below_the_final_threshold():
    assert linear_ramp(0.012, 12) == pytest.approx([0.001 * layer for layer in range(12)])
    with pytest.raises(ValueError, match="number of layers of at least 1, but got 0"):
        linear_ramp(1.0, 0)


def test_scores_among_the_rest_by_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(6, 9, generator=generator, dtype=torch.float64) * 3
    weights = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    weights[:, 0], weights[0, 4:] = 0, 0
    for row, weight, found in zip(scores, weights, scores_among_rest(scores, weights), strict=True):
        largest = max(range(9), key=lambda i: float(row[i] * weight[i]))
        others = [i for i in range(9) if i != largest]
        mean = sum(float(row[i] * weight[i]) for i in others) / sum(float(weight[i]) for i in others)
        torch.testing.assert_close(found, row / mean)


def test_what_a_few_tokens_take_does_not_show_among_the_rest() -> None:
    # the first is protected, the third takes most of what is left; the others have twice and half of their mean
    some = torch.tensor([[4.0, 0.2, 3.0, 0.1, 0.3]])
    more = torch.tensor([[1.0, 0.8, 1.6, 0.4, 1.2]])
    free = torch.tensor([[False, True, True, True, True]])
    for scores in (some, more):
        torch.testing.assert_close(scores_among_rest(scores, free)[0, [1, 3, 4]], torch.tensor([1.0, 0.5, 1.5]))


def test_rows_with_one_token_or_none_that_may_leave() -> None:
    scores = torch.tensor([[1.5, 0.5, 1.0], [2.0, 0.25, 0.75]])
    free = torch.tensor([[False, True, False], [False, False, False]])
    assert scores_among_rest(scores, free)[0, 1] == 1
    assert torch.equal(scores_among_rest(scores, free)[1], scores[1])
    assert scores_among_rest(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    assert scores_among_rest(torch.zeros(2, 0), torch.ones(2, 0)).shape == (2, 0)
    with pytest.raises(ValueError, match=r"Expected weights like the scores, \(2, 3\), but got \(2, 2\)"):
        scores_among_rest(scores, free[:, :2])


def test_scores_among_the_rest_have_gradients() -> None:
    scores = torch.rand(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(scores_among_rest, (scores, weights))
