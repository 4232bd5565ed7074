"""Quantization of models: quantizers on weights and activations, and what they become."""

from lightning_compress.quantization.activations import (
    ActivationQuantizer,
    DynamicRange,
    InputState,
    LearnedRange,
    ObservedRange,
)
from lightning_compress.quantization.conversion import ConversionReport
from lightning_compress.quantization.convert import BACKENDS, convert
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization.inputs import (
    InputQuantizer,
    attach_input_quantizers,
    detach_input_quantizers,
    input_quantizers,
)
from lightning_compress.quantization.kernels import packed_weights, plain_class
from lightning_compress.quantization.packed import PackedForm, PackedWeight
from lightning_compress.quantization.precision import PrecisionSearch, search_precision
from lightning_compress.quantization.selection import (
    WEIGHT_KINDS,
    activation_named,
    select_inputs,
    select_weights,
    weight_kinds,
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
    "BACKENDS",
    "WEIGHT_KINDS",
    "ActivationQuantizer",
    "ConversionReport",
    "DynamicRange",
    "InputQuantizer",
    "InputState",
    "LearnedRange",
    "ObservedRange",
    "PackedForm",
    "PackedWeight",
    "PrecisionSearch",
    "QuantizationError",
    "Suspended",
    "WeightQuantizer",
    "activation_named",
    "attach_input_quantizers",
    "attach_quantizers",
    "convert",
    "detach_input_quantizers",
    "detach_quantizers",
    "holders_of",
    "input_quantizers",
    "packed_weights",
    "plain_class",
    "search_precision",
    "select_inputs",
    "select_weights",
    "suspended",
    "weight_kinds",
    "weight_quantizers",
]
