"""All of it in one line: the callbacks of a fit that makes a model smaller, in the order that works."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.finalize_compression import FinalizeCompression
from lightning_compress.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_compress.callbacks.structured_sparsity import StructuredSparsity
from lightning_compress.callbacks.token_pruning import TokenPruning
from lightning_compress.quantization import ActivationQuantizer
from lightning_compress.quantization.selection import Modules
from lightning_compress.quantizers import Quantizer


def compress(
    macs: float | None = None,
    tokens: float | None = None,
    weights: str | Quantizer | None = None,
    at: float = 0.6,
    modules: Modules = None,
    activations: str | ActivationQuantizer | None = None,
    backend: str | None = None,
    distillation: float = 0.5,
    module: str | None = None,
) -> list[Callback]:
    """Callbacks for one fit: structures are removed, tokens leave and weights are quantized, and the rest recovers.

    Units shrink until ``at``, where they are removed; from there on thresholds of tokens are learned, and the model
    computes with quantized weights. The dense weights teach all along. Each callback is an ordinary one with its
    defaults: look at it, change it, or put another in its place before the list goes to the Trainer.

    Args:
        macs: kept fraction of the multiply-accumulates of what can be removed (`StructuredSparsity`,
            `FinalizeCompression`); None leaves all structures.
        tokens: kept fraction of those of the layers at real lengths (`TokenPruning`); None leaves all tokens.
        weights: quantizer of the weights (`QuantizationAwareTraining`); None leaves them floating point.
        at: fraction of the fit at which units are removed and quantization begins, in (0, 1).
        modules: which weights are quantized, and how; see `QuantizationAwareTraining`.
        activations: quantizer of what these weights are multiplied with, likewise; "int8" for products of integers.
        backend: what the model computes with after the fit, likewise: "auto" replaces weights by their integers and
            keeps what is fastest here.
        distillation: weight of the teacher's outputs in the loss; 0 for none. Without ``macs`` and ``weights`` nothing
            says when a teacher is copied, and there is none.
        module: dotted name of the sub-module that is compressed. Default: found from the first step.

    Raises:
        ValueError: if nothing is asked for, or a value is out of range.

    >>> [type(callback).__name__ for callback in compress(macs=0.5, tokens=0.5, weights="int8")]
    ['StructuredSparsity', 'Distillation', 'FinalizeCompression', 'TokenPruning', 'QuantizationAwareTraining']
    """
    quantized = weights is not None or modules is not None
    if macs is None and tokens is None and not quantized:
        raise ValueError(
            "Expected something to compress, but got neither macs, tokens nor weights. For example: compress(macs=0.5, "
            "weights='int8')."
        )
    if not 0 < at < 1:
        raise ValueError(f"Expected at, the fraction of the fit at which units are removed, to be in (0, 1), got {at}.")
    callbacks: list[Callback] = []
    if macs is not None:
        callbacks.append(StructuredSparsity(module=module))
    if distillation and (macs is not None or quantized):
        callbacks.append(Distillation(alpha=distillation, module=module))
    if macs is not None:
        callbacks.append(FinalizeCompression(macs=macs, at=at, module=module))
    if tokens is not None:
        callbacks.append(TokenPruning(macs=tokens, start=at if macs is None else None, module=module))
    if quantized:
        quantize = QuantizationAwareTraining(
            weights, modules, start=at, activations=activations, backend=backend, module=module
        )
        callbacks.append(quantize)
    return callbacks


__all__ = ["compress"]
