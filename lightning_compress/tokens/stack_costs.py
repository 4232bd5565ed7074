"""The costs of the layers of a stack, counted in the layers themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.discovery.tracer import evaluation
from lightning_compress.tokens.arguments import tensors_in, with_tensors
from lightning_compress.tokens.costs import LayerCosts, counted, fit_costs
from lightning_compress.tokens.gathering import gather_dims
from lightning_compress.tokens.stack import LayerCall, TokenStack, TokenTail, record_calls, token_dims

LENGTHS = (4, 6, 9, 13)


def stack_costs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], stack: TokenStack) -> LayerCosts:
    """What each call of ``stack`` costs, from calls of its layers with the example's tokens, fewer or repeated.

    Args:
        model: the model that the stack was found in; its training flags and random state are left as they were.
        args: positional arguments of the example.
        kwargs: keyword arguments of the example.
        stack: the stack.

    Raises:
        ValueError: if the costs of a layer are no quadratic polynomial in the number of tokens.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), evaluation(model):
        calls = [call for call in record_calls(model, tuple(args), kwargs) if call.name in stack.layers]
        known: dict[str, LayerCosts] = {}
        for call in calls:
            if call.name not in known:
                known[call.name] = _costs(model.get_submodule(call.name), call, stack)
    return LayerCosts.joined(known[name] for name in stack.layers)


def _costs(layer: nn.Module, call: LayerCall, stack: TokenStack) -> LayerCosts:
    hidden = next(value for path, value in tensors_in(call.args, call.kwargs) if path == stack.state)
    batch, tokens = hidden.shape[:2]

    def run(length: int) -> int:
        index = (torch.arange(length, device=hidden.device) % tokens).expand(batch, length)

        def visit(path: str, value: Tensor) -> Tensor:
            dims = (1 - value.dim(),) if path == stack.state else stack.dims.get(path)
            dims = token_dims(value, batch, tokens) if dims is None else dims
            dims = tuple(d % value.dim() for d in dims if -d <= value.dim() and value.shape[d] == tokens)
            return gather_dims(value, dims, index) if dims else value

        args, kwargs = with_tensors(call.args, call.kwargs, visit)
        with counted() as macs, _noting(layer, stack.tail, macs) as noted:
            layer(*args, **kwargs)
            in_tail[length] = (noted[-1] - noted[0]) // batch if noted else 0
            return macs() // batch

    in_tail: dict[int, int] = {}
    costs = fit_costs(run, LENGTHS)
    tail = fit_costs(in_tail.__getitem__, LENGTHS) if any(in_tail.values()) else None
    if tail is None or any(tail.a) or any(tail.c):
        return costs
    return replace(costs, tail=tail.b)


@contextmanager
def _noting(layer: nn.Module, tail: TokenTail | None, macs: Callable[[], int]) -> Iterator[list[int]]:
    """What has been counted when the tail of the layer begins and ends."""
    noted: list[int] = []
    handles = []
    if tail is not None:
        handles = [
            layer.get_submodule(tail.first).register_forward_pre_hook(lambda *_: noted.append(macs())),
            layer.get_submodule(tail.last).register_forward_hook(lambda *_: noted.append(macs())),
        ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["stack_costs"]
