"""Which weights bear how few bits: a greedy search by the loss of a trained model, without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.discovery.tracer import evaluation
from lightning_compress.example_call import example_call
from lightning_compress.progress import Progress, as_long_as, quiet
from lightning_compress.quantization.activations import ActivationQuantizer
from lightning_compress.quantization.convert import convert
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization.inputs import (
    InputQuantizer,
    attach_input_quantizers,
    detach_input_quantizers,
    input_quantizers,
)
from lightning_compress.quantization.packed import PackedForm
from lightning_compress.quantization.selection import (
    Modules,
    activation_named,
    select_inputs,
    select_weights,
    weight_kinds,
)
from lightning_compress.quantization.weights import (
    WeightQuantizer,
    attach_quantizers,
    detach_quantizers,
    weight_quantizers,
)
from lightning_compress.quantizers import quantizer_named
from lightning_compress.timing import measure_latency

DENSE = "float32"
Objective = Literal["bytes", "milliseconds"]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class PrecisionSearch:
    """What ``search_precision`` found.

    Args:
        chosen: by names of weights, their precision: one of those that were tried, or "float32".
        losses: of the model in "float32", with everything at the "cheapest" precision, and of the one that was "found",
            on the examples of the search.
        limit: the largest loss that was allowed.
        objective: what was saved, "bytes" or "milliseconds".
        costs: of the same three models, in this unit; milliseconds are those of the layers alone, one after another.
        sensitivities: by names of weights and precision, by how much the loss grows with this weight alone.
        reported: what ``report`` returned for the same three; empty without one.
        evaluations: how often the loss was computed.
        activations: quantizer of the inputs of weights with eight bits or fewer; None for none.
    """

    chosen: Mapping[str, str]
    losses: Mapping[str, float]
    limit: float
    objective: Objective
    costs: Mapping[str, float]
    sensitivities: Mapping[str, Mapping[str, float]]
    reported: Mapping[str, Any]
    evaluations: int
    activations: ActivationQuantizer | None

    def apply(self, model: nn.Module, example: object) -> None:
        """Put the quantizers of the search on a model; ``convert`` makes integers of its weights.

        Args:
            model: the one that was searched, or another with the same weights.
            example: (args, kwargs) of a call.

        Raises:
            QuantizationError: if nothing was quantized, or names do not fit.
        """
        weights = {name: quantizer_named(precision) for name, precision in self.chosen.items() if precision != DENSE}
        if not weights:
            raise QuantizationError(
                f"Expected a search that found weights to quantize, but all {len(self.chosen)} stay {DENSE}: none can "
                f"be changed within a loss of {self.limit:g}. Allow more by tolerance, or more bits by precisions."
            )
        args, kwargs = example_call("example", example)
        kinds = weight_kinds(model, args, kwargs)
        attach_quantizers(model, weights)
        if self.activations is not None:
            few = [name for name, quantizer in weights.items() if _multiplies(quantizer)]
            attach_input_quantizers(model, select_inputs(model, kinds, few, self.activations))

    def __str__(self) -> str:
        """A small table."""
        lines = [f"{'':10}{'loss':>12}{self.objective:>16}"]
        for name in (DENSE, "cheapest", "found"):
            extra = f"  {self.reported[name]}" if name in self.reported else ""
            lines.append(f"{name:10}{self.losses[name]:12.4f}{self.costs[name]:16,.4g}{extra}")
        counts = {p: list(self.chosen.values()).count(p) for p in dict.fromkeys(self.chosen.values())}
        kept = ", ".join(f"{count} {precision}" for precision, count in counts.items())
        lines.append(
            f"{len(self.chosen)} weights: {kept}; allowed loss {self.limit:.4f}; {self.evaluations} evaluations"
        )
        return "\n".join(lines)


def search_precision(
    model: nn.Module,
    evaluate: Evaluate,
    example: object,
    *,
    tolerance: float,
    precisions: Sequence[str] = ("int8",),
    activations: str | ActivationQuantizer | None = "int8",
    modules: Modules = None,
    objective: Objective = "bytes",
    thorough: bool = False,
    report: Callable[[nn.Module], Any] | None = None,
    progress: Progress = quiet,
    seconds: float = 0.2,
) -> PrecisionSearch:
    r"""Find the precision of every weight with which the loss of a trained model grows by ``tolerance`` at most.

    The sensitivity of a move, one weight to one precision, is :math:`s = L(\text{this move alone}) - L(\text{none})`.
    *Forward*: from float32, moves by ascending s per unit saved; each is made for good if the loss, computed anew,
    stays within :math:`L_0 + \text{tolerance}`. *Backward*: from the cheapest precision everywhere, weights by
    descending s per unit get back the next precision, until the loss is within it; then forward once more. The cheaper
    of both is kept.

    Weights of eight bits or fewer in rows multiply int8 after ``convert(model, "native")``, if their inputs are
    quantized; others save bytes and no time. The model is left as it was: ``apply`` of what is returned puts the
    quantizers on.

    Args:
        model: the trained model, without quantizers.
        evaluate: its loss on the examples of the search, lower is better: smooth, so no accuracy. A fine-tuned
            classifier is often too sure of itself, and its cross entropy falls when noise is added: then take
            ``logits_kl`` to the answers that the model gives before, which needs no labels.
        example: (args, kwargs) of a call.
        tolerance: by how much the loss may grow, at least 0.
        precisions: what weights may have, such as ("int16", "int8", "int4"); float32 is always allowed.
        activations: quantizer of the inputs of weights with eight bits or fewer; None for none.
        modules: which weights, see ``select_weights``. Default: everything that is multiplied with activations.
        objective: "bytes" as stored, or "milliseconds": medians of every layer alone, on what the example brings to it.
        thorough: in the forward search compute the sensitivities of all moves anew after each move: the square of the
            number of evaluations.
        report: computes something else of the three models, on examples that the search has not seen.
        progress: wraps what is gone through, for a progress bar, see ``progress_bars``. How many steps the search from
            the cheapest takes is not known before.
        seconds: for measuring one layer, with objective "milliseconds".

    Raises:
        QuantizationError: for a model that has quantizers, weights that nothing fits, or a loss that is not finite.
        ValueError: for a tolerance below 0, an unknown objective, or precisions that are none, learned or given twice.

    References: Dong et al. 2019, "HAWQ" (sensitivities per layer); Kwon et al. 2022 for search without training.
    """
    _check(model, tolerance, precisions, objective)
    args, kwargs = example_call("example", example)
    kinds = weight_kinds(model, args, kwargs, progress=progress)
    names = list(select_weights(kinds, precisions[0], modules))
    on_inputs = None if activations is None else activation_named(activations)
    with evaluation(model), _attached(model, kinds, names, precisions, on_inputs) as switch:
        costs = _costs(model, switch, names, precisions, objective, (args, kwargs), seconds, progress)
        space = _Space(names, precisions, costs)
        moves = [(name, precision) for name in names for precision in space.ladder(name)]
        judge = _Judge(switch, lambda: evaluate(model))
        dense = judge({})
        limit = dense + tolerance
        alone = {move: judge(dict([move])) - dense for move in progress(moves, "sensitivities")}
        lowest = {name: space.ladder(name)[-1] for name in names if space.ladder(name)}
        cheapest = judge(lowest)
        search = _forward_anew if thorough else _forward
        forward = search({}, moves, alone, space, judge, limit, progress)
        backward = _backward(lowest, cheapest, moves, alone, space, judge, limit, progress)
        best = forward if backward is None else min(backward, forward, key=space.cost)
        three = {DENSE: {}, "cheapest": lowest, "found": best}
        losses = {name: judge(assignment) for name, assignment in three.items()}
        reported: dict[str, Any] = {}
        if report is not None:
            for name, assignment in progress(three.items(), "report"):
                switch(assignment)
                reported[name] = report(model)
    return PrecisionSearch(
        chosen={name: best.get(name, DENSE) for name in names},
        losses=losses,
        limit=limit,
        objective=objective,
        costs={name: space.cost(assignment) for name, assignment in three.items()},
        sensitivities={n: {p: value for (name, p), value in alone.items() if name == n} for n in names},
        reported=reported,
        evaluations=judge.done,
        activations=on_inputs,
    )


Assignment = Mapping[str, str]  # precisions by names of weights; those that are left out are float32
Move = tuple[str, str]


@dataclass(frozen=True)
class _Space:
    """What may be chosen, and what it costs."""

    names: Sequence[str]
    precisions: Sequence[str]
    costs: Mapping[Move, float]

    def ladder(self, name: str) -> list[str]:
        """Precisions that cost less than float32, the cheapest last."""
        whole = self.costs[name, DENSE]
        cheaper = [p for p in self.precisions if self.costs[name, p] < whole]
        return sorted(cheaper, key=lambda p: -self.costs[name, p])

    def cost(self, assignment: Assignment) -> float:
        return sum(self.costs[name, assignment.get(name, DENSE)] for name in self.names)

    def saved(self, move: Move) -> float:
        return self.costs[move[0], DENSE] - self.costs[move]


class _Judge:
    """The loss of assignments, each computed once."""

    def __init__(self, switch: Callable[[Assignment], None], evaluate: Callable[[], float]) -> None:
        self._switch, self._evaluate = switch, evaluate
        self._known: dict[frozenset[Move], float] = {}
        self.done = 0

    def __call__(self, assignment: Assignment) -> float:
        key = frozenset(assignment.items())
        if key not in self._known:
            self._switch(assignment)
            with torch.no_grad():
                loss = float(self._evaluate())
            if not assignment and not math.isfinite(loss):
                raise QuantizationError(
                    f"Expected a finite loss of the model as it is, but evaluate returned {loss}. Look for NaN in the "
                    "weights and in the examples."
                )
            self._known[key] = math.inf if math.isnan(loss) else loss
            self.done += 1
        return self._known[key]


def _forward(
    start: Assignment,
    moves: Sequence[Move],
    alone: Mapping[Move, float],
    space: _Space,
    judge: _Judge,
    limit: float,
    progress: Progress,
) -> dict[str, str]:
    """Moves by ascending harm per unit saved, each kept if the loss allows."""
    now = dict(start)
    for name, precision in progress(sorted(moves, key=lambda m: (alone[m] / space.saved(m), m)), "forward search"):
        # only what makes a weight cheaper than it is
        cheaper = space.costs[name, precision] < space.costs[name, now.get(name, DENSE)]
        if cheaper and judge({**now, name: precision}) <= limit:
            now[name] = precision
    return now


def _forward_anew(
    start: Assignment,
    moves: Sequence[Move],
    alone: Mapping[Move, float],
    space: _Space,
    judge: _Judge,
    limit: float,
    progress: Progress,
) -> dict[str, str]:
    """The same with the harm of all moves that are left computed anew before each."""
    now, left = dict(start), list(moves)
    while True:
        left = [(n, p) for n, p in left if space.costs[n, p] < space.costs[n, now.get(n, DENSE)]]
        if not left:
            break
        base = judge(now)
        harm = {m: judge({**now, m[0]: m[1]}) - base for m in progress(left, "sensitivities of the moves left")}
        move = min(left, key=lambda m: (harm[m] / space.saved(m), m))
        left.remove(move)
        if judge({**now, move[0]: move[1]}) <= limit:
            now[move[0]] = move[1]
    return now


def _backward(
    lowest: Assignment,
    loss: float,
    moves: Sequence[Move],
    alone: Mapping[Move, float],
    space: _Space,
    judge: _Judge,
    limit: float,
    progress: Progress,
) -> dict[str, str] | None:
    """From the cheapest, weights by descending harm get the next precision, until the loss allows it."""
    now = dict(lowest)

    def too_large() -> bool:
        return loss > limit

    for _ in progress(as_long_as(too_large), "backward search"):
        if not now:
            return None
        name = max(now, key=lambda n: (alone[n, now[n]] / space.saved((n, now[n])), n))
        ladder = space.ladder(name)
        at = ladder.index(now[name])
        if at:
            now[name] = ladder[at - 1]
        else:
            del now[name]
        loss = judge(now)
    return _forward(now, moves, alone, space, judge, limit, progress)


# The model with all quantizers on it


@contextmanager
def _attached(
    model: nn.Module,
    kinds: Mapping[str, str],
    names: Sequence[str],
    precisions: Sequence[str],
    on_inputs: ActivationQuantizer | None,
) -> Iterator[Callable[[Assignment], None]]:
    """Under it the model computes with the assignment that was switched to last; at first float32."""
    attach_quantizers(model, dict.fromkeys(names, quantizer_named(precisions[0])))
    inputs: dict[str, InputQuantizer] = {}
    try:
        if on_inputs is not None:
            inputs = attach_input_quantizers(model, select_inputs(model, kinds, names, on_inputs))
        weights = weight_quantizers(model)
        quantizers = {precision: quantizer_named(precision) for precision in precisions}

        def switch(assignment: Assignment) -> None:
            for name, quantizing in weights.items():
                precision = assignment.get(name, DENSE)
                quantizing.enabled = precision != DENSE
                if quantizing.enabled:
                    quantizing.quantizer = quantizers[precision]
                on_input = inputs.get(name.rpartition(".")[0])
                if on_input is not None:
                    on_input.enabled = quantizing.enabled and _multiplies(quantizing.quantizer)

        switch({})
        yield switch
    finally:
        detach_quantizers(model)
        detach_input_quantizers(model)


def _multiplies(quantizer: Any) -> bool:
    """Whether a weight of this quantizer is multiplied with integers."""
    return bool(quantizer.stored_bits <= 8)


def _costs(
    model: nn.Module,
    switch: Callable[[Assignment], None],
    names: Sequence[str],
    precisions: Sequence[str],
    objective: Objective,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    seconds: float,
    progress: Progress,
) -> dict[Move, float]:
    """Of every weight in every precision."""
    weights: dict[str, WeightQuantizer] = weight_quantizers(model)
    parameters = dict(model.named_parameters())
    costs: dict[Move, float] = {}
    seen = _layer_inputs(model, names, call) if objective == "milliseconds" else {}
    for name in progress(names, "costs of weights"):
        parameter = parameters[name]
        costs[name, DENSE] = float(parameter.numel() * parameter.element_size())
        for precision in precisions:
            switch({name: precision})
            form = PackedForm.of(weights[name].quantizer, weights[name].quantize(parameter))
            costs[name, precision] = float(form.bytes)
        if objective == "milliseconds":
            costs.update(_milliseconds(model, name, precisions, switch, seen.get(name), seconds))
    switch({})
    return costs


def _layer_inputs(
    model: nn.Module, names: Sequence[str], call: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, tuple[Any, ...]]:
    """What the modules of the weights are called with, first call."""
    seen: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, tuple(args)) and None

    handles = [model.get_submodule(n.rpartition(".")[0]).register_forward_pre_hook(note(n)) for n in names]
    try:
        with torch.no_grad():
            model(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _milliseconds(
    model: nn.Module,
    name: str,
    precisions: Sequence[str],
    switch: Callable[[Assignment], None],
    args: tuple[Any, ...] | None,
    seconds: float,
) -> dict[Move, float]:
    """The module of a weight alone; in a precision that no product has, as long as in float32."""
    path = name.rpartition(".")[0]
    costs = {(name, precision): 0.0 for precision in (DENSE, *precisions)}
    module = model.get_submodule(path)
    if args is None or not all(isinstance(arg, Tensor) for arg in args):
        return costs
    switch({})
    ways: dict[str, nn.Module] = {}
    for precision in (DENSE, *precisions):
        switch({} if precision == DENSE else {name: precision})
        alone = copy.deepcopy(module)
        if precision == DENSE:
            detach_quantizers(alone)
            detach_input_quantizers(alone)
        else:
            try:
                convert(alone, "native")
            except QuantizationError:  # no product of integers: nothing is saved
                continue
        ways[precision] = alone
    times = measure_latency(ways, args, repeats=101, max_seconds=seconds)
    for precision in (DENSE, *precisions):
        costs[name, precision] = 1e3 * times[precision if precision in times else DENSE].seconds
    return costs


def _check(model: nn.Module, tolerance: float, precisions: Sequence[str], objective: str) -> None:
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"Expected tolerance, by how much the loss may grow, to be at least 0, but got {tolerance!r}.")
    if objective not in ("bytes", "milliseconds"):
        raise ValueError(f"Expected objective to be 'bytes' or 'milliseconds', but got {objective!r}.")
    if isinstance(precisions, str) or not precisions or len(set(precisions)) != len(precisions):
        raise ValueError(
            f"Expected precisions to be several different names, such as ('int8', 'int4'), but got {precisions!r}."
        )
    for precision in precisions:
        if quantizer_named(precision).first_step(torch.ones(1, 1)) is not None:
            raise ValueError(
                f"Expected precisions that need no training, but got {precision!r}, whose steps are learned. Use "
                f"{precision.replace('lsq', 'int')!r}."
            )
    if weight_quantizers(model) or input_quantizers(model):
        raise QuantizationError(
            f"Expected a model without quantizers, but {type(model).__name__} has some. Take them off: "
            "detach_quantizers(model) and detach_input_quantizers(model)."
        )


__all__ = ["PrecisionSearch", "search_precision"]
