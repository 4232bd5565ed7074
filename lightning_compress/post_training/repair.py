r"""Repair in closed form: weights that read the units learn, from calibration inputs, to do without those that go.

For each weight, one after the other in the order of execution, with the inputs X that it has in the model as it has
been repaired so far and the outputs Y that the weight had in the dense model,

.. math:: \min_{W', b'} \lVert X_S W'^\top + b' - Y \rVert^2 + \lambda \lVert W' - W_S \rVert^2

S are the columns that stay. Where a unit that goes is a linear combination of units that stay, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.plan import PruningPlan
from lightning_compress.post_training.calibration import Calibration, at_rest
from lightning_compress.post_training.moments import moment
from lightning_compress.post_training.products import Product, ProductTap, columns, matrix, names_of, readers
from lightning_compress.progress import Progress, quiet
from lightning_compress.structures import Structure, named_tensors, owner_path
from lightning_compress.surgery import silence_units

What = Literal["weights", "scales"]
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Repair:
    """What happened to one weight.

    Args:
        parameter: its name.
        before: relative squared error of its outputs on data that the repair has not seen, with units gone.
        after: the same after the repair; equal where it was skipped.
        damping: the damping that was best there; None where the repair was skipped because none was better.
    """

    parameter: str
    before: float
    after: float
    damping: float | None

    def __str__(self) -> str:
        if self.damping is None:
            return f"{self.parameter}: left as it is, no repair was better than an error of {self.before:.3g}"
        return f"{self.parameter}: error {self.before:.3g} -> {self.after:.3g} (damping {self.damping:g})"


@dataclass
class _Target:
    """One weight that is repaired."""

    product: Product
    calls: int  # in one forward pass
    outputs: list[Tensor]  # those of the dense model, by batch and call
    keep: Tensor  # bool (columns,)


class _Reached(Exception):
    """What comes behind the weight is not needed."""


@torch.no_grad()
def repair_readers(
    model: nn.Module,
    structures: Iterable[Structure],
    plan: PruningPlan,
    calibration: Calibration,
    what: What = "weights",
    dampings: Sequence[float] = DAMPINGS,
    progress: Progress = quiet,
) -> list[Repair]:
    """Silence the units that ``plan`` removes and repair what reads the others, in place, before the removal.

    Weights that are used otherwise than in products with their inputs only have their units silenced.

    Args:
        model: the dense model that the plan was made for; afterwards ``zero_units(model, plan)`` changes nothing.
        structures: its structures; what reads a structure that loses nothing is repaired, too, for its inputs change.
        plan: which units go.
        calibration: at least two batches; the last eighth judges.
        what: "weights" for the whole matrix of the units that stay, and the bias; "scales" for one factor per unit, as
            in the mask tuning of Kwon et al.
        dampings: candidates for lambda, as fractions of the mean of the diagonal of X^T X; 0 is a least-squares
            solution of smallest norm. The best on the data that judges is taken, or the weight is left as it is.
        progress: wraps iterables, for a progress bar.

    Returns:
        One entry for each weight, in the order of execution.

    Raises:
        ValueError: for one batch only, an unknown ``what``, or a negative damping. The model is then as it was.
    """
    if what not in get_args(What):
        raise ValueError(f"Expected what to be one of {get_args(What)}, but got {what!r}.")
    if not dampings or any(not d >= 0 for d in dampings):
        raise ValueError(f"Expected dampings, one or more, to be at least 0, but got {list(dampings)}.")
    structures = tuple(structures)
    fit, judge = calibration.parts()
    tensors = named_tensors(model)
    axes = {(p.parameter, p.axis): p for s in structures for p in readers(s)}
    names = names_of(model, {name for name, _ in axes})
    targets = _recorded(model, names, set(axes), calibration.with_batches(fit.batches + judge.batches), progress)
    zeros = _positions(plan)
    changed = {name for name, _ in zeros} | set(targets)
    biases = {name: bias_of(name, tensors) for name in targets}
    snapshot = {n: tensors[n].detach().clone() for n in (*changed, *filter(None, biases.values()))}
    try:
        for (name, axis), positions in zeros.items():
            tensors[name].index_fill_(axis, positions.to(tensors[name].device), 0)
        done = []
        for name, target in progress(list(targets.items()), "repair"):
            weight = tensors[name]
            piece = axes[name, target.product.axis]
            gone = zeros.get((name, target.product.axis), torch.zeros(0, dtype=torch.long))
            taps = weight[0, 0].numel() if weight.dim() > 2 else 1
            target.keep[(gone.unsqueeze(1) * taps + torch.arange(taps)).reshape(-1)] = False
            bias = None if biases[name] is None else tensors[biases[name]]  # type: ignore[index]
            own = (model, name, weight, target)
            with silence_units(model, plan):  # norms leave units out, layers are passed by
                learned = _sums(*own, fit, bias is not None, 0)
                judged = _sums(*own, judge, bias is not None, len(fit.batches))
            target.outputs.clear()  # the largest things here
            units = columns(weight, piece) if what == "scales" else None
            done.append(_solved(name, weight, bias, target, learned, judged, units, dampings))
        return done
    except BaseException:
        for name, values in snapshot.items():
            tensors[name].copy_(values)
        raise


def _positions(plan: PruningPlan) -> dict[tuple[str, int], Tensor]:
    """(parameter, axis) -> positions that silence the removed units when they are zero."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for structure in plan.structures:
        gone = torch.tensor(plan.removed(structure.name), dtype=torch.long)
        for piece in structure.slices:
            if piece.zero and gone.numel():
                found.setdefault((piece.parameter, piece.axis), []).append(piece.indices[gone].reshape(-1))
    return {axis: torch.cat(positions).unique() for axis, positions in found.items()}


def bias_of(name: str, tensors: dict[str, Tensor]) -> str | None:
    """Name of the bias that is added to the products with the weight ``name``."""
    owner, _, own = name.rpartition(".")
    candidate = f"{owner}.bias" if owner else "bias"
    return candidate if own == "weight" and owner_path(name) == owner and candidate in tensors else None


def _recorded(
    model: nn.Module,
    names: dict[int, str],
    axes: set[tuple[str, int]],
    calibration: Calibration,
    progress: Progress,
) -> dict[str, _Target]:
    """What the weights give in the model as it is, in the order of execution."""
    targets: dict[str, _Target] = {}
    real: Tensor | None = None

    def keep(product: Product, inputs: Tensor, output: Tensor) -> None:
        if (product.parameter, product.axis) not in axes:
            return
        rows = product.outputs(output, real).clone()
        if product.parameter not in targets:
            size = product.rows(inputs[:1]).shape[1]
            targets[product.parameter] = _Target(product, 0, [], torch.ones(size, dtype=torch.bool))
        targets[product.parameter].outputs.append(rows)

    with at_rest(model), ProductTap(names, after=keep):
        for batch in progress(calibration.batches, "outputs of the dense model"):
            real = calibration.real(batch)
            calibration.call(model, batch)
    uneven = [name for name, t in targets.items() if len(t.outputs) % len(calibration.batches)]
    for name in uneven:  # called in some batches only: what belongs together is not known
        del targets[name]
    for target in targets.values():
        target.calls = len(target.outputs) // len(calibration.batches)
    return targets


@dataclass
class _Sums:
    gram: Tensor  # X^T X with a last column of ones where there is a bias
    cross: Tensor  # X^T Y
    square: float  # |Y|^2

    def error(self, theta: Tensor) -> float:
        """|X theta^T - Y|^2 / |Y|^2, theta (outputs, columns)."""
        value = float(((theta @ self.gram) * theta).sum()) - 2 * float((theta.T * self.cross).sum()) + self.square
        return max(0.0, value) / self.square if self.square else 0.0


def _sums(
    model: nn.Module, name: str, weight: Tensor, target: _Target, part: Calibration, bias: bool, start: int
) -> _Sums:
    """Moments of the inputs that the weight has now with the outputs that it had."""
    size = target.keep.numel() + bias
    outputs = target.outputs[0].shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(size, outputs, dtype=torch.float64, device=weight.device)
    square = 0.0
    at = start * target.calls
    left = target.calls
    real: Tensor | None = None

    def add(product: Product, inputs: Tensor, _: Tensor) -> None:
        nonlocal at, left, square
        if product.parameter != name or product.axis != target.product.axis:
            return
        rows, wanted = product.rows(inputs, real), target.outputs[at]
        if bias:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
        gram.add_(moment(rows, rows))
        cross.add_(moment(rows, wanted))
        square += float(wanted.double().square().sum())
        at, left = at + 1, left - 1
        if not left:
            raise _Reached

    with at_rest(model), ProductTap({id(weight): name}, after=add):
        for batch in part.batches:
            real, left = part.real(batch), target.calls
            try:
                part.call(model, batch)
            except _Reached:
                continue
    return _Sums(gram, cross, square)


def _solved(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    target: _Target,
    fit: _Sums,
    judge: _Sums,
    units: Tensor | None,
    dampings: Sequence[float],
) -> Repair:
    """Write the best solution into weight and bias, if it is better than what is there."""
    now = matrix(weight, target.product.axis).double()
    if bias is not None:
        now = torch.cat([now, bias.double().unsqueeze(1)], 1)
    before = judge.error(now)
    best, error, chosen = now, before, None
    for damping in dampings:
        theta = _whole(now, fit, target.keep, damping) if units is None else _scaled(now, fit, units, damping)
        value = judge.error(theta) if bool(torch.isfinite(theta).all()) else torch.inf
        if value < error:
            best, error, chosen = theta, value, damping
    if chosen is not None:
        columns_ = target.keep.numel()
        view = matrix(weight, target.product.axis)
        values = best[:, :columns_].to(weight.dtype)
        if view.data_ptr() == weight.data_ptr():
            view.copy_(values)
        else:  # a transposed convolution: flattening has copied
            rest = weight.transpose(0, target.product.axis)
            rest.copy_(values.view(rest.shape))
        if bias is not None:
            bias.copy_(best[:, columns_])
    return Repair(name, before, error, chosen)


def _level(gram: Tensor, keep: Tensor, damping: float) -> float:
    return damping * float(gram.diagonal()[: keep.numel()][keep].mean())


def _whole(now: Tensor, sums: _Sums, keep: Tensor, damping: float) -> Tensor:
    """Least squares for all columns that stay, and the bias, around what they are."""
    stay = torch.nonzero(keep).reshape(-1)
    if now.shape[1] > keep.numel():
        stay = torch.cat([stay, torch.tensor([keep.numel()])])
    stay = stay.to(now.device)
    gram = sums.gram[stay][:, stay].clone()
    missing = sums.cross[stay] - sums.gram[stay] @ now.T  # (columns that stay, outputs)
    delta = _least_squares(gram, missing, _level(sums.gram, keep.to(now.device), damping))
    theta = now.clone()
    theta[:, stay] += delta.T
    return theta


def _scaled(now: Tensor, sums: _Sums, units: Tensor, damping: float) -> Tensor:
    r"""Least squares for one factor per unit: the outputs are :math:`\sum_u s_u X_u W_u^\top + b`."""
    units = units.to(now.device)
    owner = torch.full((sums.gram.shape[0],), -1, dtype=torch.long, device=now.device)
    owner[units.reshape(-1)] = torch.arange(units.shape[0], device=now.device).repeat_interleave(units.shape[1])
    mine = owner >= 0
    products = (sums.gram * (now.T @ now))[mine][:, mine]
    total = products.new_zeros(units.shape[0], units.shape[0])
    total.index_put_((owner[mine].unsqueeze(1).expand_as(products), owner[mine].expand_as(products)), products, True)
    missing = ((sums.cross - sums.gram @ now.T) * now.T).sum(1)[mine]
    right = missing.new_zeros(units.shape[0]).index_add_(0, owner[mine], missing)
    change = _least_squares(total, right.unsqueeze(1), damping * float(total.diagonal().mean()))[:, 0]
    theta = now.clone()
    theta[:, mine] *= 1 + change[owner[mine]]
    return theta


def _least_squares(gram: Tensor, right: Tensor, level: float) -> Tensor:
    """(gram + level)^-1 right; without damping the solution of smallest norm."""
    if level > 0:
        damped = gram + level * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(gram)
    small = values <= values[-1].clamp(min=0) * gram.shape[0] * torch.finfo(gram.dtype).eps
    inverse = torch.where(small, torch.zeros_like(values), 1 / values.masked_fill(small, 1.0))
    return vectors @ (inverse.unsqueeze(1) * (vectors.T @ right))


__all__ = ["DAMPINGS", "Repair", "What", "bias_of", "repair_readers"]
