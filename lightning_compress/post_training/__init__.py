"""Compression after training: scores, masks and repaired weights from a few batches, without a gradient step."""

from lightning_compress.post_training.compress import PostTrainingResult, compress_after_training
from lightning_compress.post_training.criteria import CalibratedImportance
from lightning_compress.post_training.fisher import FisherAccumulator
from lightning_compress.post_training.low_rank import LowRankSignificance
from lightning_compress.post_training.moments import InputMoments, input_moments
from lightning_compress.post_training.repair import Repair, repair_readers
from lightning_compress.post_training.search import joint_scores, rearranged, rearranged_plan
from lightning_compress.post_training.second_order import SecondOrder

__all__ = [
    "CalibratedImportance",
    "FisherAccumulator",
    "InputMoments",
    "LowRankSignificance",
    "PostTrainingResult",
    "Repair",
    "SecondOrder",
    "compress_after_training",
    "input_moments",
    "joint_scores",
    "rearranged",
    "rearranged_plan",
    "repair_readers",
]
