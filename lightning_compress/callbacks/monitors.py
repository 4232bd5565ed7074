"""Callbacks that compare a metric with its best so far: after a removal another model is measured."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


def begin_anew(trainer: pl.Trainer) -> None:
    """Let EarlyStopping and ModelCheckpoint forget the metrics of the larger model.

    Otherwise the small model would be stopped while it recovers, and the best checkpoint would be that of a model that
    is no more. Files that were written before stay where they are.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            if callback.best_model_path:
                rank_zero_info(
                    f"Units were removed: ModelCheckpoint looks for the best of {callback.monitor!r} anew. The best of "
                    f"the larger model stays at {callback.best_model_path!r}."
                )
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


__all__ = ["begin_anew"]
