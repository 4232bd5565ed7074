r"""Repair in closed form: weights that read the units learn, from calibration inputs, to do without those that go.

For each weight, one after the other in the order of execution, with the inputs X that it has in the model as it has
been repaired so far and the outputs Y that the weight had in the dense model,

.. math:: \min_{W', b'} \lVert X_S W'^\top + b' - Y \rVert^2 + \lambda \lVert W' - W_S \rVert^2

S are the columns that stay. Where a unit that goes is a linear combination of units that stay, nothing is lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.plan import PruningPlan
from lightning_compress.post_training.calibration import Calibration, at_rest
from lightning_compress.post_training.least_squares import Sums, scaled, whole
from lightning_compress.post_training.lockstep import HaltedCall, Lockstep, OutOfStep
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

    name: str
    product: Product
    keep: Tensor  # bool (columns,)
    width: int  # number of outputs
    biased: bool
    summed: bool = False  # whether its products are added to something, the residual stream mostly
    wanted: list[Tensor] = field(default_factory=list)  # outputs of the dense model, with what they are added to
    sums: list[bool] = field(default_factory=list)  # whether they are, by batch and call
    calls: int = 1  # in one forward pass

    def moments(self, device: torch.device) -> Sums:
        return Sums.of(self.keep.numel(), self.width, self.biased, device)


@dataclass
class _Work:
    """What is to be repaired, and with what."""

    model: nn.Module
    plan: PruningPlan
    axes: set[tuple[str, int]]  # weights that read units, and along which axis
    zeros: dict[tuple[str, int], Tensor]  # positions that silence the removed units
    biased: set[str]  # weights with a bias
    fit: Calibration
    judge: Calibration
    progress: Progress

    def silence(self) -> None:
        tensors = named_tensors(self.model)
        for (name, axis), positions in self.zeros.items():
            tensors[name].index_fill_(axis, positions.to(tensors[name].device), 0)


Learned = Generator[tuple[_Target, Sums, Sums], None, None]  # what each weight learns from, and what judges it
AGREEMENT = 1e-4  # of outputs of halted calls with those of plain ones


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
    zeros = _positions(plan)
    snapshot = {name: tensors[name].detach().clone() for name in {n for n, _ in (*axes, *zeros)}}
    biases = {name: bias for name, _ in axes if (bias := bias_of(name, tensors)) is not None}
    snapshot |= {bias: tensors[bias].detach().clone() for bias in biases.values()}

    work = _Work(model, plan, set(axes), zeros, set(biases), fit, judge, progress)

    def repaired(source: Callable[[_Work], Learned]) -> list[Repair]:
        done: list[Repair] = []
        with closing(source(work)) as learning:
            for target, learned, judged in learning:
                weight = tensors[target.name]
                bias = tensors[biases[target.name]] if target.biased else None
                piece = axes[target.name, target.product.axis]
                units = columns(weight, piece) if what == "scales" else None
                done.append(_solved(weight, bias, target, learned, judged, units, dampings))
        return done

    def back() -> None:
        for name, values in snapshot.items():
            tensors[name].copy_(values)

    try:
        try:
            return repaired(_in_step)
        except OutOfStep:
            back()
            return repaired(_by_passes)
    except BaseException:
        back()
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


def _targets(
    work: _Work, calibration: Calibration, progress: Progress, keep: bool
) -> tuple[dict[str, _Target], list[list[str]]]:
    """The weights as the dense model uses them, in the order of execution; and the names that each batch came by.

    With ``keep`` they also hold what they are to give; those that are used in some batches only are then left out, for
    it is not known what belongs together.
    """
    model, axes, zeros = work.model, work.axes, work.zeros
    targets: dict[str, _Target] = {}
    orders: list[list[str]] = []
    real: Tensor | None = None

    def after(product: Product, inputs: Tensor, output: Tensor) -> None:
        name, axis = product.parameter, product.axis
        if (name, axis) not in axes:
            return
        rows = product.outputs(output, real)
        if name not in targets:
            stay = torch.ones(product.rows(inputs[:1]).shape[1], dtype=torch.bool)
            weight = named_tensors(model)[name]
            gone = zeros.get((name, axis), torch.zeros(0, dtype=torch.long))
            taps = weight[0, 0].numel() if weight.dim() > 2 else 1
            stay[(gone.unsqueeze(1) * taps + torch.arange(taps)).reshape(-1)] = False
            targets[name] = _Target(name, product, stay, rows.shape[1], name in work.biased)
        orders[-1].append(name)
        if keep:
            targets[name].wanted.append(rows.clone())
            targets[name].sums.append(False)

    def joined(product: Product, output: Tensor, other: Tensor) -> None:
        target = targets.get(product.parameter)
        if target is None or product.axis != target.product.axis:
            return
        target.summed = True
        if keep:
            target.wanted[-1] = target.wanted[-1] + product.outputs(other, real)
            target.sums[-1] = True

    names = names_of(model, {name for name, _ in axes})
    with at_rest(model), ProductTap(names, after=after, joined=joined):
        for batch in progress(calibration.batches, "outputs of the dense model"):
            orders.append([])
            real = calibration.real(batch)
            calibration.call(model, batch)
    if keep:
        for name in [n for n, t in targets.items() if len(t.wanted) % len(calibration.batches)]:
            del targets[name]
        for target in targets.values():
            target.calls = len(target.wanted) // len(calibration.batches)
    return targets, orders


def _in_step(work: _Work) -> Learned:
    """All batches go through a dense copy and the model together, and halt at every weight.

    Raises:
        OutOfStep: for weights that are used more than once, or not by all batches in one order; and for modules that
            keep what belongs to a call, so that calls at the same time come to something else.
    """
    model, fit = work.model, work.fit
    targets, (order,) = _targets(work, fit.with_batches(fit.batches[:1]), quiet, keep=False)
    if len(set(order)) < len(order):
        raise OutOfStep("a weight is used more than once")
    dense = copy.deepcopy(model)
    work.silence()
    batches = fit.batches + work.judge.batches
    learning = len(fit.batches)
    summed = {name for name, target in targets.items() if target.summed}

    def halted(which: nn.Module) -> list[HaltedCall]:
        names = names_of(which, set(order))
        return [HaltedCall(lambda b=batch: fit.call(which, b), names, summed) for batch in batches]  # type: ignore[misc]

    ours, theirs = halted(model), halted(dense)
    device = named_tensors(model)[order[0]].device if order else torch.device("cpu")
    # norms leave units out, layers are passed by
    with at_rest(dense), at_rest(model), silence_units(model, work.plan), Lockstep([*ours, *theirs], order) as calls:
        for name in work.progress(order, "repair"):
            calls.go(name)
            sums = targets[name].moments(device), targets[name].moments(device)
            for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
                _add(sums[number >= learning], own, other, fit.real(batches[number]))
            yield targets[name], *sums
        calls.go(None)
        for own, batch in ((ours[0], batches[0]), (ours[-1], batches[-1])):
            if not _agree(own.result, fit.call(model, batch)):
                raise OutOfStep("calls at the same time disturb each other")


def _add(sums: Sums, own: HaltedCall, other: HaltedCall, real: Tensor | None) -> None:
    """What the weight is given in the model, and what it is to make of that."""
    assert own.product is not None and own.inputs is not None and other.output is not None
    wanted = other.output if other.other is None else other.output + other.other
    if own.other is not None:
        wanted = wanted - own.other
    sums.add(own.product.rows(own.inputs, real), own.product.outputs(wanted, real))


def _agree(first: Any, second: Any) -> bool:
    pairs = zip(output_tensors(first), output_tensors(second), strict=True)
    return all(
        a.shape == b.shape
        and (not a.is_floating_point() or float((a - b).abs().max()) <= AGREEMENT * float(b.abs().max()))
        for a, b in pairs
        if a.numel()
    )


def _by_passes(work: _Work) -> Learned:
    """Passes up to each weight, one weight after the other; what the dense model gives is kept for all of them."""
    fit, judge = work.fit, work.judge
    targets, _ = _targets(work, fit.with_batches(fit.batches + judge.batches), work.progress, keep=True)
    work.silence()
    for target in work.progress(list(targets.values()), "repair"):
        with silence_units(work.model, work.plan):
            learned = _sums(work.model, target, fit, 0)
            judged = _sums(work.model, target, judge, len(fit.batches))
        target.wanted.clear()  # the largest things here
        yield target, learned, judged


def _sums(model: nn.Module, target: _Target, part: Calibration, start: int) -> Sums:
    """Moments of the inputs that the weight has now with the outputs that it had."""
    weight = named_tensors(model)[target.name]
    sums = target.moments(weight.device)
    at = start * target.calls
    left = target.calls
    real: Tensor | None = None
    rows = weight.new_empty(0)

    def mine(product: Product) -> bool:
        return product.parameter == target.name and product.axis == target.product.axis

    def add(wanted: Tensor) -> None:
        nonlocal at, left
        sums.add(rows, wanted)
        at, left = at + 1, left - 1
        if not left:
            raise _Reached

    def after(product: Product, inputs: Tensor, _: Tensor) -> None:
        nonlocal rows
        if mine(product):
            rows = product.rows(inputs, real)
            if not target.sums[at]:
                add(target.wanted[at])

    def joined(product: Product, _: Tensor, other: Tensor) -> None:
        if mine(product) and target.sums[at]:
            add(target.wanted[at] - product.outputs(other, real))

    with at_rest(model), ProductTap({id(weight): target.name}, after=after, joined=joined):
        for batch in part.batches:
            real, left = part.real(batch), target.calls
            try:
                part.call(model, batch)
            except _Reached:
                continue
    return sums


def _solved(
    weight: Tensor,
    bias: Tensor | None,
    target: _Target,
    fit: Sums,
    judge: Sums,
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
        theta = whole(now, fit, target.keep, damping) if units is None else scaled(now, fit, units, damping)
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
    return Repair(target.name, before, error, chosen)


__all__ = ["DAMPINGS", "Repair", "What", "bias_of", "repair_readers"]
