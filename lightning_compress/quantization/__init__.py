"""Quantization of models: quantizers on weights and activations, and what they become."""

from lightning_compress.quantization.errors import QuantizationError
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
    "QuantizationError",
    "Suspended",
    "WeightQuantizer",
    "attach_quantizers",
    "detach_quantizers",
    "holders_of",
    "suspended",
    "weight_quantizers",
]
