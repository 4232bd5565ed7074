"""Criteria by name: scores of all structures from one pass over calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.importance import TaylorAccumulator, unit_scores
from lightning_compress.post_training.calibration import WITHOUT_LABELS, Calibration, Call, Loss, at_rest
from lightning_compress.post_training.fisher import FisherAccumulator, frozen, scalar
from lightning_compress.post_training.low_rank import LowRankSignificance
from lightning_compress.post_training.moments import input_moments, output_metrics
from lightning_compress.post_training.outputs import output_probes
from lightning_compress.post_training.second_order import SecondOrder
from lightning_compress.progress import Progress, quiet
from lightning_compress.structures import Structure, named_tensors

ROWS = 512  # of the inputs of a weight in one call: neighbouring tokens and pixels say little more
Criterion = Literal["outputs", "fisher", "taylor", "norm", "low_rank", "low_rank_fisher", "obs", "obs_loss"]


def check_criterion(criterion: object) -> None:
    """Raise ValueError for an unknown criterion."""
    if criterion not in get_args(Criterion):
        close = get_close_matches(str(criterion), get_args(Criterion), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Expected importance to be one of {get_args(Criterion)}, but got {criterion!r}.{hint}")


def calibrated_scores(
    model: nn.Module,
    structures: Iterable[Structure],
    calibration: Calibration,
    criterion: Criterion = "outputs",
    *,
    per_sample: bool = True,
    progress: Progress = quiet,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores of the units, and, for "outputs" and "fisher", what they do together in each structure.

    Args:
        model: the model.
        structures: its structures.
        calibration: the batches.
        criterion: see ``CalibratedImportance``.
        per_sample: Fisher information of examples, or of batches.
        progress: wraps iterables, for a progress bar.

    Returns:
        Scores, structure name -> (units,), float64 on the CPU; matrices, name -> (units, units), or nothing.

    Raises:
        ValueError: for an unknown criterion, batches without labels where gradients are needed, gradients that are not
            finite, or structures that a criterion knows nothing about.
    """
    check_criterion(criterion)
    structures = tuple(structures)
    if criterion == "norm":
        return unit_scores(model, structures, "norm"), {}
    if criterion == "taylor":
        return _taylor(model, structures, calibration, progress), {}
    if criterion == "outputs":
        answers = FisherAccumulator(model, structures, full=True)
        for batch, probe in progress(list(output_probes(calibration)), "what outputs answer to"):
            answers.update(batch, probe)
        return answers.scores(), answers.matrices()
    if criterion in ("fisher", "low_rank_fisher"):
        fisher = FisherAccumulator(model, structures, per_sample, full=criterion == "fisher")
        for batch in progress(calibration.batches, "Fisher information"):
            fisher.update(batch, calibration.loss)
        if criterion == "fisher":
            return fisher.scores(), fisher.matrices()
        rank = LowRankSignificance(scores=fisher.scores())
        return {s.name: rank(model, s) for s in progress(structures, "singular values")}, {}
    metrics: Mapping[str, Tensor] | None = None
    if criterion == "obs_loss":
        metrics = output_metrics(model, structures, calibration)
    moments = input_moments(model, structures, calibration, cut=ROWS, progress=progress)
    score: LowRankSignificance | SecondOrder = (
        LowRankSignificance(form="activation", moments=moments)
        if criterion == "low_rank"
        else SecondOrder(moments, metrics=metrics)
    )
    return {s.name: score(model, s) for s in progress(structures, criterion)}, {}


def _taylor(
    model: nn.Module, structures: tuple[Structure, ...], calibration: Calibration, progress: Progress
) -> dict[str, Tensor]:
    taylor = TaylorAccumulator(model, structures)
    tensors = named_tensors(model)
    weights = {n: tensors[n] for s in structures for n in s.tensors_of(tensors)}
    weights = {n: w for n, w in weights.items() if isinstance(w, nn.Parameter) and w.is_floating_point()}
    for batch in progress(calibration.batches, "Taylor scores"):
        with at_rest(model), torch.enable_grad(), frozen(model, weights.values()):
            value = scalar(calibration.loss(model, batch))
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        taylor.update({n: g for n, g in zip(weights, found, strict=True) if g is not None})
    return taylor.scores()


class CalibratedImportance:
    r"""An importance that looks at calibration data; for ``make_plan``, ``FinalizeCompression`` and the like.

    - ``"outputs"``: :math:`s_u = \frac1N \sum_i \lVert \partial f(x_i) / \partial \text{gate}_u \rVert^2`, how far the
      outputs move, by random signs: see ``output_probes``.
    - ``"fisher"``: :math:`s_u = \frac1N \sum_i (\partial \ell_i / \partial \text{gate}_u)^2`, see `FisherAccumulator`.
    - ``"taylor"``: the same with the gradients of batches, see `TaylorAccumulator`.
    - ``"norm"``: squared coupled norm; no data.
    - ``"low_rank"``: the part of the outputs that the leading half of the singular directions leaves out, activation
      aware; ``"low_rank_fisher"``: Fisher information times the relative residual. See `LowRankSignificance`.
    - ``"obs"``: second order, relative to the outputs of each weight; ``"obs_loss"``: weighted by how the loss answers
      to each output. See `SecondOrder`.

    "outputs", "norm", "low_rank" and "obs" need no labels. Scores are computed anew for every call, from the model as
    it is then.

    Args:
        loader: batches; tensors go to the device of the model.
        criterion: see above.
        batches: how many are used; None for all.
        loss: (model, batch) -> loss. Default: cross entropy for integer labels, mean squared error for others.
        call: (model, batch) -> outputs. Default: the batch without its labels.
        per_sample: for "fisher": gradients of examples, or of batches.

    Raises:
        ValueError: for an unknown criterion; when scores are computed, as ``compress_after_training`` does.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        criterion: Criterion = "outputs",
        batches: int | None = 64,
        loss: Loss | None = None,
        call: Call | None = None,
        per_sample: bool = True,
    ) -> None:
        check_criterion(criterion)
        self.loader, self.criterion, self.batches = loader, criterion, batches
        self.loss, self.call, self.per_sample = loss, call, per_sample

    def of_all(self, model: nn.Module, structures: Iterable[Structure]) -> dict[str, Tensor]:
        """Scores of all structures, name -> (units,), float64 on the CPU; ``unit_scores`` calls this."""
        calibration = Calibration.of(model, self.loader, self.batches, self.call, self.loss)
        return calibrated_scores(model, structures, calibration, self.criterion, per_sample=self.per_sample)[0]

    def __call__(self, model: nn.Module, structure: Structure) -> Tensor:
        """Scores of one structure, (units,)."""
        return self.of_all(model, [structure])[structure.name]


__all__ = ["WITHOUT_LABELS", "CalibratedImportance", "Criterion", "calibrated_scores", "check_criterion"]
