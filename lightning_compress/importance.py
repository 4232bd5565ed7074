"""Importance: one score per unit of every structure, from weights or from weights and gradients.

A score is *extensive*: an estimate of what is lost when the unit goes, such that the scores of units add up to that of
a group. The budget divides it by what the unit costs, and so compares a head with a feed-forward unit a hundred times
smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.discovery.valueless import lacking_values
from lightning_compress.progress import Progress, quiet
from lightning_compress.regularizers import group_norms
from lightning_compress.shards import Part, local, whole
from lightning_compress.structures import Slice, Structure, is_inside, named_tensors

Importance = Literal["norm", "taylor"] | Callable[[nn.Module, Structure], Tensor]


def unit_scores(
    model: nn.Module,
    structures: Iterable[Structure],
    importance: Importance = "norm",
    *,
    gradients: Mapping[str, Tensor] | None = None,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    r"""Score every unit of every structure; the larger, the more is lost without it.

    - ``"norm"``: :math:`s_u = \lVert w_u \rVert_2^2`, the squared coupled norm: :math:`w_u` are all elements of the
      unit in producers and consumers. Being :math:`|u|` times the mean square of the unit's weights, it ranks units by
      their mean square where cost is proportional to size, whatever their kind.
    - ``"taylor"``: :math:`s_u = \bigl(\sum_{i \in Z_u} w_i \, \partial L / \partial w_i\bigr)^2` over the elements
      :math:`Z_u` of the unit in the slices that silence it (``Slice.zero``). The sum is the derivative of the loss by a
      gate on the unit, counted on one side of it only: its producers hold the same derivative a second time (exactly so
      behind a homogeneous activation such as ReLU). (Molchanov et al., "Importance Estimation for Neural Network
      Pruning", 2019; Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022.) One batch is a
      noisy estimate: see ``TaylorAccumulator``.
    - Units that are modules or have no slice that silences them alone (layers, experts) are scored by all of their
      parameters: "norm" is the sum of squares, so that the score of a layer is that of what is inside; "taylor" is
      :math:`(\sum_i w_i \, \partial L / \partial w_i)^2`, the derivative of the loss by a common scale of them. Mean
      squares of weights say little about how layers compare: prefer "taylor" for them, or scores of your own.
    - a function of (model, structure) that returns finite, non-negative scores of shape (units,). One with a method
      ``of_all(model, structures)`` is asked for the scores of all structures at once, by name (one pass over data).

    Args:
        model: the model that the structures were discovered in.
        structures: structures to score.
        importance: how, see above.
        gradients: for "taylor", gradient of each parameter by name; default: ``.grad`` as the last backward pass left
            it.
        progress: wraps the structures, for a progress bar, see ``progress_bars``; "taylor" and ``of_all`` have none.

    Returns:
        structure name -> scores of shape (units,), on the CPU in float64.

    Raises:
        ValueError: for an unknown importance, a model without values, a parameter that the model lacks or that has
            another size, a structure without gradients, scores of a wrong shape, or scores that are negative or not
            finite.
    """
    structures = tuple(structures)
    lacking = lacking_values(model)
    if lacking and importance in ("norm", "taylor"):
        raise ValueError(
            f"Expected weights with values to score units by {importance!r}, but {lacking[0]!r} has none (meta device "
            f"or FakeTensorMode). Pass scores of your own: make_plan(..., scores={{name: tensor of shape (units,)}})."
        )
    if callable(of_all := getattr(importance, "of_all", None)):
        every = of_all(model, structures)
        return {s.name: _check_scores(s, every.get(s.name)) for s in structures}
    if callable(importance):
        return {s.name: _check_scores(s, importance(model, s)) for s in progress(structures, "scores of units")}
    if importance == "norm":
        return {name: norms.square() for name, norms in unit_norms(model, structures, progress=progress).items()}
    if importance == "taylor":
        gates = gate_gradients(model, structures, gradients)
        for structure in structures:
            if structure.name not in gates:
                raise ValueError(_no_gradient(structure))
        return {name: _check_finite(name, gate.square().double().cpu()) for name, gate in gates.items()}
    raise ValueError(
        f'Expected importance to be "norm", "taylor" or a function of (model, structure), but got {importance!r}.'
    )


def unit_norms(model: nn.Module, structures: Iterable[Structure], *, progress: Progress = quiet) -> dict[str, Tensor]:
    """Coupled L2 norm of every unit: over all its elements in producers and consumers; name -> (units,), CPU, float64.

    Args:
        model: the model that the structures were discovered in.
        structures: structures to look at.
        progress: wraps the structures, for a progress bar.

    Raises:
        ValueError: for a parameter that the model lacks or that has another size, or weights that are not finite.
    """
    tensors = named_tensors(model)
    squares: dict[tuple[str, int], Tensor] = {}
    norms = {}
    for structure in progress(tuple(structures), "norms of units"):
        total = torch.zeros(structure.units, dtype=torch.float64)
        for piece in structure.slices:
            if piece.role == "companion":
                continue
            key = (piece.parameter, piece.axis)
            if key not in squares:  # structures that share an axis (heads, V/O dims) share the pass over the weights
                tensor = _tensor(tensors, structure, piece).detach()
                own = group_norms(local(tensor), piece.axis).double().square()
                squares[key] = Part.of(tensor, piece.parameter).total(own, piece.axis, piece.size).cpu()
            total += squares[key][piece.indices].sum(1)
        for unit, names in enumerate(_inside(structure, tensors)):
            total[unit] += sum(float(tensors[n].detach().double().square().sum()) for n in names)
        norms[structure.name] = _check_finite(structure.name, total.sqrt())
    return norms


def unit_sizes(model: nn.Module, structures: Iterable[Structure]) -> dict[str, int]:
    """Elements of one unit in producers and consumers, by structure name; norm / sqrt(size) is a root mean square."""
    tensors = named_tensors(model)
    sizes = {}
    for structure in structures:
        sizes[structure.name] = sum(
            _tensor(tensors, structure, piece).numel() // piece.size * piece.indices.shape[1]
            for piece in structure.slices
            if piece.role != "companion"
        ) + sum(tensors[name].numel() for names in _inside(structure, tensors)[:1] for name in names)
    return sizes


def gate_gradients(
    model: nn.Module, structures: Iterable[Structure], gradients: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    r"""Derivative of the loss by a gate that multiplies each unit.

    .. math:: \frac{\partial L}{\partial \text{gate}_u} = \sum_{i \in Z_u} w_i \, \frac{\partial L}{\partial w_i}

    Args:
        model: the model that the structures were discovered in.
        structures: structures to score.
        gradients: gradient of each parameter by name; default: ``.grad``.

    Returns:
        structure name -> (units,), on the device of the parameters, in float32 or wider; structures without any
        gradient are left out.
    """
    tensors = named_tensors(model)
    sums: dict[tuple[str, int], Tensor | None] = {}
    gates: dict[str, Tensor] = {}
    for structure in structures:
        for gate in _module_gates(structure, tensors, gradients):
            gates[structure.name] = gate
        for piece in structure.slices:
            # a router's rows do not scale what its experts do
            if piece.zero == (structure.kind == "expert") or (piece.role == "companion" and not piece.zero):
                continue
            key = (piece.parameter, piece.axis)
            if key not in sums:
                weight = _tensor(tensors, structure, piece)
                gradient = weight.grad if gradients is None else gradients.get(piece.parameter)
                sums[key] = None if gradient is None else _position_products(weight, gradient, piece)
            if (products := sums[key]) is not None:
                gate = products[piece.indices.to(products.device)].sum(1)
                known = gates.get(structure.name)
                gates[structure.name] = gate if known is None else known + gate.to(known.device)
    return gates


def _inside(structure: Structure, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """For every unit that is a module the names of its parameters, each tensor once."""
    found = []
    for member in structure.members:
        names = {id(t): n for n, t in tensors.items() if is_inside(n, member) and isinstance(t, nn.Parameter)}
        found.append(list(names.values()))
    return found


def _module_gates(
    structure: Structure, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
) -> Iterable[Tensor]:
    """Derivative of the loss by a scale of all parameters of each unit that is a module; nothing without gradients."""
    totals: list[Tensor] = []
    known = False
    for names in _inside(structure, tensors):
        total = torch.zeros(())
        for name in names:
            weight = tensors[name]
            gradient = weight.grad if gradients is None else gradients.get(name)
            if gradient is not None:
                dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
                product = (weight.detach().to(dtype) * gradient.detach().to_dense()).sum()
                total, known = total.to(product) + product, True
        totals.append(total)
    if known:
        yield torch.stack(
            [total.to(totals[0].device, torch.promote_types(total.dtype, torch.float32)) for total in totals]
        )


class TaylorAccumulator:
    r"""First-order Taylor importance over many batches.

    .. math:: s_u = \mathrm{mean}_t \left(\frac{\partial L_t}{\partial \text{gate}_u}\right)^2

    Call ``update`` after each backward pass, once the gradients are complete (after accumulation) and unscaled (mixed
    precision), and before they are zeroed or clipped. A batch with gradients that are not finite is left out. One
    update costs a pass over the slices that silence units, and memory for one product of the size of the largest.

    Args:
        model: the model that the structures were discovered in.
        structures: structures to score.
        decay: None for the mean over all updates, or d in [0, 1) for an exponential moving average
            :math:`s \leftarrow d\,s + (1 - d)\,s_t`, corrected for its start at zero.

    Raises:
        ValueError: if ``decay`` is outside [0, 1).
    """

    def __init__(self, model: nn.Module, structures: Iterable[Structure], decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"Expected decay to be None or in [0, 1), but got {decay}.")
        self.model = model
        self.structures = tuple(structures)
        self.decay = decay
        self._sums: dict[str, Tensor] = {}  # structure name -> (units,), sum of squares with the weights below
        self._weights: dict[str, Tensor] = {}  # structure name -> (), sum of the weights of the updates

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Add the gradients of one batch, ``.grad`` or those given by parameter name; parameters without are skipped.

        Raises:
            ValueError: if the model has changed its shape since the structures were discovered.
        """
        for name, gate in gate_gradients(self.model, self.structures, gradients).items():
            square = gate.square()
            # decided on the device: asking for a Python bool would wait for the backward pass to end
            finite = torch.isfinite(square).all()
            square = torch.where(finite, square, torch.zeros_like(square))
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(square)
                self._weights[name] = square.new_zeros(())
            if self.decay is None:
                self._sums[name] += square
                self._weights[name] += finite
            else:
                keep = torch.where(finite, self.decay, 1.0).to(square)
                self._sums[name] = keep * self._sums[name] + (1 - keep) * square
                self._weights[name] = keep * self._weights[name] + (1 - keep)

    def scores(self) -> dict[str, Tensor]:
        """Structure name -> scores of shape (units,), on the CPU in float64.

        Raises:
            ValueError: if a structure has not had a gradient yet.
        """
        scores = {}
        for structure in self.structures:
            weight = float(self._weights.get(structure.name, 0.0))
            if not weight:
                raise ValueError(_no_gradient(structure))
            scores[structure.name] = self._sums[structure.name].double().cpu() / weight
        return scores

    def reset(self) -> None:
        """Forget all updates."""
        self._sums, self._weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What the updates so far have summed up to, as tensors on the CPU."""
        return {
            "sums": {name: tensor.cpu().clone() for name, tensor in self._sums.items()},
            "weights": {name: tensor.cpu().clone() for name, tensor in self._weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; raises ValueError if it is of other structures, and changes nothing then."""
        units = {s.name: s.units for s in self.structures}
        sums, weights = dict(state["sums"]), dict(state["weights"])
        for name, tensor in sums.items():
            if name not in units or tuple(tensor.shape) != (units[name],) or name not in weights:
                raise ValueError(
                    f"Expected sums of shape (units,) for structures with units {units}, but got {name!r} with shape "
                    f"{tuple(tensor.shape)}. The state is that of other structures."
                )
        devices = self._devices()
        self._sums = {name: tensor.to(devices[name]).clone() for name, tensor in sums.items()}
        self._weights = {name: weights[name].to(devices[name]).clone() for name in sums}

    def _devices(self) -> dict[str, torch.device]:
        tensors = named_tensors(self.model)
        return {
            s.name: next((_tensor(tensors, s, piece).device for piece in s.slices if piece.zero), torch.device("cpu"))
            for s in self.structures
        }


def _position_products(weight: Tensor, gradient: Tensor, piece: Slice) -> Tensor:
    """Sum of weight * gradient at each position of the axis of ``piece``, shape (size,)."""
    if gradient.shape != weight.shape:
        raise ValueError(
            f"Expected the gradient of {piece.parameter!r} to have shape {tuple(weight.shape)}, "
            f"but got {tuple(gradient.shape)}."
        )
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    # half precision is widened first: products of small weights and gradients would vanish in it
    product = local(weight.detach()).to(dtype) * local(gradient.detach()).to_dense()
    dims = _other_dims(weight, piece.axis)
    return Part.of(weight, piece.parameter).total(product.sum(dims) if dims else product, piece.axis, piece.size)


def _other_dims(weight: Tensor, axis: int) -> list[int]:
    return [d for d in range(weight.dim()) if d != axis]


def _tensor(tensors: Mapping[str, Tensor], structure: Structure, piece: Slice) -> Tensor:
    tensor = tensors.get(piece.parameter)
    where = f"structure {structure.name!r}"
    if tensor is None:
        raise ValueError(
            f"Expected the model to have {piece.parameter!r} ({where}), but it has none: pass the model that the "
            f"structures were discovered in."
        )
    if tensor.dim() <= piece.axis or tensor.shape[piece.axis] != piece.size:
        raise ValueError(
            f"Expected axis {piece.axis} of {piece.parameter!r} ({where}) to have size {piece.size}, but its shape is "
            f"{tuple(tensor.shape)}: the model has changed since its structures were discovered."
        )
    return tensor


def _check_scores(structure: Structure, scores: object) -> Tensor:
    expected = f"importance to return a tensor of shape ({structure.units},) for structure {structure.name!r}"
    if not isinstance(scores, Tensor):
        raise ValueError(f"Expected {expected}, but got {type(scores).__name__}.")
    if tuple(scores.shape) != (structure.units,):
        raise ValueError(f"Expected {expected}, but got shape {tuple(scores.shape)}.")
    scores = whole(scores.detach()).double().cpu()
    if bool((scores < 0).any()):
        raise ValueError(f"Expected {expected} without negative scores, but got {float(scores.min()):g}.")
    return _check_finite(structure.name, scores)


def _check_finite(name: str, scores: Tensor) -> Tensor:
    finite = torch.isfinite(scores)
    if not finite.all():
        unit = int(torch.nonzero(~finite)[0])
        raise ValueError(
            f"Expected finite scores for structure {name!r}, but unit {unit} has {float(scores[unit])}: look for NaN "
            f"or infinity in the weights or gradients of its parameters."
        )
    return scores


def _no_gradient(structure: Structure) -> str:
    parameters = [piece.parameter for piece in structure.slices if piece.zero] or list(structure.members)
    return (
        f"Expected gradients for structure {structure.name!r} in one of {parameters}, but there are none: score after "
        f'a backward pass and before gradients are zeroed, or use importance="norm" where these parameters are frozen.'
    )
