"""Quantizers: pure functions of a weight, with gradients that pass straight through."""

from lightning_compress.quantizers.base import Quantizer, Rounded
from lightning_compress.quantizers.binary import SCALE_FREE_LOGITS, Binary, Ternary
from lightning_compress.quantizers.blocks import Scope
from lightning_compress.quantizers.learned import LearnedStep, learned_step
from lightning_compress.quantizers.names import quantizer_named
from lightning_compress.quantizers.packing import pack, unpack
from lightning_compress.quantizers.quantized import Grid, Quantized, packed_bytes
from lightning_compress.quantizers.stochastic import Stochastic
from lightning_compress.quantizers.uniform import Uniform

__all__ = [
    "SCALE_FREE_LOGITS",
    "Binary",
    "Grid",
    "LearnedStep",
    "Quantized",
    "Quantizer",
    "Rounded",
    "Scope",
    "Stochastic",
    "Ternary",
    "Uniform",
    "learned_step",
    "pack",
    "packed_bytes",
    "quantizer_named",
    "unpack",
]
