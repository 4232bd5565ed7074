"""Operators that a trace shows as one node each, so that an exporter translates them as a whole.

A converted model calls them in the place of its kernels while it is exported (``as_graph``). On the CPU they compute
what they stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.quantization.activations import on_range

NAMESPACE = "lightning_compress"


@torch.library.custom_op(f"{NAMESPACE}::int8_linear_dynamic", mutates_args=())
def int8_linear_dynamic(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, steps: int) -> Tensor:
    """Inputs (..., in) on a grid of so many steps over their range, times int8 weights (in, out), scales (out,)."""
    return functional.linear(on_range(input, steps, 255), (weight * scale).t(), bias)


@int8_linear_dynamic.register_fake
def _(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, steps: int) -> Tensor:
    torch._check(input.shape[-1] == weight.shape[0])
    return input.new_empty(*input.shape[:-1], weight.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::int8_linear_static", mutates_args=())
def int8_linear_static(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, step: Tensor, zero: Tensor
) -> Tensor:
    """Inputs (..., in) on a fixed grid, times int8 weights (in, out) with scales (out,).

    ``step``, of no dimensions, is the value of an integer, and ``zero`` the integer of the value 0: of type uint8 for
    the integers from 0 to 255, of type int8 for those from -127 to 127.
    """
    low, high = (0, 255) if zero.dtype == torch.uint8 else (-127, 127)
    middle = zero.to(input.dtype)
    integers = (input / step + middle).round().clamp(low, high)
    return functional.linear((integers - middle) * step, (weight * scale).t(), bias)


@int8_linear_static.register_fake
def _(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, step: Tensor, zero: Tensor) -> Tensor:
    torch._check(input.shape[-1] == weight.shape[0])
    return input.new_empty(*input.shape[:-1], weight.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::dequantize", mutates_args=())
def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """The values of int8 integers (blocks, elements), with a float32 scale for each block, (blocks,)."""
    return integers * scale.unsqueeze(1)


@dequantize.register_fake
def _(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(integers, dtype=scale.dtype)


__all__ = ["NAMESPACE", "dequantize", "int8_linear_dynamic", "int8_linear_static"]
