"""Quantization of models: quantizers on weights and activations, and what they become."""

from lightning_compress.quantization.activations import (
    ActivationQuantizer,
    DynamicRange,
    InputState,
    LearnedRange,
    ObservedRange,
)
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization.inputs import (
    InputQuantizer,
    attach_input_quantizers,
    detach_input_quantizers,
    input_quantizers,
)
from lightning_compress.quantization.weights import (
    Suspended,
    WeightQuantizer,
    attach_quantizers,
    detach_quantizers,
    holders_of,
    suspended,
    weight_quantizers,
)

__all__ = [
    "ActivationQuantizer",
    "DynamicRange",
    "InputQuantizer",
    "InputState",
    "LearnedRange",
    "ObservedRange",
    "QuantizationError",
    "Suspended",
    "WeightQuantizer",
    "attach_input_quantizers",
    "attach_quantizers",
    "detach_input_quantizers",
    "detach_quantizers",
    "holders_of",
    "input_quantizers",
    "suspended",
    "weight_quantizers",
]
