"""A converted model as a graph for other runtimes: weights stay integers, products of integers are one operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.quantization.activations import DynamicRange, LearnedRange, ObservedRange
from lightning_compress.quantization.inputs import INPUT, InputQuantizer
from lightning_compress.quantization.kernels import GRAPH, packed_of, weight_obstacle
from lightning_compress.quantization.operators import int8_linear_dynamic, int8_linear_static


@contextmanager
def as_graph(model: nn.Module) -> Iterator[None]:
    """Under it a converted model in evaluation mode calls the operators of ``operators``.

    Modules have buffers with the integers for the time, one byte each, whatever backend the model was converted to.
    Linear layers whose weights are int8 around 0, and whose inputs have eight bits, are products of integers; all other
    weights are integers that are multiplied by their scales.
    """
    added: list[tuple[nn.Module, str]] = []
    changed: list[tuple[nn.Module, InputQuantizer, bool]] = []

    def add(module: nn.Module, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor, persistent=False)
            added.append((module, name))

    try:
        for module in list(model.modules()):
            for key, packed in packed_of(module).items():
                if packed.owner is module:
                    # those of a product too: a second holder may read what the first multiplies
                    packed.in_graph = True
                    add(module, **{GRAPH + key: packed.quantized().integers})
            quantizing: InputQuantizer | None = vars(module).get(INPUT)
            if quantizing is None or graph_obstacle(module) is not None:
                continue
            packed = packed_of(module)["weight"]
            scale = packed.buffer("scale").reshape(-1).expand(packed.form.shape[0])
            add(module, int8_weight=packed.quantized().integers.t().contiguous(), int8_scale=scale.contiguous())
            grid = quantizing.quantizer.fixed_grid(quantizing.state)
            if grid is not None:
                add(module, int8_step=grid[0], int8_zero=grid[1])
            changed.append((module, quantizing, quantizing.in_kernel))
            quantizing.in_kernel = True
            module.forward = partial(_product, module)
        yield
    finally:
        for module, quantizing, before in changed:
            quantizing.in_kernel = before
            vars(module).pop("forward", None)
        for module, name in added:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)
        for module in model.modules():
            for packed in packed_of(module).values():
                packed.in_graph = False


def graph_obstacle(module: nn.Module) -> str | None:
    """Why a module with quantized inputs is no product of integers in a graph; None if it is."""
    packed, quantizing = packed_of(module).get("weight"), vars(module)[INPUT]
    if packed is None:
        return "its weight is not packed"
    quantizer = quantizing.quantizer
    if not quantizing.enabled or not isinstance(quantizer, DynamicRange | ObservedRange | LearnedRange):
        return "its inputs are not quantized"
    if quantizer.bits != 8:
        return f"its inputs have {quantizer.bits} bits, not 8"
    if not quantizer.is_ready(quantizing.state):
        return "the range of its inputs is not known"
    return weight_obstacle(module, "weight", packed.form)


def _product(module: nn.Module, input: Tensor) -> Tensor:
    quantizer = vars(module)[INPUT].quantizer
    weight, scale, bias = module.int8_weight, module.int8_scale, module.bias
    if isinstance(quantizer, DynamicRange):
        return int8_linear_dynamic(input, weight, scale, bias, quantizer.steps(torch.device("cpu")))
    return int8_linear_static(input, weight, scale, bias, module.int8_step, module.int8_zero)


__all__ = ["as_graph", "graph_obstacle"]
