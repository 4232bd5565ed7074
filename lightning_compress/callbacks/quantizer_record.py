"""What a checkpoint knows of quantizers, and how a module takes them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.quantization import WeightQuantizer, attach_quantizers, detach_quantizers, weight_quantizers
from lightning_compress.quantization.record import quantizer_from, quantizer_state

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


def quantizers_in(checkpoint: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What a checkpoint tells of quantizers: names of modules and what ``attach_state`` takes."""
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(OWNER)]
    return [(state["module"], state["quantizers"]) for state in states if state.get("quantizers") is not None]


__all__ = ["attach_state", "quantizers_in", "quantizers_state"]
