r"""How much attention each token receives, and the soft and hard masks that are made of it.

The score of a token is its column of the attention matrix, summed over the queries and averaged over the heads. A row
of attention sums to one, so where the weights of the queries are 1 for the :math:`n` tokens that are there and 0 for
all others, the scores sum to :math:`n`: their mean is 1 at every length, padded or not. Learned token pruning (Kim et
al., "Learned Token Pruning for Transformers", 2022) divides by the padded length instead; ``to_padded_scale`` and
``from_padded_scale`` convert thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, sqrt
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20
CACHED_BYTES = 4 * 2**20  # a processor is fastest where a chunk stays in its cache
Scale = TypeVar("Scale", float, Tensor)


def scores_of_probabilities(probabilities: Tensor, query_weights: Tensor | None = None) -> Tensor:
    r"""The attention that every key receives.

    .. math:: s_i = \frac{1}{H} \sum_h \sum_q w_q A_{h,q,i}

    Args:
        probabilities: attention after the softmax and before dropout, (batch, heads, queries, keys).
        query_weights: :math:`w`, (batch, queries), from 0 to 1; None takes every query as 1.

    Returns:
        (batch, keys), at least in float32.

    Raises:
        ValueError: for tensors of other shapes.
    """
    if probabilities.dim() != 4:
        raise ValueError(
            f"Expected attention of shape (batch, heads, queries, keys), but got {tuple(probabilities.shape)}."
        )
    batch, _, queries, _ = probabilities.shape
    _check("query weights of shape (batch, queries)", query_weights, (batch, queries))
    return _received(_wide(probabilities), None if query_weights is None else query_weights[:, None])


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    query_weights: Tensor | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    r"""What ``F.scaled_dot_product_attention`` returns, together with the attention that every key receives.

    .. math:: A_h = \operatorname{softmax}(c \, Q_h K_h^\top + B + 1 b^\top), \quad
        \text{output}_h = \operatorname{dropout}(A_h) V_h, \quad s = \frac{1}{H} \sum_h A_h^\top w

    The probabilities are computed in chunks of whole examples, or of queries where one example is larger than a chunk,
    and never is more than one chunk of them held; where gradients are wanted and there are several chunks, the backward
    pass computes each again. Half precision is computed in float32, and autocast is followed, as the unfused kernel of
    torch does. A query whose keys are all masked gets output 0 and adds nothing to the scores.

    Args:
        query: (batch, heads, queries, dims).
        key: (batch, heads, keys, dims), with ``enable_gqa`` fewer heads that divide those of the query.
        value: (batch, heads, keys, value dims), heads as those of the key; None for the scores alone.
        bias: :math:`B`, broadcastable to (batch, heads, queries, keys): added, or True where to attend.
        key_bias: :math:`b`, (batch, keys), added in all heads and queries: the logarithm of a mask, -inf included.
        scale: :math:`c`, by default one over the square root of the dims.
        query_weights: :math:`w`, (batch, queries), from 0 to 1; None takes every query as 1.
        dropout: probability that an element of A is dropped in the output; the scores know no dropout.
        is_causal: refused, as tokens that later ones cannot see do not compete for attention.
        enable_gqa: as in ``F.scaled_dot_product_attention``.
        chunk_bytes: size of a chunk of probabilities; one query of all heads is the least. By default 256 MiB, and
            4 MiB on a processor where no gradient is wanted.

    Returns:
        The output, (batch, heads, queries, value dims), None without a value, and the scores, (batch, keys), at least
        in float32.

    Raises:
        ValueError: for causal attention, tensors whose shapes do not fit, or a chunk of no bytes.
    """
    if is_causal:
        raise ValueError("Expected attention that is not causal: a token that later ones cannot see has no fair score.")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"Expected chunks of at least one byte, but got chunk_bytes={chunk_bytes}.")
    bias = _checked(query, key, value, bias, key_bias, query_weights, enable_gqa)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        query, key = _lowered(query, lower), _lowered(key, lower)
        value = None if value is None else _lowered(value, lower)
        bias = None if bias is None else _lowered(bias, lower)
        with torch.autocast(device, enabled=False):
            return _chunked(query, key, value, bias, key_bias, scale, query_weights, dropout, chunk_bytes)
    return _chunked(query, key, value, bias, key_bias, scale, query_weights, dropout, chunk_bytes)


def scores_among_rest(scores: Tensor, weights: Tensor) -> Tensor:
    r"""Scores relative to the mean of the tokens that may leave, the most attended one of them left out.

    .. math:: \tilde s_i = \frac{s_i}{\bar s}, \quad
        \bar s = \frac{\sum_{i \ne j} w_i s_i}{\sum_{i \ne j} w_i}, \quad j = \arg\max_i w_i s_i

    Deep layers give much of their attention to the first token and to a separator, in one example more than in another.
    What is left for all others varies with that, so that one threshold on the scores would take most tokens of one
    example and none of the next; these scores do not have it in them.

    Args:
        scores: (batch, tokens), at least 0.
        weights: :math:`w`, (batch, tokens), from 0 to 1: 0 for padding, protected tokens and those that have left.

    Returns:
        (batch, tokens). Rows in which no token may leave have their scores; in rows with one such token it has 1.

    Raises:
        ValueError: for tensors of different shapes.
    """
    _check("weights like the scores", weights, tuple(scores.shape))
    if not scores.shape[1]:
        return scores
    weights = weights.to(scores.dtype)
    received = weights * scores
    largest = received.detach().argmax(1, keepdim=True)
    total, count = received.sum(1, keepdim=True), weights.sum(1, keepdim=True)
    rest, number = total - received.gather(1, largest), count - weights.gather(1, largest)
    alone = number < 0.5
    rest, number = torch.where(alone, total, rest), torch.where(alone, count, number)
    tiny = torch.finfo(scores.dtype).tiny
    mean = torch.where(number > 0, rest / number.clamp(min=tiny), 1.0)
    return scores / mean.clamp(min=tiny)


def soft_mask(scores: Tensor, threshold: Tensor | float, temperature: float) -> Tensor:
    r"""How much of each token stays while thresholds are learned.

    .. math:: M_i = \sigma\left(\frac{s_i - \theta}{T}\right)

    Args:
        scores: any shape.
        threshold: broadcastable to it; gets a gradient.
        temperature: positive; near 0 the mask is a step.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"Expected a positive temperature, but got {temperature}.")
    return torch.sigmoid((scores - threshold) / temperature)


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """A mask whose values are exactly those of ``hard``, with the gradient of ``soft``; both of one shape."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def to_padded_scale(threshold: Scale, length: int) -> Scale:
    r"""A threshold for scores of mean 1 on the scale of the paper: :math:`\tilde\theta / S` at padded length S."""
    return threshold / _positive("padded length", length)


def from_padded_scale(threshold: Scale, length: int) -> Scale:
    r"""A threshold of the paper for scores of mean 1: :math:`S \theta` at padded length S."""
    return threshold * _positive("padded length", length)


def linear_ramp(final: float, layers: int) -> tuple[float, ...]:
    r"""The first thresholds, :math:`\theta_l = \theta_{\text{final}} \, l / L` for layers :math:`l = 0 \dots L - 1`.

    As the authors run it: the first layer prunes nothing, and the last one does not quite reach the final value.

    Raises:
        ValueError: for no layers.

    >>> linear_ramp(1.28, 4)
    (0.0, 0.32, 0.64, 0.96)
    """
    _positive("number of layers", layers)
    return tuple(final * layer / layers for layer in range(layers))


def _positive(what: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"Expected a {what} of at least 1, but got {number}.")
    return number


def _check(what: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"Expected {what}, {shape}, but got {tuple(tensor.shape)}.")


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    query_weights: Tensor | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The bias with four dims, after all shapes were checked."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(
                f"Expected {name} of shape (batch, heads, tokens, dims), but got {tuple(tensor.shape)}: give a single "
                "example a batch dim of 1."
            )
    batch, heads, queries, dims = query.shape
    keys = key.shape[2]
    for name, tensor in (("key", key), ("value", value)):
        if tensor is None:
            continue
        shared = tensor.shape[1]
        if shared != heads and not (enable_gqa and shared and heads % shared == 0):
            raise ValueError(
                f"Expected {name} of {heads} heads as the query has{', or a divisor' if enable_gqa else ''}, but got "
                f"{shared}{'' if enable_gqa else ': grouped queries need enable_gqa=True'}."
            )
        last = dims if tensor is key else tensor.shape[3]
        _check(f"{name} of shape (batch, heads, keys, dims)", tensor, (batch, shared, keys, last))
    _check("a key bias of shape (batch, keys)", key_bias, (batch, keys))
    _check("query weights of shape (batch, queries)", query_weights, (batch, queries))
    if bias is None:
        return None
    full = (batch, heads, queries, keys)
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, full, strict=True)):
        raise ValueError(
            f"Expected a bias that can be broadcast to (batch, heads, queries, keys), {full}, but got "
            f"{tuple(bias.shape)}."
        )
    bias = bias[(None,) * (4 - bias.dim())]
    # masks of keys come expanded to all heads and queries: one of each is enough
    for dim in (1, 2):
        bias = bias.narrow(dim, 0, 1) if bias.shape[dim] > 1 and bias.stride(dim) == 0 else bias
    return bias


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: sums over many queries in half precision would lose what thresholds are compared with."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: floating point, but not double precision."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _received(probabilities: Tensor, weights: Tensor | None) -> Tensor:
    """Scores, (batch, keys); weights (batch, 1 or heads, queries)."""
    batch, heads, queries, keys = probabilities.shape
    if not heads * queries:
        return probabilities.new_zeros(batch, keys)
    if weights is None:
        return probabilities.flatten(1, 2).sum(1) / heads
    weights = weights.to(probabilities.dtype)
    if weights.shape[1] == 1:
        return (weights @ probabilities.mean(1)).squeeze(1)
    return (weights[:, :, None] @ probabilities).mean(1).squeeze(1)


def _windows(query: Tensor, keys: int, chunk_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of examples and queries that cover everything, with at most ``chunk_bytes`` of probabilities each."""
    batch, heads, queries, _ = query.shape
    row = max(1, heads * keys * max(4, query.element_size()))
    examples = max(1, chunk_bytes // max(1, row * queries))
    length = max(1, queries) if row * queries <= chunk_bytes else max(1, chunk_bytes // row)
    for first in range(0, max(1, batch), examples):
        for start in range(0, max(1, queries), length):
            yield slice(first, min(batch, first + examples)), slice(start, min(queries, start + length))


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float | None,
    query_weights: Tensor | None,
    dropout: float,
    chunk_bytes: int | None,
) -> tuple[Tensor | None, Tensor]:
    scale = 1 / sqrt(max(1, query.shape[3])) if scale is None else scale
    inputs = (query, key, value, bias, key_bias, query_weights)
    again = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if chunk_bytes is None:
        chunk_bytes = CACHED_BYTES if query.device.type == "cpu" and not again else CHUNK_BYTES
    windows = list(_windows(query, key.shape[2], chunk_bytes))
    if len(windows) == 1:
        return _one_chunk(*inputs, scale, dropout)
    outputs: dict[int, list[Tensor]] = {}
    scores: dict[int, Tensor] = {}
    for examples, rows in windows:
        part = (
            query[examples, :, rows],
            key[examples],
            None if value is None else value[examples],
            None if bias is None else _part(bias, examples, rows),
            None if key_bias is None else key_bias[examples],
            None if query_weights is None else query_weights[examples, rows],
            scale,
            dropout,
        )
        if again:
            output, received = checkpoint(_one_chunk, *part, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            output, received = _one_chunk(*part)
        outputs.setdefault(examples.start, []).append(output)
        scores[examples.start] = scores[examples.start] + received if examples.start in scores else received
    all_scores = torch.cat(list(scores.values()))
    if value is None:
        return None, all_scores
    columns = [torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in outputs.values()]
    return torch.cat(columns) if len(columns) > 1 else columns[0], all_scores


def _part(bias: Tensor, examples: slice, rows: slice) -> Tensor:
    bias = bias[examples] if bias.shape[0] != 1 else bias
    return bias[:, :, rows] if bias.shape[2] != 1 else bias


def _one_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    weights: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor | None, Tensor]:
    dtype, heads = query.dtype, query.shape[1]
    sizes = query.shape[:3]
    rows, columns = _by_head(query, heads), _by_head(key, heads)
    logits = torch.baddbmm(rows.new_empty(1, 1, 1), rows, columns.transpose(1, 2), beta=0, alpha=scale)
    logits = logits.view(*sizes, key.shape[2])
    added, masked = _combined(bias, key_bias, logits)
    if added is not None:
        logits += added
    probabilities = torch.softmax(logits, -1)
    weights = None if weights is None else weights[:, None]
    if masked is not None:
        there = (~masked.squeeze(3)).to(logits.dtype).expand(query.shape[0], -1, query.shape[2])
        weights = there if weights is None else there * weights.to(there.dtype)
    scores = _received(probabilities, weights)
    if value is None:
        return None, scores
    mixed = F.dropout(probabilities, dropout) if dropout else probabilities
    output = torch.bmm(mixed.flatten(0, 1), _by_head(value, heads)).view(*sizes, value.shape[3])
    if masked is not None:
        output = output.masked_fill(masked, 0)
    return output.to(dtype), scores


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """(batch * heads, tokens, dims), in one piece: products of matrices would copy it twice."""
    return _repeated(_wide(tensor), heads).flatten(0, 1)


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _combined(bias: Tensor | None, key_bias: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """All that is added to the logits, and which queries have no key left; zeros there, for a softmax without NaN."""
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros((), dtype=like.dtype, device=like.device).where(bias, -inf)
    elif bias is not None:
        bias = bias.to(like.dtype)
    if key_bias is not None:
        row = key_bias.to(like.dtype)[:, None, None]
        bias = row if bias is None else bias + row
    if bias is None or not bias.shape[3]:
        return None, None
    masked = bias.detach().amax(-1, keepdim=True) == -inf
    if like.device.type == "cpu" and type(like) is Tensor and not torch.compiler.is_compiling() and not masked.any():
        return bias, None  # hardly ever is a query without a key, and a look at the values costs nothing here
    return bias.masked_fill(masked, 0), masked


__all__ = [
    "attention_with_scores",
    "from_padded_scale",
    "linear_ramp",
    "scores_among_rest",
    "scores_of_probabilities",
    "soft_mask",
    "straight_through",
    "to_padded_scale",
]
