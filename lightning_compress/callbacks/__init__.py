"""Thin adapters to Lightning: they decide *when*; what happens is a function elsewhere."""

from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.finalize_compression import FinalizeCompression
from lightning_compress.callbacks.loading import load_from_checkpoint
from lightning_compress.callbacks.one_line import compress
from lightning_compress.callbacks.post_training_compression import PostTrainingCompression
from lightning_compress.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_compress.callbacks.sparsity_maps import SparsityMaps
from lightning_compress.callbacks.structured_sparsity import StructuredSparsity
from lightning_compress.callbacks.token_pruning import TokenPruning

__all__ = [
    "Distillation",
    "FinalizeCompression",
    "PostTrainingCompression",
    "QuantizationAwareTraining",
    "SparsityMaps",
    "StructuredSparsity",
    "TokenPruning",
    "compress",
    "load_from_checkpoint",
]
