"""What a checkpoint knows of quantizers, and how a module takes them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.quantization import (
    InputQuantizer,
    WeightQuantizer,
    attach_input_quantizers,
    attach_quantizers,
    detach_input_quantizers,
    detach_quantizers,
    input_quantizers,
    weight_quantizers,
)
from lightning_compress.quantization.record import activation_from, activation_state, quantizer_from, quantizer_state

OWNER = "QuantizationAwareTraining"


def quantizers_state(model: nn.Module) -> dict[str, Any]:
    """The quantizers on a model as text, numbers and tensors, by names of parameters."""
    return {
        name: {
            "quantizer": quantizer_state(quantizing.quantizer),
            "step": None if quantizing.step is None else quantizing.step.detach().clone(),
            "seed": quantizing.seed,
            "draw": quantizing.draw,
            "calls": quantizing.calls,
        }
        for name, quantizing in weight_quantizers(model).items()
    }


def attach_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, WeightQuantizer]:
    """Put quantizers on a model, in place of those that it may have."""
    detach_quantizers(model)
    chosen = {name: quantizer_from(own["quantizer"], f"quantizers[{name!r}]") for name, own in state.items()}
    attached = attach_quantizers(model, chosen)
    for name, quantizing in attached.items():
        own = state[name]
        if quantizing.step is not None:
            quantizing.step = own["step"].to(quantizing.step).requires_grad_()
        quantizing.seed, quantizing.draw, quantizing.calls = own["seed"], own["draw"], own["calls"]
    return attached


def inputs_state(model: nn.Module) -> dict[str, Any]:
    """The quantizers on inputs of modules as text, numbers and tensors, by paths."""
    return {
        path: {
            "quantizer": activation_state(quantizing.quantizer),
            "range": None if quantizing.state.range is None else quantizing.state.range.clone(),
            "step": None if quantizing.step is None else quantizing.step.detach().clone(),
            "signed": quantizing.state.signed,
            "calls": quantizing.calls,
        }
        for path, quantizing in input_quantizers(model).items()
    }


def attach_inputs_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, InputQuantizer]:
    """Put quantizers on inputs, in place of those that the model may have."""
    detach_input_quantizers(model)
    chosen = {path: activation_from(own["quantizer"], f"inputs[{path!r}]") for path, own in state.items()}
    attached = attach_input_quantizers(model, chosen)
    for path, quantizing in attached.items():
        own, step = state[path], quantizing.step
        quantizing.state.range, quantizing.state.signed = own["range"], own["signed"]
        if step is not None:
            quantizing.state.step = own["step"].to(step).requires_grad_()
        quantizing.calls = own["calls"]
    return attached


def quantizers_in(checkpoint: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What a checkpoint tells of quantizers: names of modules, and what ``attach_all`` takes."""
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(OWNER)]
    return [(state["module"], state) for state in states if state.get("quantizers") is not None]


def attach_all(
    model: nn.Module, state: Mapping[str, Any]
) -> tuple[dict[str, WeightQuantizer], dict[str, InputQuantizer]]:
    """Put the quantizers of weights and of inputs on a model that the state of a callback tells of."""
    return attach_state(model, state["quantizers"]), attach_inputs_state(model, state["inputs"] or {})


__all__ = ["attach_all", "inputs_state", "quantizers_in", "quantizers_state"]
