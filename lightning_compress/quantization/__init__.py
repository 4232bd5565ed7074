"""Quantization of models: quantizers on weights and activations, and what they become."""

from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization.selection import WEIGHT_KINDS, select_weights, weight_kinds
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
    "WEIGHT_KINDS",
    "QuantizationError",
    "Suspended",
    "WeightQuantizer",
    "attach_quantizers",
    "detach_quantizers",
    "holders_of",
    "select_weights",
    "suspended",
    "weight_kinds",
    "weight_quantizers",
]
