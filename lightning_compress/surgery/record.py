"""What a model remembers of its removals, so that it can be saved and built again.

The record is an ordinary attribute of the module that was operated on: copies and pickles have it, state dicts do not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.plan import PruningPlan

ATTRIBUTE = "_compression_record"


@dataclass(frozen=True)
class CompressionRecord:
    """The way from the dense model to the one at hand.

    Args:
        plans: the removals, in order, each in the coordinates of the model before it, with tiers and edits.
        config: the configuration object of the dense model as a mapping, where it has one (``model.config.to_dict()``),
            because a removal may change the model's own.
    """

    plans: tuple[PruningPlan, ...]
    config: Mapping[str, Any] | None = None


def record_of(module: nn.Module) -> CompressionRecord | None:
    """The record of ``module`` itself; None if nothing was removed from it."""
    record = vars(module).get(ATTRIBUTE)
    return record if isinstance(record, CompressionRecord) else None


def records(model: nn.Module) -> dict[str, CompressionRecord]:
    """Records of ``model`` and its sub-modules by path."""
    found = {path: record_of(module) for path, module in model.named_modules()}
    return {path: record for path, record in found.items() if record is not None}


def dense_config(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of ``model`` as a dictionary, or as it was before the first removal."""
    record = record_of(model)
    if record is not None:
        return None if record.config is None else dict(record.config)
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    return copy.deepcopy(config) if isinstance(config, dict) else None


def remember(model: nn.Module, plan: PruningPlan, config: Mapping[str, Any] | None) -> None:
    """Add a removal to the record of ``model``.

    Args:
        model: the model, after the removal.
        plan: what was removed, with tiers and edits.
        config: ``dense_config`` of the model before the removal.
    """
    record = record_of(model) or CompressionRecord((), config)
    # a plain attribute, past nn.Module.__setattr__, which some modules override
    vars(model)[ATTRIBUTE] = CompressionRecord((*record.plans, plan), record.config)


__all__ = ["CompressionRecord", "dense_config", "record_of", "records", "remember"]
