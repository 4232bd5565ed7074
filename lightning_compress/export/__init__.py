"""Models as files: scores and surgery on a checkpoint, without the model."""

from lightning_compress.export.checkpoint import CheckpointReport, apply_plan_to_checkpoint
from lightning_compress.export.scores import checkpoint_scores

__all__ = ["CheckpointReport", "apply_plan_to_checkpoint", "checkpoint_scores"]
