"""The decoupled step: what one application of a regularizer does to the weights of a model, whatever its groups are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.optimizer_steps import GroupKey, OptimizerSteps
from lightning_compress.regularizers import Regularizer, group_norms
from lightning_compress.structures import Structure, Structures
from lightning_compress.unit_groups import UnitGroups


class LearningRates:
    """Where the parameters of a model are optimized, and with which learning rates."""

    def __init__(self, steps: OptimizerSteps, parameters: Mapping[str, nn.Parameter]) -> None:
        self.steps = steps
        self.keys: dict[str, GroupKey] = {}
        for name, parameter in parameters.items():
            key = steps.owner(parameter)
            if key is not None and parameter.requires_grad:
                self.keys[name] = key

    def current(self) -> dict[GroupKey, float]:
        """Learning rate of the last step of each parameter group."""
        return {key: self.steps.learning_rate(key) for key in set(self.keys.values())}


class Shrinkage(Protocol):
    """Groups of weights that a regularizer shrinks, by a strength."""

    rates: LearningRates

    def observe(self) -> None:
        """Look at the weights as they are now; what `strength` and `dead` say is as of this moment."""

    def protect(self, protected: Mapping[str, Tensor]) -> None:
        """From now on leave these units alone: structure name -> bool of shape (units,)."""

    def strength(self, steps_left: float) -> float:
        """The strength that brings what is not protected to zero in so many steps at the current learning rates."""

    def apply(self, strength: float, pending: Mapping[GroupKey, float]) -> None:
        """Shrink the weights in place."""

    def add_gradient(self, strength: float, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradient of strength * penalty to the gradients of parameters."""


class CoupledShrinkage:
    r"""Shrinks whole units: all their slices in producers and consumers by one factor.

    .. math:: w_u \leftarrow f_u w_u, \qquad f_u = \max\bigl(0, 1 - \eta \lambda v_u / \lVert w_u \rVert\bigr), \qquad
        v_u = \sqrt{|u| \cdot \rho_u / \bar\rho}

    for the group lasso, with :math:`|u|` the scalars of the unit, :math:`\rho_u` the cost that removing the unit saves
    per scalar and :math:`\bar\rho` its mean over units. The cheapest units to lose by norm and cost, :math:`\lVert w_u
    \rVert^2 / \text{cost}_u`, which is how the budget ranks, are thus the first to reach zero.

    :math:`\eta` is one number per unit: where its slices belong to parameter groups with different learning rates,
    their mean weighted by size. A unit that has reached zero stays there: momentum cannot revive it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        structures: Sequence[Structure],
        regularizer: Regularizer,
        steps: OptimizerSteps,
        unit_costs: Mapping[str, float],
    ) -> None:
        self.regularizer = regularizer
        self.rates = LearningRates(steps, parameters)
        # parameters that no optimizer moves are not shrunk either
        self.groups = UnitGroups({n: parameters[n] for n in self.rates.keys}, structures)
        self.structures = self.groups.structures
        sizes = self.groups.sizes
        costs = torch.ones_like(sizes)
        for s in self.structures:
            costs[self.groups.spans[s.name]] = max(unit_costs.get(s.name, 0.0), 0.0)
        density = costs / sizes.clamp(min=1)
        mean = density[sizes > 0].mean() if bool((sizes > 0).any()) else density.new_ones(())
        self.weights = torch.sqrt(sizes * (density / mean if float(mean) > 0 else torch.ones_like(density)))
        self.protected = torch.zeros(self.groups.total, dtype=torch.bool, device=self.groups.device)
        self.alive = torch.ones(self.groups.total, dtype=self.groups.dtype, device=self.groups.device)
        self._touched: list[int] | None = None
        self._norms = self.groups.norms()
        names = {p.parameter for s in self.structures for p in s.slices if p.role != "companion"}
        self.complete = names <= set(self.rates.keys)
        self._shares = [self._share(s, parameters) for s in self.structures]

    def _share(self, structure: Structure, parameters: Mapping[str, nn.Parameter]) -> dict[GroupKey, float]:
        """Which part of the structure's scalars each parameter group holds."""
        sizes: dict[GroupKey, float] = {}
        for piece in structure.slices:
            key = self.rates.keys.get(piece.parameter)
            if key is not None and piece.role != "companion":
                count = parameters[piece.parameter].numel() / piece.size * piece.indices.numel()
                sizes[key] = sizes.get(key, 0.0) + count
        total = sum(sizes.values())
        return {key: size / total for key, size in sizes.items()}

    def _per_structure(self, rates: Mapping[GroupKey, float]) -> list[float]:
        return [sum(share * rates.get(key, 0.0) for key, share in shares.items()) for shares in self._shares]

    def observe(self) -> None:
        """Look at the weights as they are now."""
        self._norms = self.groups.norms()

    def protect(self, protected: Mapping[str, Tensor]) -> None:
        """From now on leave these units alone."""
        mask = torch.zeros(self.groups.total, dtype=torch.bool)
        for name, units in protected.items():
            if name in self.groups.spans:
                mask[self.groups.spans[name]] = units.cpu()
        self.protected = mask.to(self.groups.device)
        # decided here, once, so that the steps in between need not wait for the device
        self._touched = [n for n, s in enumerate(self.structures) if not bool(mask[self.groups.spans[s.name]].all())]

    def strength(self, steps_left: float) -> float:
        """The strength that is needed for so many steps."""
        relative = (self._norms / self.weights.clamp(min=1e-30)).masked_fill(self.protected | (self.weights == 0), 0.0)
        reach = 0.0
        for s, rate in zip(self.structures, self._per_structure(self.rates.current()), strict=True):
            highest = float(relative[self.groups.spans[s.name]].max())
            if highest > 0 and rate > 0:
                # one per cent more, so that rounding does not leave the last unit just above zero
                reach = max(reach, 1.01 * highest / (rate * max(steps_left, 1.0)))
        return reach

    def apply(self, strength: float, pending: Mapping[GroupKey, float]) -> None:
        """Shrink the weights in place."""
        rates = self._per_structure(pending)
        if not any(rates):
            return
        factors = self.factors(self.groups.norms(), strength, rates)
        # a unit that has reached zero stays there, whatever momentum its optimizer still has for it
        factors = torch.where(self.protected, 1.0, factors * self.alive)
        self.alive = torch.where(factors == 0, 0.0, self.alive)
        self.groups.scale_(factors, self._touched)

    @torch.no_grad()
    def factors(self, norms: Tensor, strength: float, rates: Sequence[float]) -> Tensor:
        """Factor of each unit, shape (total,), for the learning rate of each structure."""
        spans = [self.groups.spans[s.name] for s in self.structures]
        if self.regularizer.name == "group_lasso":
            # the same for all structures: one vector operation
            scale = rates[0] if len(set(rates)) == 1 else None
            if scale is not None:
                return self.regularizer.factors(norms, scale * strength, self.weights)
            per_unit = torch.cat(
                [torch.full((s.units,), r, dtype=norms.dtype) for s, r in zip(self.structures, rates, strict=True)]
            )
            return self.regularizer.factors(norms, strength, self.weights * per_unit.to(norms.device))
        parts = []
        for span, rate in zip(spans, rates, strict=True):
            # units are compared within their structure; one without weights in an optimizer has nothing to shrink
            weights = self.weights[span].clamp(min=1e-30)
            parts.append(self.regularizer.factors(norms[span], rate * strength, weights))
        return torch.cat(parts)

    def add_gradient(self, strength: float, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradient of strength * penalty."""
        norms = self.groups.norms()
        with torch.enable_grad():
            leaf = norms.detach().requires_grad_()
            spans = [self.groups.spans[s.name] for s in self.structures]
            penalty = sum(
                self.regularizer.penalty(
                    leaf[span].masked_fill(self.protected[span], 0.0), self.weights[span].clamp(min=1e-30)
                )
                for span in spans
            )
            assert isinstance(penalty, Tensor)
            (slope,) = torch.autograd.grad(penalty, leaf)
        # d ||w|| / dw = w / ||w||, and 0 for a unit that is zero
        coefficients = strength * torch.where(norms > 0, slope / norms.clamp(min=1e-30), 0.0)
        self.groups.add_scaled_(gradients, coefficients)

    def dead(self) -> dict[str, Tensor]:
        """Structure name -> bool of shape (units,) on the CPU: which units are exactly zero."""
        zero = (self._norms == 0).cpu()
        return {s.name: zero[self.groups.spans[s.name]] for s in self.structures}

    def scores(self) -> dict[str, Tensor]:
        """Structure name -> squared norms: what the importance "norm" is, without another pass over the weights."""
        squares = self._norms.double().square().cpu()
        return {s.name: squares[self.groups.spans[s.name]] for s in self.structures}


@dataclass(frozen=True)
class MatrixGroups:
    """Lines of one matrix as groups of their own.

    Args:
        parameter: its name.
        axis: dim whose indices are the groups; None for the rows and columns of blocks.
        owner: structure whose units the lines are, and the unit of each line (-1: none); None where lines are no units.
        part: axis, and positions on it, of the matrix within a packed one (queries and keys beside values); None: all.
    """

    parameter: str
    axis: int | None
    owner: tuple[str, Tensor] | None = None
    part: tuple[int, Tensor] | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The matrix; differentiable."""
        return weight if self.part is None else weight.index_select(self.part[0], self.part[1].to(weight.device))

    def scale_(self, weight: Tensor, factors: Tensor) -> None:
        """Multiply the lines in place."""
        assert self.axis is not None
        if self.part is not None:
            axis, positions = self.part[0], self.part[1].to(weight.device)
            if axis != self.axis:
                lines = self.of(weight)
                weight.index_copy_(axis, positions, lines * self._along(lines, factors))
                return
            factors = factors.new_ones(weight.shape[axis]).index_copy_(0, positions, factors)
        weight.mul_(self._along(weight, factors))

    def _along(self, weight: Tensor, factors: Tensor) -> Tensor:
        shape = [1] * weight.dim()
        shape[self.axis or 0] = -1
        return factors.to(weight.dtype).view(shape)


class MatrixShrinkage:
    """Shrinks rows, columns, or rows and columns of blocks, of chosen matrices.

    These are the groups of the literature, uncoupled.

    A line that belongs to a protected unit is left alone. Rows and columns of blocks overlap, so that no line can be
    exempt: with blocks everything shrinks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[MatrixGroups],
        regularizer: Regularizer,
        steps: OptimizerSteps,
        block_shape: tuple[int, int] | None = None,
        block_grid: tuple[int, int] | None = None,
    ) -> None:
        self.regularizer = regularizer
        self.parameters = parameters
        self.rates = LearningRates(steps, parameters)
        self.groups = [g for g in groups if g.parameter in self.rates.keys]
        self.blocks = {"block_shape": block_shape, "block_grid": block_grid} if regularizer.acts_on == "matrix" else {}
        self.protected: Mapping[str, Tensor] = {}

    def observe(self) -> None:
        """Look at the weights as they are now."""

    def protect(self, protected: Mapping[str, Tensor]) -> None:
        """From now on leave these units alone."""
        self.protected = protected

    def _exempt(self, group: MatrixGroups) -> Tensor | None:
        """Lines that are left alone, shape (size of the axis,)."""
        if group.owner is None or group.owner[0] not in self.protected:
            return None
        name, unit = group.owner
        mask = torch.where(unit >= 0, self.protected[name].cpu()[unit.clamp(min=0)], True)
        return mask.to(self.parameters[group.parameter].device)

    @torch.no_grad()
    def strength(self, steps_left: float) -> float:
        """The strength that is needed for so many steps."""
        rates, reach = self.rates.current(), 0.0
        for group in self.groups:
            rate = rates[self.rates.keys[group.parameter]] * max(steps_left, 1.0)
            if rate <= 0:
                continue
            weight = group.of(self.parameters[group.parameter])
            norms = group_norms(weight, group.axis if group.axis is not None else 0)
            exempt = self._exempt(group)
            norms = norms if exempt is None else norms[~exempt]
            if not norms.numel():
                continue
            if group.axis is None:
                # everything shrinks, the lines that stay too: ask only for the typical line of those that go, and of
                # its part in one block
                across = max(1, round(weight.shape[1] / self._block_width(weight)))
                reach = max(reach, float(norms.median()) / across**0.5 / rate)
            else:
                reach = max(reach, 1.01 * float(norms.max()) / rate)
        return reach

    def _block_width(self, weight: Tensor) -> float:
        shape, grid = self.blocks["block_shape"], self.blocks["block_grid"]
        return min(shape[1], weight.shape[1]) if shape else weight.shape[1] / (grid[1] if grid else 1)

    @torch.no_grad()
    def apply(self, strength: float, pending: Mapping[GroupKey, float]) -> None:
        """Shrink the weights in place."""
        for group in self.groups:
            weight = self.parameters[group.parameter]
            step = strength * pending.get(self.rates.keys[group.parameter], 0.0)
            if step == 0:
                continue
            if group.axis is None:
                self.regularizer.factors(weight, step, **self.blocks)
                continue
            factors = self.regularizer.factors(group_norms(group.of(weight), group.axis), step)
            exempt = self._exempt(group)
            if exempt is not None:
                factors = factors.masked_fill(exempt, 1.0)
            group.scale_(weight, factors)

    def add_gradient(self, strength: float, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradient of strength * penalty."""
        for group in self.groups:
            target = gradients.get(group.parameter)
            if target is None:
                continue
            with torch.enable_grad():
                weight = self.parameters[group.parameter].detach().requires_grad_()
                if group.axis is None:
                    penalty = self.regularizer.penalty(weight, **self.blocks)
                else:
                    norms = group_norms(group.of(weight), group.axis)
                    exempt = self._exempt(group)
                    penalty = self.regularizer.penalty(norms if exempt is None else norms.masked_fill(exempt, 0.0))
                (slope,) = torch.autograd.grad(penalty, weight)
            target.add_(slope.to(target.dtype), alpha=strength)


def unit_costs(structures: Structures, metric: str) -> dict[str, float]:
    """What the removal of one unit saves, in multiply-accumulates or parameters; 1 each for the metric "units"."""
    if metric == "units":
        return {s.name: 1.0 for s in structures}
    cost = structures.macs if metric == "macs" else structures.params
    return {s.name: cost.derivative(s.name).evaluate(structures.counts) for s in structures}
