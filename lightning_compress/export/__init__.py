"""Models as files: for another runtime; and scores and surgery on a checkpoint, without the model."""

from lightning_compress.export.checkpoint import CheckpointReport, apply_plan_to_checkpoint
from lightning_compress.export.model import ExportResult, export_model
from lightning_compress.export.program import ExportError
from lightning_compress.export.scores import checkpoint_scores

export = export_model  # the short name, here only: in the package above it would hide this one

__all__ = [
    "CheckpointReport",
    "ExportError",
    "ExportResult",
    "apply_plan_to_checkpoint",
    "checkpoint_scores",
    "export",
    "export_model",
]
