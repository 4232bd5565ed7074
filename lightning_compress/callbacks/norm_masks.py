"""Masks that follow a fit: normalisations leave out the units that have reached zero.

Removing residual width changes the statistics of every normalisation over it. If the norms leave a unit out from the
moment at which all its weights are zero, the model adapts to that while it trains, and the removal itself changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.structures import Structure
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.silence import Silence, silence


class NormMasks:
    """The masks of one model at one time.

    Attributes:
        gone: structure name -> bool of shape (units,): units that the norms leave out.
    """

    def __init__(self) -> None:
        self.gone: dict[str, Tensor] = {}
        self._silence: Silence | None = None

    def follow(self, model: nn.Module, structures: Iterable[Structure], dead: Mapping[str, Tensor]) -> None:
        """Let the norms of ``structures`` leave out exactly their units in ``dead``.

        Args:
            model: the model, whose training goes on with the masks.
            structures: structures; those without norms need no mask.
            dead: structure name -> bool of shape (units,). A structure of which no more than the floor is alive is
                left as it is.
        """
        gone = {
            s.name: dead[s.name]
            for s in structures
            if s.norms and s.name in dead and bool(dead[s.name].any()) and int((~dead[s.name]).sum()) >= s.floor
        }
        if gone.keys() == self.gone.keys() and all(torch.equal(units, self.gone[name]) for name, units in gone.items()):
            return
        self.remove()
        removals = [
            Removal(s, tuple(torch.nonzero(~gone[s.name]).reshape(-1).tolist())) for s in structures if s.name in gone
        ]
        self._silence = silence(dict(model.named_modules()), removals)
        self.gone = gone

    def remove(self) -> None:
        """Take the masks off."""
        if self._silence is not None:
            self._silence.remove()
        self._silence = None
        self.gone = {}
