"""What the weights that read the units are given: second moments of their inputs over calibration batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.post_training.calibration import Calibration, at_rest
from lightning_compress.post_training.products import Product, ProductTap, names_of, readers
from lightning_compress.progress import Progress, quiet
from lightning_compress.structures import Structure


@dataclass
class InputMoments:
    """Sums over rows x of the inputs of one weight.

    Args:
        product: how the weight is used.
        gram: sum of x x^T, (columns, columns), float64.
        rows: number of rows.
    """

    product: Product
    gram: Tensor
    rows: int


@torch.no_grad()
def input_moments(
    model: nn.Module,
    structures: Iterable[Structure],
    calibration: Calibration,
    cut: int | None = None,
    progress: Progress = quiet,
) -> dict[str, InputMoments]:
    """Second moments of the inputs of every weight that reads units, in the order of execution, by parameter name.

    Weights that are used otherwise than in a product that `ProductTap` knows are left out.

    Args:
        model: the model.
        structures: its structures.
        calibration: the batches.
        cut: at most so many rows of each call, evenly spaced; None for all.
        progress: wraps iterables, for a progress bar.
    """
    axes = {(p.parameter, p.axis) for s in structures for p in readers(s)}
    found: dict[str, InputMoments] = {}
    real: Tensor | None = None

    def add(product: Product, inputs: Tensor, _: Tensor) -> None:
        if (product.parameter, product.axis) not in axes:
            return
        rows = product.rows(inputs.detach(), real)
        if cut is not None and rows.shape[0] > cut:
            rows = rows[:: -(-rows.shape[0] // cut)]
        gram = moment(rows, rows)
        if product.parameter in found:
            found[product.parameter].gram += gram
            found[product.parameter].rows += rows.shape[0]
        else:
            found[product.parameter] = InputMoments(product, gram, rows.shape[0])

    with at_rest(model), ProductTap(names_of(model, {name for name, _ in axes}), after=add):
        for batch in progress(calibration.batches, "inputs of weights"):
            real = calibration.real(batch)
            calibration.call(model, batch)
    return found


def output_metrics(model: nn.Module, structures: Iterable[Structure], calibration: Calibration) -> dict[str, Tensor]:
    """Mean squared gradient of the loss by each output of what reads units: parameter -> (outputs,), float64."""
    axes = {(p.parameter, p.axis) for s in structures for p in readers(s)}
    names = names_of(model, {name for name, _ in axes})
    found: dict[str, tuple[Tensor, int]] = {}
    for batch in calibration.batches:
        real, outputs = calibration.real(batch), list[tuple[Product, Tensor]]()

        def keep(product: Product, _: Tensor, output: Tensor, outputs: list[tuple[Product, Tensor]] = outputs) -> None:
            if (product.parameter, product.axis) in axes and output.requires_grad:
                outputs.append((product, output))

        with at_rest(model), torch.enable_grad(), ProductTap(names, after=keep):
            loss = calibration.loss(model, batch)
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
        for (product, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                rows = product.outputs(gradient, real)
                before, count = found.get(product.parameter, (0.0, 0))
                found[product.parameter] = before + rows.double().square().sum(0), count + rows.shape[0]
    return {name: total / max(1, count) for name, (total, count) in found.items()}


def moment(first: Tensor, second: Tensor) -> Tensor:
    """first^T second in float64; one product in the precision of the inputs, or wider than half."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    return (first.to(dtype).T @ second.to(dtype)).double()


__all__ = ["InputMoments", "input_moments", "moment", "output_metrics"]
