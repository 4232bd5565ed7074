"""``nn.MultiheadAttention`` with independent numbers of heads, query/key dims and value/output dims.

The original derives one width per head, embed_dim / num_heads, for queries, keys and values alike, and asserts it in
its forward pass. Removal of heads or of dims breaks that, so an attention is first converted, in place, to a subclass
that reads three counts instead:

    num_heads H, qk_head_dim Dq, vo_head_dim Dv

                     columns: embed_dim                                      columns: H * Dv
    in_proj_weight   +----------------------+               out_proj.weight  +------+------+-----+
     (or q_proj_     | Q  head 0: Dq rows   |                 embed_dim      | head | head | ... |
      weight, ...)   |    head 1: Dq rows   |                 rows           |  0   |  1   |     |
                     +----------------------+                                +------+------+-----+
                     | K  as Q              |
                     +----------------------+               in_proj_bias: as the rows of in_proj_weight
                     | V  head 0: Dv rows   |               bias_k (1, 1, H * Dq), bias_v (1, 1, H * Dv)
                     |    head 1: Dv rows   |
                     +----------------------+

Before anything is removed Dq = Dv = embed_dim / H, which is the layout of the original: no tensor moves on conversion.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads have their own query/key width and value/output width.

        head_h = softmax(scale * Q_h K_h^T + mask) V_h,    output = concat_h(head_h) W_O^T + b_O

    with Q_h, K_h of width ``qk_head_dim`` and V_h of width ``vo_head_dim``. ``scale`` stays what it was when the
    attention was built, 1 / sqrt(embed_dim / num_heads), however many dims are left: the removal of a dim that adds
    nothing to the logits must not change them.

    An instance is made from an existing ``nn.MultiheadAttention`` by :func:`slim_`, never constructed. Its parameters
    keep their identity, names and packed layout, so optimizers and state dicts stay valid. Masks, ``is_causal``,
    ``need_weights``, layouts, dropout and autocast mean what they mean in ``nn.MultiheadAttention``; a 3-D
    ``attn_mask`` has ``batch * num_heads`` entries with the number of heads that are left. Targets that may attend to
    nothing get zeros before the output projection, or NaN with ``need_weights``, as in the original outside of its
    fused inference kernel.

    Attributes:
        num_heads: number of heads H.
        qk_head_dim: width of a head's queries and keys.
        vo_head_dim: width of a head's values and of its part of the output projection's input.
        scale: factor on the logits.
        embed_dim: width of the queries that come in and of the output; as before.
        head_dim: width of a head before any removal; kept for the way back, see :func:`unslim_`.
    """

    qk_head_dim: int
    vo_head_dim: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "SlimMultiheadAttention is not constructed: build an nn.MultiheadAttention and convert it with "
            "slim_(attention)."
        )

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer asks this before it hands the packed weights to a fused kernel that derives the
        # widths from embed_dim and num_heads. "No" keeps it out. The truth stays in the instance's __dict__, where
        # copies, pickles and the way back find it: a property precedes the __dict__.
        return False

    def extra_repr(self) -> str:
        """The counts; shown in front of the output projection."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, qk_head_dim={self.qk_head_dim}, "
            f"vo_head_dim={self.vo_head_dim}, batch_first={self.batch_first}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of ``nn.MultiheadAttention.forward``.

        Args:
            query: (batch, targets, embed_dim) with ``batch_first``, else (targets, batch, embed_dim);
                unbatched (targets, embed_dim).
            key: the same with sources in place of targets and ``kdim`` features.
            value: the same with ``vdim`` features.
            key_padding_mask: (batch, sources), unbatched (sources,); True hides, floats are added to the logits.
            need_weights: whether to return the weights, too; without them fused attention kernels can be used.
            attn_mask: (targets, sources) or (batch * num_heads, targets, sources); True hides, floats are added.
            average_attn_weights: whether the returned weights are averaged over the heads.
            is_causal: hint that ``attn_mask`` is the causal mask.

        Returns:
            The output in the layout of ``query``; and None or the weights, (batch, targets, sources) or, not
            averaged, (batch, num_heads, targets, sources), without the batch axis for unbatched inputs.

        Raises:
            ValueError: a shape or a dtype does not fit, or ``is_causal`` comes without a mask.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if not query is key is value or not key_padding_mask is attn_mask is None or not self.batch_first:
                raise ValueError(
                    "Expected nested tensors only in self-attention (query, key and value the same object) without "
                    "masks and with batch_first=True. Pad them with torch.nested.to_padded_tensor and pass a "
                    "key_padding_mask."
                )
            return self._attend_nested(query, need_weights, average_attn_weights)

        batched = query.dim() == 3
        self._check_inputs(query, key, value)
        q, k, v = (self._batch_first(features, batched) for features in self._project(query, key, value))
        # q, k (batch, targets or sources, heads * qk_head_dim), v (batch, sources, heads * vo_head_dim)

        if is_causal and attn_mask is None:
            raise ValueError(
                "Expected attn_mask together with is_causal=True, which is a hint that the mask is causal, got None. "
                "Pass nn.Transformer.generate_square_subsequent_mask(targets)."
            )
        # The hint stands in for the mask where nothing has to be merged into it.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if not causal:
            mask = self._additive_mask(attn_mask, key_padding_mask, query, batched, q.shape[0], q.shape[1], k.shape[1])

        if self.bias_k is not None and self.bias_v is not None:  # one learned source more
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        q = q.unflatten(-1, (self.num_heads, self.qk_head_dim)).transpose(1, 2)  # (batch, heads, targets, qk_head_dim)
        k = k.unflatten(-1, (self.num_heads, self.qk_head_dim)).transpose(1, 2)  # (batch, heads, sources, qk_head_dim)
        v = v.unflatten(-1, (self.num_heads, self.vo_head_dim)).transpose(1, 2)  # (batch, heads, sources, vo_head_dim)
        if self.add_zero_attn:  # and one of zeros
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q * self.scale) @ k.transpose(-2, -1)  # (batch, heads, targets, sources)
            weights = torch.softmax(logits if mask is None else logits + mask.to(logits.dtype), dim=-1)
            if dropout > 0.0:
                weights = F.dropout(weights, dropout)
            attended = weights @ v
        else:
            if q.device.type == "cpu" and (torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()):
                # The fused CPU kernel wants equal widths, and zeros are cheaper than the several times slower fallback.
                width = max(self.qk_head_dim, self.vo_head_dim)
                q, k, v = _widen(q, width), _widen(k, width), _widen(v, width)
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
            attended = attended[..., : self.vo_head_dim]
        # attended (batch, heads, targets, vo_head_dim)

        output = F.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return output, weights

    def _attend_nested(
        self, nested: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Pad, attend, nest: nn.TransformerEncoder makes a nested tensor of a padded batch in inference."""
        lengths = [sequence.shape[0] for sequence in nested.unbind()]
        padded = torch.nested.to_padded_tensor(nested, 0.0)  # (batch, longest, embed_dim)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device).unsqueeze(1)  # (batch, longest)
        output, weights = self.forward(padded, padded, padded, padding, need_weights, None, average_attn_weights)
        if weights is not None:  # (batch, longest, longest) or (batch, heads, longest, longest)
            hidden = padding if average_attn_weights else padding.unsqueeze(1)
            weights = weights.masked_fill(hidden.unsqueeze(-1), 0.0)
        sequences = [sequence[:length] for sequence, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(sequences, layout=nested.layout), weights

    def _batch_first(self, features: Tensor, batched: bool) -> Tensor:
        if not batched:
            return features.unsqueeze(0)
        return features if self.batch_first else features.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in the layout of the inputs; inputs that are one object share one matrix product."""
        qk, vo = self.num_heads * self.qk_head_dim, self.num_heads * self.vo_head_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = F.linear(query, weight, bias).split((qk, qk, vo), dim=-1)
            return q, k, v
        q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.split((qk, qk, vo))
        if weight is not None and key is value:
            q_weight, kv_weight = weight.split((qk, qk + vo))
            kv_bias = None if bias is None else bias[qk:]
            k, v = F.linear(key, kv_weight, kv_bias).split((qk, vo), dim=-1)
            return F.linear(query, q_weight, q_bias), k, v
        if weight is not None:
            q_weight, k_weight, v_weight = weight.split((qk, qk, vo))
        else:
            q_weight, k_weight, v_weight = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.dim() not in (2, 3):
            raise ValueError(f"Expected query to be 3-D, or 2-D for unbatched inputs, got {_shape(query)}.")
        weights = [self.in_proj_weight] * 3
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        for name, tensor, weight in zip(("query", "key", "value"), (query, key, value), weights, strict=True):
            if tensor.dim() != query.dim():
                raise ValueError(f"Expected {name} to be {query.dim()}-D as query is, got {_shape(tensor)}.")
            if tensor.shape[-1] != weight.shape[1]:
                raise ValueError(f"Expected {weight.shape[1]} features in {name}, got {_shape(tensor)}.")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"Expected key and value to be equally long, got {_shape(key)} and {_shape(value)}.")
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"Expected query and key to agree in the batch axis {batch}, got {_shape(query)} and {_shape(key)} "
                f"with batch_first={self.batch_first}."
            )

    def _additive_mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        query: Tensor,
        batched: bool,
        batch: int,
        targets: int,
        sources: int,
    ) -> Tensor | None:
        """Both masks as one term of the logits; broadcasts to (batch, heads, targets, sources with those added)."""
        merged = None
        if attn_mask is not None:
            flat, per_head = (targets, sources), (batch * self.num_heads, targets, sources)
            if attn_mask.shape not in (flat, per_head):
                raise ValueError(
                    f"Expected attn_mask of shape {flat} or {per_head} (batch * num_heads, targets, sources) "
                    f"with num_heads={self.num_heads}, got {_shape(attn_mask)}."
                )
            merged = _additive(attn_mask, "attn_mask", query.dtype)
            merged = merged if attn_mask.dim() == 2 else merged.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None:
            expected = (batch, sources) if batched else (sources,)
            if key_padding_mask.shape != expected:
                raise ValueError(f"Expected key_padding_mask of shape {expected}, got {_shape(key_padding_mask)}.")
            padding = _additive(key_padding_mask, "key_padding_mask", query.dtype).view(batch, 1, 1, sources)
            merged = padding if merged is None else merged + padding
        added = int(self.bias_k is not None) + int(self.add_zero_attn)  # always visible
        return F.pad(merged, (0, added)) if merged is not None and added else merged


def slim_(attention: nn.MultiheadAttention) -> None:
    """Convert an ``nn.MultiheadAttention`` in place to :class:`SlimMultiheadAttention`; it computes what it computed.

    Slice the parameters afterwards as you like and declare the new counts with :func:`resize`. An attention that is
    slim already is left alone.

    Args:
        attention: the attention; every Parameter object, its name and its layout stay.

    Raises:
        TypeError: ``attention`` is not exactly an ``nn.MultiheadAttention``: a subclass has a forward pass of its own.
        ValueError: its parameters do not have the shapes that ``num_heads`` and ``embed_dim`` say.
    """
    if type(attention) is SlimMultiheadAttention:
        return
    if type(attention) is not nn.MultiheadAttention:
        _refuse_type(attention, "nn.MultiheadAttention")
    width = attention.embed_dim // attention.num_heads
    _check_sizes(attention, attention.num_heads, width, width)
    slim = cast(SlimMultiheadAttention, attention)
    slim.__class__ = SlimMultiheadAttention
    slim.qk_head_dim = slim.vo_head_dim = width
    slim.scale = 1.0 / math.sqrt(width)


def unslim_(attention: nn.MultiheadAttention) -> None:
    """Undo :func:`slim_`, and every :func:`resize` since, exactly; to roll back, after the tensors were put back.

    Args:
        attention: a slim attention whose parameters have the shapes again that they had before the conversion.

    Raises:
        TypeError: ``attention`` is not slim.
        ValueError: its parameters do not have their original shapes.
    """
    if type(attention) is not SlimMultiheadAttention:
        _refuse_type(attention, "SlimMultiheadAttention")
    heads, width = attention.embed_dim // attention.head_dim, attention.head_dim
    resize(attention, heads, width, width)
    del attention.qk_head_dim, attention.vo_head_dim, attention.scale
    cast(nn.MultiheadAttention, attention).__class__ = nn.MultiheadAttention


def resize(
    attention: nn.MultiheadAttention,
    heads: int | None = None,
    qk_head_dim: int | None = None,
    vo_head_dim: int | None = None,
) -> None:
    """Declare the counts of a slim attention after its parameters were sliced; counts that are None stay.

    Args:
        attention: an attention converted by :func:`slim_`.
        heads: number of heads.
        qk_head_dim: query/key dims of every head.
        vo_head_dim: value/output dims of every head.

    Raises:
        TypeError: ``attention`` is not slim.
        ValueError: a count is below one, or the parameters do not have the shapes that the counts say; nothing is
            changed then.
    """
    if type(attention) is not SlimMultiheadAttention:
        _refuse_type(attention, "SlimMultiheadAttention")
    heads = attention.num_heads if heads is None else heads
    qk_head_dim = attention.qk_head_dim if qk_head_dim is None else qk_head_dim
    vo_head_dim = attention.vo_head_dim if vo_head_dim is None else vo_head_dim
    _check_sizes(attention, heads, qk_head_dim, vo_head_dim)
    attention.num_heads, attention.qk_head_dim, attention.vo_head_dim = heads, qk_head_dim, vo_head_dim
    attention.out_proj.in_features = heads * vo_head_dim


def sizes(
    attention: nn.MultiheadAttention, heads: int, qk_head_dim: int, vo_head_dim: int
) -> dict[str, tuple[int, int]]:
    """For every parameter of ``attention`` the axis on which heads and dims lie, and its length at the given counts.

    On that axis dim ``d`` of head ``h`` is at ``h * width + d``; the packed in-projections hold Q, K and V one after
    the other.

    Returns:
        Parameter name -> (axis, length).
    """
    qk, vo = heads * qk_head_dim, heads * vo_head_dim
    layout = {
        "in_proj_weight": (0, qk + qk + vo),
        "q_proj_weight": (0, qk),
        "k_proj_weight": (0, qk),
        "v_proj_weight": (0, vo),
        "in_proj_bias": (0, qk + qk + vo),
        "bias_k": (2, qk),
        "bias_v": (2, vo),
        "out_proj.weight": (1, vo),
    }
    present = dict(attention.named_parameters())
    return {name: place for name, place in layout.items() if name in present}


def _check_sizes(attention: nn.MultiheadAttention, heads: int, qk_head_dim: int, vo_head_dim: int) -> None:
    counts = {"heads": heads, "qk_head_dim": qk_head_dim, "vo_head_dim": vo_head_dim}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected {name} >= 1, got {count}.")
    stated = ", ".join(f"{name}={count}" for name, count in counts.items())
    for name, (axis, expected) in sizes(attention, **counts).items():
        shape = tuple(attention.get_parameter(name).shape)
        if shape[axis] != expected:
            raise ValueError(
                f"Expected {name} of length {expected} on axis {axis} for {stated}, got shape {shape}. "
                "Slice every parameter of the attention before its counts are set."
            )


def _additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A mask as a term of the logits: True becomes -inf and False 0; floats are one already."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"Expected {name} to be boolean or floating point, got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _widen(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the last axis up to ``width``."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _refuse_type(attention: nn.Module, expected: str) -> NoReturn:
    raise TypeError(
        f"Expected {expected} itself, not a subclass, got {type(attention).__module__}.{type(attention).__qualname__}."
    )
