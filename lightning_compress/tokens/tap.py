"""Listening to attention where it is computed: no modeling file is copied, no architecture is known.

Self-attention over n tokens passes through `torch.nn.functional.scaled_dot_product_attention`, or through a softmax
over scores of shape (batch, heads, n, n). A `TorchFunctionMode` sees either call, adds a bias to the keys (tokens that
are pruned, in part or whole, and slots that a repacked row does not fill), and hands out how much attention each token
received.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_compress.token_scores import attention_with_scores, scores_of_probabilities
from lightning_compress.tokens.errors import TokenPruningError

SDPA = F.scaled_dot_product_attention
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
MULTI_HEAD = F.multi_head_attention_forward
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# Below this a number in a mask stands for "not at all": codes that write masks use -1e4, -1e9, the lowest, or infinity.
NEVER = -5e3


@dataclass
class Heard:
    """One self-attention over the tokens.

    Attributes:
        scores: (batch, tokens), the attention that each received; None if it was not asked for.
        real: bool (batch, tokens), tokens that any query may attend to; None if not asked for, or if all are.
        causal: whether no query attends to a later token (only if asked for).
    """

    scores: Tensor | None
    real: Tensor | None = None
    causal: bool = False


class AttentionTap(TorchFunctionMode):
    """Hears the self-attention over ``tokens`` tokens in the calls under it.

    Args:
        batch: number of rows.
        tokens: number of tokens per row.
        key_bias: float (batch, tokens), added to the scores of all queries; None for nothing.
        query_weights: float (batch, tokens), how much each query counts in the scores; None for all alike.
        find_real: whether to find out which tokens are real, and count only their queries.
        wanted: whether scores are wanted.
        inspect: whether to look for causal masks, too (for one look at a model, not for every call).
    """

    def __init__(
        self,
        batch: int,
        tokens: int,
        key_bias: Tensor | None = None,
        query_weights: Tensor | None = None,
        find_real: bool = False,
        wanted: bool = True,
        inspect: bool = False,
    ) -> None:
        super().__init__()
        self.batch, self.tokens = batch, tokens
        self.key_bias, self.query_weights = key_bias, query_weights
        self.find_real, self.wanted, self.inspect = find_real, wanted, inspect
        self.heard: list[Heard] = []
        self.recording = graph_recording()
        self.recomputed = False  # whether the backward will call the attention again
        self.others: list[tuple[int, ...]] = []  # shapes of attention over something else

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self._attention(*args, **kwargs)
        if func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func is MULTI_HEAD:
            return with_inner_attention(self, args, kwargs)
        return func(*args, **kwargs)

    def _is_self_attention(self, rows: int, queries: int, keys: int) -> bool:
        return queries == keys == self.tokens and rows % self.batch == 0

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def plain(mask: Tensor | None) -> Tensor:
            return SDPA(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        if query.dim() != 4 or not self._is_self_attention(query.shape[0], query.shape[-2], key.shape[-2]):
            self.others.append(tuple(query.shape[:-1]))
            return plain(attn_mask)
        if is_causal:
            self._hear(Heard(None, causal=True))
            return plain(attn_mask)
        bias = None if self.key_bias is None else self.key_bias.to(query.dtype)
        real, weights = None, self.query_weights
        if self.find_real and attn_mask is not None:
            real = attended(attn_mask, self.batch, self.tokens)
            weights = None if real is None else real.to(query.dtype)
        if not self.wanted:
            self._hear(Heard(None, real))
            return plain(_with_key_bias(attn_mask, bias, query))
        output, scores = attention_with_scores(
            query,
            key,
            value,
            bias=attn_mask,
            key_bias=bias,
            scale=scale,
            query_weights=weights,
            dropout=dropout_p,
            enable_gqa=enable_gqa,
        )
        assert output is not None
        causal = self.inspect and attn_mask is not None and _causal_mask(attn_mask)
        self._hear(Heard(scores, real, causal))
        return output

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logits = args[0] if args else kwargs["input"]
        if not isinstance(logits, Tensor) or logits.dim() not in (3, 4):
            return func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, logits.dim() - 1) or logits.shape[-1] == 1 != self.tokens:
            return func(*args, **kwargs)
        if not self._is_self_attention(logits.shape[0], *logits.shape[-2:]):
            self.others.append(tuple(logits.shape))
            return func(*args, **kwargs)
        per_row = logits.shape[0] // self.batch  # (batch * heads, n, n) where heads and batch are one dim
        if self.key_bias is not None:
            bias = self.key_bias.to(logits.dtype)
            bias = bias.masked_fill((bias == -torch.inf).all(1, keepdim=True), 0)  # no key is left: NaN otherwise
            bias = bias.repeat_interleave(per_row, 0) if per_row > 1 else bias
            # What the model masks is finite below the bias, so that a query that sees only pruned keys (a pruned one,
            # in a window, or one of an empty row) turns to the keys that are left, as where pruned ones are gone
            logits = logits.clamp(min=torch.finfo(logits.dtype).min / 2)
            logits = logits + (bias[:, None, :] if logits.dim() == 3 else bias[:, None, None, :])
            if args:
                args = (logits, *args[1:])
            else:
                kwargs = {**kwargs, "input": logits}
        probabilities = func(*args, **kwargs)
        if not self.wanted and not self.find_real:
            self._hear(Heard(None))
            return probabilities
        by_head = probabilities.unflatten(0, (self.batch, per_row)) if logits.dim() == 3 else probabilities
        real, weights = None, self.query_weights
        if self.find_real:
            # a key that no query attends to at all is padding
            real = by_head.detach().sum((1, 2)) > 0
            real = real | ~real.any(1, keepdim=True)
            weights = real.to(by_head.dtype)
            if not self.wanted:
                self._hear(Heard(None, real))
                return probabilities
        seen = by_head.detach() > 0
        causal = self.inspect and bool(seen.tril(-1).any()) and not bool(seen.triu(1).any())
        self._hear(Heard(scores_of_probabilities(by_head, weights), real, causal))
        return probabilities

    def _hear(self, heard: Heard) -> None:
        self.heard.append(heard)
        self.recomputed = self.recomputed or graph_recording() != self.recording

    def one(self, name: str) -> Heard:
        """What was heard in the call of the layer ``name``.

        Raises:
            TokenPruningError: if there was not exactly one self-attention over the tokens.
        """
        if len(self.heard) != 1:
            raise TokenPruningError(
                f"Expected one self-attention over the {self.tokens} tokens in the layer {name!r}, but saw "
                f"{len(self.heard)}{f' and attention of shapes {self.others}' if self.others else ''}. Token pruning "
                "needs attention that runs through torch's scaled_dot_product_attention or through a softmax "
                "(attn_implementation='sdpa' or 'eager')."
            )
        heard = self.heard[0]
        if heard.causal:
            raise TokenPruningError(
                f"Expected attention in both directions in the layer {name!r}, but its tokens attend only to earlier "
                "ones: in a decoder every token is an output of its own, and keys and values are kept for tokens to "
                "come. Prune the tokens of encoders."
            )
        return heard


def graph_recording() -> Any:
    """How the graph is recorded here: None for not at all, else the hooks on saved tensors; checkpoints change it."""
    if not torch.is_grad_enabled():
        return None
    return _saved_tensors_hooks(True) or ()


def with_inner_attention(mode: TorchFunctionMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.nn.functional.multi_head_attention_forward`, whose inner calls go through ``mode``, too.

    The function is one call to a mode, and what it calls inside would pass by. So the same code runs with names of its
    own for the attention; nothing is changed where other threads would see it.
    """

    def through(func: Any) -> Any:
        return lambda *inner, **named: mode.__torch_function__(func, (), inner, named)

    names = {
        **vars(F),
        "scaled_dot_product_attention": through(SDPA),
        "softmax": through(F.softmax),
        "has_torch_function": lambda tensors: False,
    }
    function = FunctionType(MULTI_HEAD.__code__, names, MULTI_HEAD.__name__, MULTI_HEAD.__defaults__)
    function.__kwdefaults__ = MULTI_HEAD.__kwdefaults__
    return function(*args, **kwargs)


def attended(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Tokens that any query may attend to, bool (batch, tokens); None if these are all.

    A row whose every key is masked (an empty row) counts as all real: its attention is whatever the kernel makes of it.

    Args:
        mask: bool (True: attend) or float, broadcastable to (batch, heads, tokens, tokens).
        batch: number of rows.
        tokens: number of tokens per row.
    """
    allowed = mask if mask.dtype == torch.bool else mask > NEVER
    while allowed.dim() < 4:
        allowed = allowed.unsqueeze(0)
    real = allowed.any(1).any(1) if allowed.shape[2] > 1 else allowed[:, :, 0].any(1)
    real = real.expand(batch, tokens)
    real = real | ~real.any(1, keepdim=True)
    return None if bool(real.all()) else real


def _with_key_bias(mask: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor | None:
    if bias is None:
        return mask
    bias = bias[:, None, None, :]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.full((), -torch.inf, dtype=like.dtype, device=like.device))
    return mask + bias


def _causal_mask(mask: Tensor) -> bool:
    allowed = mask if mask.dtype == torch.bool else mask > NEVER
    if allowed.dim() < 2 or allowed.shape[-2] != allowed.shape[-1]:
        return False
    return bool(allowed.tril(-1).any()) and not bool(allowed.triu(1).any())


__all__ = [
    "MULTI_HEAD",
    "SDPA",
    "SOFTMAX",
    "AttentionTap",
    "Heard",
    "attended",
    "graph_recording",
    "with_inner_attention",
]
