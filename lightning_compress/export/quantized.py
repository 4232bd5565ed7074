"""Quantized layers of a converted model in ONNX: integers with their scales, and products of integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lightning_compress.quantization import QuantizationError, input_quantizers, packed_weights, weight_quantizers
from lightning_compress.quantization.operators import NAMESPACE

FLOAT, UINT8, INT8 = 1, 2, 3  # of ONNX
STEPS = 255  # of DynamicQuantizeLinear
TOLERANCE = 5e-2  # where inputs are rounded: one that lies in the middle between two steps may go either way
Form = Literal["integer", "fake"]


def check_quantized(model: nn.Module, precision: str | None) -> bool:
    """Whether anything in a model is quantized.

    Raises:
        QuantizationError: for a model that is prepared and not converted, or another precision than float32.
    """
    prepared = [name for name, quantizing in weight_quantizers(model).items() if quantizing.enabled]
    if prepared:
        raise QuantizationError(
            f"Expected a converted model, but {prepared[0]!r} is a parameter with a quantizer, which would run in each "
            "call of the file. Convert the model first: convert(model, 'unpacked'). For a file in floating point take "
            "them off: detach_quantizers(model)."
        )
    rounded = any(quantizing.enabled for quantizing in input_quantizers(model).values())
    if (rounded or packed_weights(model)) and precision not in (None, "float32"):
        raise QuantizationError(
            f"Expected precision None or 'float32' for a quantized model, but got {precision!r}. What is not quantized "
            "stays float32 in the file; a runtime may compute it in another precision by settings of its own."
        )
    return rounded


def translations(form: Form) -> Mapping[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` writes for the operators of ``quantization.operators``.

    Args:
        form: how a product with inputs of a fixed grid is written: "integer", as ONNX Runtime computes it, or "fake",
            as a product of rounded float32, which OpenVINO recognizes.
    """
    from onnxscript import opset18 as op

    def product(integers: Any, step: Any, zero: Any, weight: Any, scale: Any, bias: Any) -> Any:
        sums = op.Cast(op.MatMulInteger(integers, weight, zero), to=FLOAT)
        return biased(op.Mul(sums, op.Mul(step, scale)), bias)

    def biased(values: Any, bias: Any) -> Any:
        return values if bias is None else op.Add(values, bias)

    def dequantize(integers: Any, scale: Any) -> Any:
        return op.DequantizeLinear(integers, scale, axis=0)

    def dynamic(input: Any, weight: Any, scale: Any, bias: Any, steps: int) -> Any:
        integers, step, zero = op.DynamicQuantizeLinear(input) if steps == STEPS else on_range(input, steps)
        return product(integers, step, zero, weight, scale, bias)

    def on_range(input: Any, steps: int) -> tuple[Any, Any, Any]:
        nothing = op.Constant(value_float=0.0)
        least = op.Min(op.ReduceMin(input, keepdims=0), nothing)
        most = op.Max(op.ReduceMax(input, keepdims=0), nothing)
        width = op.Div(op.Sub(most, least), op.Constant(value_float=float(steps)))
        step = op.Where(op.Equal(width, nothing), op.Constant(value_float=1.0), width)
        zero: Any = op.Cast(op.Round(op.Div(op.Neg(least), step)), to=UINT8)
        return op.QuantizeLinear(input, step, zero), step, zero

    def static(input: Any, weight: Any, scale: Any, bias: Any, step: Any, zero: Any) -> Any:
        if zero.dtype == INT8:  # symmetric: without -128
            end = op.Mul(step, op.Constant(value_float=127.0))
            input = op.Clip(input, op.Neg(end), end)
        integers: Any = op.QuantizeLinear(input, step, zero)
        if form == "integer":
            return product(integers, step, zero, weight, scale, bias)
        values: Any = op.DequantizeLinear(integers, step, zero)
        return biased(op.MatMul(values, op.DequantizeLinear(weight, scale, axis=1)), bias)

    operators = getattr(torch.ops, NAMESPACE)
    return {
        operators.dequantize.default: dequantize,
        operators.int8_linear_dynamic.default: dynamic,
        operators.int8_linear_static.default: static,
    }


__all__ = ["TOLERANCE", "Form", "check_quantized", "translations"]
