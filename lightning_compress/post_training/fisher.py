r"""Fisher information of unit masks: how the loss answers to a gate on each unit.

.. math:: F = \frac{1}{N} \sum_i g_i g_i^\top, \qquad g_i = \partial \ell_i / \partial \text{gate}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.importance import gate_gradients
from lightning_compress.post_training.calibration import Loss, at_rest, singles, size_of
from lightning_compress.post_training.products import Product, ProductTap, names_of, readers
from lightning_compress.structures import Structure, named_tensors

CHECKED = 2  # examples of the first batch that are also differentiated alone
AGREEMENT = 1e-3  # of the largest gradient; a wrong dim shows as a difference of the order of 1


class FisherAccumulator:
    r"""Diagonal or full Fisher information of the units of each structure, over calibration batches.

    Per example, :math:`g_i` comes from masks of ones on the inputs of the products that read the units, one mask for
    each example of the batch, in one backward pass. Whether a batch comes apart like that is not assumed: the first
    examples of the first batch are also differentiated alone, and structures (or losses) for which the two disagree,
    or whose units are read otherwise, are differentiated example by example from then on, which holds for any
    operation. As mini-batches, :math:`g` is the gradient of the loss of each batch, as in the code of Kwon et al.

    Args:
        model: the model that the structures were discovered in.
        structures: structures to score.
        per_sample: gradients of each example, or of each batch.
        full: also sum up what units do together, (units, units) for each structure, for ``rearrange``.

    Raises:
        ValueError: while updating, for a loss that is not a finite scalar with a gradient.
    """

    def __init__(
        self, model: nn.Module, structures: Iterable[Structure], per_sample: bool = True, full: bool = False
    ) -> None:
        self.model, self.structures = model, tuple(structures)
        self.per_sample, self.full = per_sample, full
        self.alone: set[str] | None = None  # structures differentiated example by example; None before the first batch
        self._factor = 1.0  # from the gradient of the loss of a batch to that of an example; 0: for each batch its size
        self._inner: set[str] = (
            set()
        )  # weights whose inputs have the examples as the inner of two dims, as (tokens, batch)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def update(self, batch: Any, loss: Loss) -> None:
        """Add the examples of one batch; gradients of parameters are neither used nor left behind."""
        with at_rest(self.model), torch.enable_grad():
            for name, rows in self._gradients(batch, loss).items():
                if not bool(torch.isfinite(rows).all()):
                    raise ValueError(
                        f"Expected finite gradients for structure {name!r}, but got NaN or infinity: look for them in "
                        "the weights and the calibration data."
                    )
                found = rows.T @ rows if self.full else rows.square().sum(0)
                self._sums[name] = found if name not in self._sums else self._sums[name] + found
        self._count += (size_of(batch) or 1) if self.per_sample else 1

    def scores(self) -> dict[str, Tensor]:
        """Diagonal of the Fisher information: structure name -> (units,), on the CPU in float64.

        Raises:
            ValueError: before the first update.
        """
        return {
            name: ((total.diagonal() if self.full else total).double() / self._count).cpu()
            for name, total in self._known().items()
        }

    def matrices(self) -> dict[str, Tensor]:
        """Full Fisher information of each structure: name -> (units, units), on the CPU in float64.

        Raises:
            ValueError: before the first update, or without ``full=True``.
        """
        if not self.full:
            raise ValueError("Expected FisherAccumulator(..., full=True) for matrices, but got full=False.")
        return {name: total.double().cpu() / self._count for name, total in self._known().items()}

    def _known(self) -> dict[str, Tensor]:
        if not self._sums:
            raise ValueError("Expected an update before scores are read, but there was none.")
        return self._sums

    def _gradients(self, batch: Any, loss: Loss) -> dict[str, Tensor]:
        """Structure name -> gradients, (examples, units), or (1, units) for a mini-batch."""
        size = size_of(batch)
        if not self.per_sample or size is None:
            return {name: gate.unsqueeze(0) for name, gate in self._by_weights(batch, loss, self.structures).items()}
        if self.alone is None:
            self._settle(batch, loss, size)
        assert self.alone is not None
        together = [s for s in self.structures if s.name not in self.alone]
        found: dict[str, Tensor] = {}
        if together:
            factor = self._factor or float(size)
            found = {name: rows * factor for name, rows in self._by_masks(batch, loss, together, size).items()}
        rest = [s for s in self.structures if s.name not in found]
        if rest:
            found |= self._one_by_one(batch, loss, rest)
        return found

    def _settle(self, batch: Any, loss: Loss, size: int) -> None:
        """Find out which structures masks are right for, and whether the loss is a mean or a sum over examples."""
        true: dict[str, list[Tensor]] = {s.name: [] for s in self.structures}
        for example, _ in zip(singles(batch), range(CHECKED), strict=False):
            for name, gate in self._by_weights(example, loss, self.structures).items():
                true[name].append(gate)

        def agreeing(factor: float, masked: dict[str, Tensor]) -> set[str]:
            good = set()
            for name, rows in masked.items():
                expected = torch.stack(true[name])
                difference = rows[: len(expected)] * (factor or size) - expected
                if float(difference.abs().max()) <= AGREEMENT * float(expected.abs().max()):
                    good.add(name)
            return good

        masked = self._by_masks(batch, loss, self.structures, size)
        right = {factor: agreeing(factor, masked) for factor in (0.0, 1.0)}
        left = [s for s in self.structures if s.name not in right[0.0] | right[1.0]]
        if left and size > 1:  # perhaps the examples are the inner of two dims
            self._inner = {piece.parameter for s in left for piece in readers(s)}
            for factor, good in right.items():
                good |= agreeing(factor, self._by_masks(batch, loss, left, size))
        self._factor = max(right, key=lambda factor: len(right[factor]))
        self.alone = {s.name for s in self.structures} - right[self._factor]

    def _by_masks(self, batch: Any, loss: Loss, structures: Iterable[Structure], size: int) -> dict[str, Tensor]:
        """Gradients of masks on the inputs of what reads the units; structures that are read otherwise are left out."""
        wanted = {s.name: readers(s) for s in structures}
        axes = {(p.parameter, p.axis) for pieces in wanted.values() for p in pieces}
        masks: dict[tuple[str, int], list[Tensor]] = {}

        def gated(product: Product, inputs: Tensor) -> Tensor:
            key = (product.parameter, product.axis)
            if key not in axes or inputs.dim() < 2:
                return inputs
            channels = inputs.shape[product.channel]
            channel = product.channel if product.channel < 0 else product.channel + 1
            # dims that were merged with the examples (tokens, windows) share the mask of their example
            if product.parameter not in self._inner and not inputs.shape[0] % size:
                apart, example = inputs.unflatten(0, (size, -1)), 0
            elif product.parameter in self._inner and inputs.dim() > 2 and inputs.shape[1] == size:
                apart, example = inputs.unsqueeze(0), 2
            elif product.parameter in self._inner and not inputs.shape[0] % size:
                apart, example = inputs.unflatten(0, (-1, size)), 1
            else:
                return inputs
            mask = torch.ones(size, channels, dtype=inputs.dtype, device=inputs.device, requires_grad=True)
            masks.setdefault(key, []).append(mask)
            shape = [1] * apart.dim()
            shape[example], shape[channel] = size, channels
            return (apart * mask.view(shape)).reshape(inputs.shape)

        with frozen(self.model), ProductTap(names_of(self.model, {name for name, _ in axes}), before=gated):
            value = scalar(loss(self.model, batch))
        flat = [mask for found in masks.values() for mask in found]
        if not flat or not value.requires_grad:
            return {}
        gradients = iter(torch.autograd.grad(value, flat, allow_unused=True))
        sums = {
            key: torch.stack([torch.zeros_like(m) if g is None else g for m, g in zip(found, gradients)]).sum(0)  # noqa: B905 - the next masks have the rest
            for key, found in masks.items()
        }
        result = {}
        for name, pieces in wanted.items():
            zero = [p for s in self.structures if s.name == name for p in s.slices if p.zero]
            if pieces and len(zero) == len(pieces) and all((p.parameter, p.axis) in sums for p in pieces):
                rows = [sums[p.parameter, p.axis][:, p.indices.to(flat[0].device)].sum(-1) for p in pieces]
                result[name] = torch.stack(rows).sum(0)
        return result

    def _by_weights(self, batch: Any, loss: Loss, structures: Iterable[Structure]) -> dict[str, Tensor]:
        """Gates as sums over weights: exact for any operation, for the batch as a whole."""
        structures = tuple(structures)
        tensors = named_tensors(self.model)
        touched = {n for s in structures for n in s.tensors_of(tensors) if tensors[n].is_floating_point()}
        weights = {n: tensors[n] for n in touched if isinstance(tensors[n], nn.Parameter)}
        with frozen(self.model, weights.values()):
            value = scalar(loss(self.model, batch))
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        gradients = {
            n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=True)
        }
        return gate_gradients(self.model, structures, gradients)

    def _one_by_one(self, batch: Any, loss: Loss, structures: Iterable[Structure]) -> dict[str, Tensor]:
        structures = tuple(structures)
        rows = [self._by_weights(example, loss, structures) for example in singles(batch)]
        return {s.name: torch.stack([row[s.name] for row in rows]) for s in structures}


def scalar(value: Any) -> Tensor:
    """The loss, or ValueError where it is none."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value.detach()).all()):
        got = f"{value.item():g}" if isinstance(value, Tensor) and value.numel() == 1 else type(value).__name__
        raise ValueError(
            f"Expected the loss of a calibration batch to be a finite scalar tensor, but got {got}. Nothing was "
            "changed."
        )
    return value


@contextmanager
def frozen(model: nn.Module, learning: Iterable[Tensor] = ()) -> Iterator[None]:
    """Parameters without gradients, but for ``learning``, for a while: what is not asked for is not computed."""
    wanted = {id(p) for p in learning}
    states = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in states:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)


__all__ = ["FisherAccumulator", "frozen", "scalar"]
