"""What StructuredSparsity does; the callback itself decides only when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.budget import select
from lightning_compress.callbacks.groups import chosen_groups
from lightning_compress.callbacks.norm_masks import NormMasks
from lightning_compress.callbacks.plain_copy import reshard
from lightning_compress.callbacks.session import CompressionSession
from lightning_compress.callbacks.shrinkage import CoupledShrinkage, MatrixShrinkage, unit_costs
from lightning_compress.callbacks.sparsity_settings import SparsitySettings
from lightning_compress.importance import TaylorAccumulator, unit_norms, unit_scores
from lightning_compress.schedules import ramp
from lightning_compress.structures import Structure

# The budget is asked anew after each of so many equal parts of the sparsifying phase.
REFRESHES = 50
# First-order scores are noisy but cheap to average: one update in so many optimizer steps.
TAYLOR_EVERY = 4
TAYLOR_DECAY = 0.95


class Sparsifier:
    """Shrinks the groups of one model towards a budget.

    Positions are parts of the way from the beginning of the fit (0) to the last removal (1).

    Args:
        settings: what was asked for.
        session: the session of the fit.
        start: position at which sparsifying begins.
        origin: position of the fit now, when the optimizers have made no step yet.

    Attributes:
        strength: the strength as it is now.
        dead: structure name -> bool of shape (units,): which units were zero when the budget was asked last.
    """

    def __init__(self, settings: SparsitySettings, session: CompressionSession, start: float, origin: float) -> None:
        self.settings = settings
        self.session = session
        self.start = start
        self.strength = settings.strength or 0.0
        self.dead: dict[str, Tensor] = {}
        self._origin = origin
        self._steps_at_origin = session.steps.count
        self._shrinkage: CoupledShrinkage | MatrixShrinkage | None = None
        self._taylor: TaylorAccumulator | None = None
        self._version = -1
        self._refreshed_at = -math.inf
        self._protected: dict[str, Tensor] | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._masks = NormMasks()
        session.before_removal.append(self._masks.remove)
        self._pending = session.steps.pending()

    # Groups

    def follow(self) -> None:
        """Make the groups those of the structures as they are now, after a removal for instance."""
        session, settings = self.session, self.settings
        if session.sharded and session.traced is not None:
            reshard(session.traced)  # the shards are what is optimized
        if self._version == session.version:
            return
        assert session.structures is not None and session.traced is not None
        session.steps.forget_owners()
        parameters = session.parameters()
        own = self._own_structures()
        if settings.groups == "coupled":
            finalizer = session.finalizer
            costs = unit_costs(session.structures, "macs") if finalizer is None else finalizer.unit_costs()
            self._shrinkage = CoupledShrinkage(parameters, own, settings.regularizer, session.steps, costs)
        else:
            lines = chosen_groups(
                parameters, own, settings.groups, settings.modules, settings.strategy, settings.decoder
            )
            self._shrinkage = MatrixShrinkage(
                parameters, lines, settings.regularizer, session.steps, settings.block_shape, settings.block_grid
            )
        if not self._shrinkage.rates.keys:
            raise ValueError(
                f"Expected the parameters of {[s.name for s in own]} to be trained, but no optimizer of the Trainer "
                "holds one that requires a gradient. Unfreeze them, or choose other kinds or another module."
            )
        if settings.importance == "taylor":
            self._taylor = TaylorAccumulator(session.traced, session.structures, decay=TAYLOR_DECAY)
        self._version = session.version
        self._refreshed_at = -math.inf
        self.dead = {}
        if self._resumed is not None and self._resumed["version"] == session.version:
            self._restore_groups(self._resumed)
        self._resumed = None

    def _own_structures(self) -> list[Structure]:
        structures = self.session.structures
        assert structures is not None
        own = [s for s in structures if s.kind in self.settings.kinds]
        if not own:
            raise ValueError(
                f"Expected structures of kinds {self.settings.kinds} for StructuredSparsity, but only "
                f"{sorted({s.kind for s in structures})} can be removed. Choose among these."
            )
        return own

    def close(self) -> None:
        """Let go of the model after the fit."""
        self._masks.remove()
        self._shrinkage = None
        self._taylor = None

    def alive(self) -> dict[str, int]:
        """Structure name -> units that are not zero, of the structures looked at since the last removal."""
        if self._version != self.session.version:
            return {}
        return {name: int((~dead).sum()) for name, dead in self.dead.items()}

    # Steps

    @property
    def waiting(self) -> int:
        """Optimizer steps that have not been acted on yet."""
        return self._pending.count

    def skip_pending(self) -> None:
        """Take the steps so far as acted on."""
        self._pending.take()

    def apply_pending(self) -> None:
        """Apply the proximal map for all optimizer steps since the last time."""
        if self._shrinkage is None or not self.waiting:
            return
        pending = self._pending.take()
        if self.settings.mode == "proximal" and self.strength > 0:
            self._shrinkage.apply(self.strength, pending)

    def read_gradients(self, optimizer: Optimizer) -> None:
        """Before an optimizer step: gradients for the importance; in mode "loss", the penalty's gradient into them."""
        if self._taylor is not None and (self.session.steps.count - self._steps_at_origin) % TAYLOR_EVERY == 0:
            self._taylor.update()
        if self.settings.mode == "loss" and self._shrinkage is not None and self.strength > 0:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = self.session.parameters()
            gradients = {n: p.grad for n, p in named.items() if p.grad is not None and id(p) in own}
            self._shrinkage.add_gradient(self.strength, gradients)

    # The budget

    def scores(self) -> dict[str, Tensor]:
        """Score of every unit by structure name, now: the larger, the more is lost without it."""
        if self._shrinkage is not None:
            self._shrinkage.observe()
        return self._observed_scores()

    def _observed_scores(self) -> dict[str, Tensor]:
        session, own = self.session, self._shrinkage
        assert session.traced is not None and session.structures is not None
        importance = self.settings.importance
        if self._taylor is not None:
            try:
                scores = self._taylor.scores()
            except ValueError:  # no gradient has been seen yet: begin with the norms
                scores = {n: v.square() for n, v in unit_norms(session.traced, session.structures).items()}
        elif (
            importance == "norm"
            and isinstance(own, CoupledShrinkage)
            and own.complete
            and len(own.structures) == len(session.structures)
        ):
            return own.scores()
        else:
            scores = unit_scores(session.traced, session.structures, importance)
        if isinstance(own, CoupledShrinkage):
            # a unit that is zero goes first, whatever it was worth when it was not
            scores.update({n: scores[n].masked_fill(dead, 0.0) for n, dead in own.dead().items()})
        return scores

    def due(self, position: float) -> bool:
        """Whether it is time to ask the budget again."""
        return position >= self._refreshed_at + (1 - self.start) / REFRESHES

    @property
    def unasked(self) -> bool:
        """Whether the budget has not been asked yet about the structures as they are."""
        return self._refreshed_at == -math.inf

    def refresh(self, position: float, optimizers: Iterable[Optimizer]) -> None:
        """Ask the budget anew which units stay, adapt the strength, and look at what is dead."""
        session, settings, finalizer = self.session, self.settings, self.session.finalizer
        assert self._shrinkage is not None and session.structures is not None
        self._refreshed_at = position
        self._shrinkage.observe()
        if finalizer is not None and (settings.trimmed or settings.automatic):
            done = min(1.0, max(0.0, (position - self.start) / (1 - self.start)))
            target = ramp(done, begin_value=1.0, end_value=finalizer.fraction, shape=settings.schedule)
            options = finalizer.options(max(target, finalizer.fraction))
            structures = session.structures
            self._protect(
                session.processes.agreed(
                    "ask the budget", lambda: select(structures, self._observed_scores(), **options)
                )
            )
            if settings.automatic:
                steps, shrinkage = self._steps_left(position, finalizer.next_position(self.start)), self._shrinkage
                self.strength = session.processes.agreed("set the strength", lambda: shrinkage.strength(steps))
            if not settings.trimmed:
                self._protect({s.name: torch.zeros(s.units, dtype=torch.bool) for s in session.structures})
        if isinstance(self._shrinkage, CoupledShrinkage) and settings.mode == "proximal":
            self._bury(self._shrinkage, optimizers)

    def _protect(self, protected: Mapping[str, Tensor]) -> None:
        assert self._shrinkage is not None
        self._protected = dict(protected)
        self._shrinkage.protect(protected)

    def _steps_left(self, position: float, until: float) -> float:
        """Optimizer steps until a position, at the pace of this fit so far."""
        steps: float = self.session.steps.count - self._steps_at_origin
        # several optimizers step in turn: the pace of one of them is what counts
        steps /= max(1, len(self.session.steps.optimizers))
        way = position - self._origin
        # nine tenths of them: gradients pull back, and what is to go should be gone when removal comes
        return max(1.0, 0.9 * steps / way * (until - position)) if way > 0 else 1.0

    def _bury(self, shrinkage: CoupledShrinkage, optimizers: Iterable[Optimizer]) -> None:
        """Forget the momentum of units that are zero, or it would bring them back."""
        self.dead = self.session.processes.agreed("see which units are zero", shrinkage.dead)
        flat = torch.cat([self.dead[s.name] for s in shrinkage.structures])
        if not bool(flat.any()):
            return
        assert self.session.traced is not None
        self._masks.follow(self.session.traced, shrinkage.structures, self.dead)
        parameters = self.session.parameters()
        moments: dict[str, list[Tensor]] = {name: [] for name in shrinkage.rates.keys}
        for optimizer in optimizers:
            for name, tensors in moments.items():
                parameter = parameters[name]
                state = optimizer.state.get(parameter, {})
                tensors += [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        shrinkage.groups.zero_(flat, moments)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Strength, scores, what is protected and what is dead, and how far the steps have been acted on."""
        return {
            "strength": self.strength,
            "version": self._version,
            "origin": self._origin,
            "steps": self.session.steps.count - self._steps_at_origin,
            "pending_steps": self.waiting,
            "pending": [(list(key), total) for key, total in self._pending.sums.items()],
            "refreshed_at": self._refreshed_at,
            "protected": self._protected,
            "alive": self._shrinkage.alive.cpu() if isinstance(self._shrinkage, CoupledShrinkage) else None,
            "taylor": None if self._taylor is None else self._taylor.state_dict(),
            "masked": self._masks.gone,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, before the first step of the resumed fit."""
        self.strength = state["strength"]
        self._origin = state["origin"]
        self._steps_at_origin -= state["steps"]
        # what was not acted on yet when the checkpoint was written
        self._pending.count = state["pending_steps"]
        self._pending.sums = {(key[0], key[1]): value for key, value in state["pending"]}
        self._resumed = state

    def _restore_groups(self, state: Mapping[str, Any]) -> None:
        self._refreshed_at = state["refreshed_at"]
        if self._taylor is not None and state["taylor"] is not None:
            self._taylor.load_state_dict(state["taylor"])
        if state["protected"] is not None:
            self._protect(state["protected"])
        if isinstance(self._shrinkage, CoupledShrinkage) and state["alive"] is not None:
            self._shrinkage.alive = state["alive"].to(self._shrinkage.alive)
            assert self.session.traced is not None
            self._masks.follow(self.session.traced, self._shrinkage.structures, state["masked"])
