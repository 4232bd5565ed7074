r"""What the outputs answer to: a stand-in for the loss whose gradient says how far a gate moves the outputs.

.. math:: F = \mathbb{E}[J_i^\top J_i], \qquad J_i = \partial f(x_i) / \partial \text{gate},
   \qquad J_i^\top v, \; v \in \{-1, 1\}^m \text{ at random, has } J_i^\top J_i \text{ as its mean square}

It is the Gauss-Newton matrix of the squared distance to the outputs that the model gives now. A loss has gradients next
to zero on what the model has learned by heart; outputs move all the same, and need no labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.post_training.calibration import Calibration, Loss


def output_probes(calibration: Calibration, probes: int = 1, seed: int = 0) -> Iterator[tuple[Any, Loss]]:
    """Batches, each ``probes`` times, with a function whose gradient is a random combination of those of the outputs.

    The first floating-point output is taken, padding left out. Examples of one batch have the same signs, so that each
    alone has the gradient that it has in its batch. Where the labels are integers, one for each row of the outputs,
    the outputs are scores of classes, and what all of them share does not matter: signs have their mean taken off.

    Args:
        calibration: the batches.
        probes: random combinations for each batch.
        seed: of the signs.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in calibration.batches:
        for _ in range(probes):
            yield batch, _Probe(calibration, int(torch.randint(2**31, (), generator=generator)))


class _Probe:
    """(model, batch) -> sum of the outputs with random signs."""

    def __init__(self, calibration: Calibration, seed: int) -> None:
        self.calibration, self.seed = calibration, seed

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        found = output_tensors(self.calibration.call(model, batch))
        outputs = next((t for t in found if t.is_floating_point() and t.dim()), None)
        if outputs is None:
            raise ValueError(
                f"Expected a floating-point output with a dim for the examples, but {type(model).__name__} returned "
                "none. Say what is called, call=lambda model, batch: ..., or take importance='fisher'."
            )
        signs = self._signs(outputs, batch).to(outputs)
        real = self.calibration.real(batch)
        if real is not None and outputs.dim() > 2 and outputs.shape[:2] == real.shape:
            signs = signs * real.view(*real.shape, *[1] * (outputs.dim() - 2)).to(outputs)
        return (outputs * signs).sum()

    def _signs(self, outputs: Tensor, batch: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        labels = self.calibration.labels(batch)
        classes = (
            isinstance(labels, Tensor)
            and not labels.is_floating_point()
            and labels.shape == outputs.shape[:-1]
            and outputs.shape[-1] > 1
        )
        while True:
            signs = 2.0 * torch.randint(2, outputs.shape[1:], generator=generator) - 1
            if not classes:
                return signs
            signs = signs - signs.mean(-1, keepdim=True)
            if bool(signs.any()):  # of two classes, signs are equal half of the time
                return signs


__all__ = ["output_probes"]
