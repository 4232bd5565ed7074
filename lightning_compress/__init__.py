"""Structured compression for PyTorch Lightning: one ``trainer.fit`` from a dense model to a smaller, faster one.

The callbacks are imported when they are first used, so that everything else works without Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_compress.analysis import discover, explain
from lightning_compress.budget import BudgetWarning, kept_fraction, make_plan, select
from lightning_compress.costs import UnitCost, at_lengths, unit_costs
from lightning_compress.distillation_losses import logits_kl, output_mse
from lightning_compress.explanation import Explanation
from lightning_compress.export import (
    CheckpointReport,
    ExportError,
    ExportResult,
    apply_plan_to_checkpoint,
    checkpoint_scores,
    export_model,
)
from lightning_compress.importance import TaylorAccumulator, unit_norms, unit_scores
from lightning_compress.latency import LatencyTable, measure_latency_table
from lightning_compress.plan import PruningPlan
from lightning_compress.polynomials import Polynomial
from lightning_compress.post_training import (
    CalibratedImportance,
    FisherAccumulator,
    LowRankSignificance,
    PostTrainingResult,
    Repair,
    SecondOrder,
    compress_after_training,
    input_moments,
    joint_scores,
    rearranged,
    rearranged_plan,
    repair_readers,
)
from lightning_compress.progress import progress_bars
from lightning_compress.quantization import (
    ConversionReport,
    DynamicRange,
    LearnedRange,
    ObservedRange,
    PrecisionSearch,
    QuantizationError,
    attach_input_quantizers,
    attach_quantizers,
    convert,
    detach_input_quantizers,
    detach_quantizers,
    input_quantizers,
    search_precision,
    select_weights,
    weight_kinds,
    weight_quantizers,
)
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.quantizers import Binary, LearnedStep, Quantizer, Stochastic, Ternary, Uniform
from lightning_compress.regularizers import (
    block_group_lasso,
    group_lasso,
    group_lasso_factors,
    hoyer_square,
    hoyer_square_factors,
    trimmed_group_lasso,
    trimmed_group_lasso_factors,
)
from lightning_compress.report import (
    CompressionReport,
    FitHistory,
    MatrixMap,
    ModelMaps,
    TokenSummary,
    UnitMap,
    count_parameters,
    draw_maps,
    file_size,
    matrix_map,
    measure_latency,
    model_maps,
    save_token_picture,
    token_picture,
    write_html,
)
from lightning_compress.saving import load_compressed, save_compressed
from lightning_compress.structures import EXACT_KINDS, KINDS, Slice, Structure, Structures
from lightning_compress.surgery import SurgeryError, SurgeryReport, apply_plan, silence_units, zero_units
from lightning_compress.token_policies import Thresholds, TopK
from lightning_compress.token_scores import from_padded_scale, to_padded_scale
from lightning_compress.token_switch import tokens_off
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.install import install_tokens, remove_tokens, token_runtime
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.runtime import TokenRuntime
from lightning_compress.unit_groups import UnitGroups
from lightning_compress.vocabulary import trim_tokenizer, used_ids

if TYPE_CHECKING:
    from lightning_compress.callbacks import (
        Distillation,
        FinalizeCompression,
        PostTrainingCompression,
        QuantizationAwareTraining,
        SparsityMaps,
        StructuredSparsity,
        TokenPruning,
        compress,
    )

__version__ = "0.1.0"

_CALLBACKS = (
    "Distillation",
    "FinalizeCompression",
    "PostTrainingCompression",
    "QuantizationAwareTraining",
    "SparsityMaps",
    "StructuredSparsity",
    "TokenPruning",
    "compress",
    "load_from_checkpoint",
)

__all__ = [
    "EXACT_KINDS",
    "KINDS",
    "Binary",
    "BudgetWarning",
    "CalibratedImportance",
    "CheckpointReport",
    "CompressionReport",
    "ConversionReport",
    "Distillation",
    "DynamicRange",
    "Explanation",
    "ExportError",
    "ExportResult",
    "FinalizeCompression",
    "FisherAccumulator",
    "FitHistory",
    "LatencyTable",
    "LearnedRange",
    "LearnedStep",
    "LowRankSignificance",
    "MatrixMap",
    "ModelMaps",
    "ObservedRange",
    "Polynomial",
    "PostTrainingCompression",
    "PostTrainingResult",
    "PrecisionSearch",
    "PruningPlan",
    "QuantizationAwareTraining",
    "QuantizationError",
    "Quantizer",
    "Repair",
    "SecondOrder",
    "Slice",
    "SparsityMaps",
    "Stochastic",
    "Structure",
    "StructuredSparsity",
    "Structures",
    "SurgeryError",
    "SurgeryReport",
    "TaylorAccumulator",
    "Ternary",
    "Thresholds",
    "TokenPruning",
    "TokenPruningError",
    "TokenRuntime",
    "TokenSummary",
    "TopK",
    "Uniform",
    "UnitCost",
    "UnitGroups",
    "UnitMap",
    "apply_plan",
    "apply_plan_to_checkpoint",
    "at_lengths",
    "attach_input_quantizers",
    "attach_quantizers",
    "block_group_lasso",
    "checkpoint_scores",
    "compress",
    "compress_after_training",
    "convert",
    "count_parameters",
    "detach_input_quantizers",
    "detach_quantizers",
    "discover",
    "draw_maps",
    "explain",
    "export_model",
    "file_size",
    "from_padded_scale",
    "group_lasso",
    "group_lasso_factors",
    "hoyer_square",
    "hoyer_square_factors",
    "input_moments",
    "input_quantizers",
    "install_tokens",
    "joint_scores",
    "kept_fraction",
    "load_compressed",
    "load_from_checkpoint",
    "logits_kl",
    "make_plan",
    "matrix_map",
    "measure_latency",
    "measure_latency_table",
    "model_maps",
    "output_mse",
    "progress_bars",
    "prove_tokens",
    "quantization_off",
    "rearranged",
    "rearranged_plan",
    "remove_tokens",
    "repair_readers",
    "save_compressed",
    "save_token_picture",
    "search_precision",
    "select",
    "select_weights",
    "silence_units",
    "to_padded_scale",
    "token_picture",
    "token_runtime",
    "tokens_off",
    "trim_tokenizer",
    "trimmed_group_lasso",
    "trimmed_group_lasso_factors",
    "unit_costs",
    "unit_norms",
    "unit_scores",
    "used_ids",
    "weight_kinds",
    "weight_quantizers",
    "write_html",
    "zero_units",
]


def __getattr__(name: str) -> Any:
    if name in _CALLBACKS:
        return getattr(import_module("lightning_compress.callbacks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLBACKS})
