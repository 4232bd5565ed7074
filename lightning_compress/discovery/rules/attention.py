"""Attention in one fused kernel, which a model may ask for by name."""

from __future__ import annotations

from torch import Tensor

from lightning_compress.discovery import axes
from lightning_compress.discovery.rules.contraction import contract
from lightning_compress.discovery.rules.registry import Call, Dims, NoRule, rule


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def fused_attention(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """softmax(q k^T + mask) v: two contractions, and rows of scores whose positions depend on each other."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    if query.shape[:-2] != key.shape[:-2]:  # groups of queries that share keys inside the kernel
        raise NoRule
    *batch, places, dim = trace.dims(key)
    scores = contract(trace, query, key, trace.dims(query), [*batch, dim, places])
    for name in ("attn_mask", "attn_bias"):
        mask = call.named.get(name)
        if isinstance(mask, Tensor):
            for axis, other in zip(scores[::-1], trace.dims(mask)[::-1], strict=False):
                axes.unify(axis, other)
    trace.pin_if_used(call, scores[-1], "its positions depend on each other in softmax")
    mixed = contract(trace, query, value, scores, trace.dims(value))
    others = [trace.pinned(output, "it belongs to the statistics of attention") for output in call.outputs[1:]]
    return [mixed, *others]
