"""The pruning plan: which units stay, in original coordinates, as a record that can be saved, composed and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, CoreEdit, Edit, ShimEdit, Slice, Structure

FORMAT = 1


@dataclass(frozen=True)
class PruningPlan:
    """Kept units per structure, in the coordinates of the original (unpruned) model.

    Args:
        structures: the structures that lose units (a structure that keeps everything may be present too).
        kept: structure name -> strictly increasing kept unit numbers.
        shapes: shape in the original model of every parameter and buffer that a structure touches.
    """

    structures: tuple[Structure, ...]
    kept: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
