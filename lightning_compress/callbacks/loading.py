"""Loading a LightningModule from a checkpoint of its compressed self."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_compress.callbacks.checkpoint import plans_from_state, take_shape
from lightning_compress.callbacks.quantizer_record import attach_all, quantizers_in
from lightning_compress.callbacks.session import traced_module
from lightning_compress.callbacks.token_record import install_state, runtimes_in
from lightning_compress.plan import PruningPlan

Module = TypeVar("Module", bound=pl.LightningModule)
OWNER = "FinalizeCompression"


def load_from_checkpoint(
    kind: type[Module], path: str | os.PathLike[str], *, weights_only: bool = True, **options: Any
) -> Module:
    """``kind.load_from_checkpoint(path, ...)`` for checkpoints of fits in which the module was compressed.

    The module is built dense, the removals that the checkpoint tells of are replayed, its token pruning is installed
    and its quantizers are attached, then the weights are loaded.

    Args:
        kind: the LightningModule's class.
        path: the checkpoint; one without a compression is loaded as usual.
        weights_only: refuse to unpickle anything but tensors and plain containers. Hyperparameters that are objects
            need False, and then trust in the file.
        options: what ``kind.load_from_checkpoint`` takes: ``map_location``, ``hparams_file``, ``strict``, and arguments
            of the constructor that override saved hyperparameters.

    Raises:
        TypeError: if ``kind`` is no LightningModule class.
        ValueError: if the module that is built is not the one that was compressed.
    """
    if not (isinstance(kind, type) and issubclass(kind, pl.LightningModule)):
        raise TypeError(
            f"Expected the class of a LightningModule, but got {kind!r}. Call load_from_checkpoint(MyModule, path)."
        )

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        for name, plans in removals_in(checkpoint):
            take_shape(traced_module(self, name), plans)
        for name, state in runtimes_in(checkpoint):
            install_state(traced_module(self, name), state)
        for name, state in quantizers_in(checkpoint):
            attach_all(traced_module(self, name), state)
        kind.on_load_checkpoint(self, checkpoint)

    # the weights are loaded inside the class method, and this hook of the module is the last thing before that
    shaped: Any = type(
        kind.__name__, (kind,), {"on_load_checkpoint": on_load_checkpoint, "__module__": kind.__module__}
    )
    module: Module = shaped.load_from_checkpoint(path, weights_only=weights_only, **options)
    module.__class__ = kind
    return module


def removals_in(checkpoint: Mapping[str, Any]) -> list[tuple[str, list[PruningPlan]]]:
    """What a checkpoint tells of removals: name of the module that lost units, and the plans, one after the other."""
    found = []
    for key, state in checkpoint.get("callbacks", {}).items():
        session = state.get("session") if key.startswith(OWNER) and isinstance(state, Mapping) else None
        plans = [] if session is None else plans_from_state(session)
        if session is not None and plans:
            found.append((session["module"], plans))
    return found


__all__ = ["load_from_checkpoint", "removals_in"]
