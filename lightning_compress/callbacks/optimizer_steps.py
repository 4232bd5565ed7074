"""Watching optimizers: which of them really stepped, how often, and with which learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

GroupKey = tuple[int, int]  # number of the optimizer, number of its parameter group


@dataclass
class PendingSteps:
    """Steps that somebody has not acted on yet.

    The sums begin at zero each time they are acted on: differences of ever larger totals would depend, in their last
    bits, on what had been summed up before, and a resumed fit would not repeat the one that was interrupted.

    Args:
        count: how many.
        sums: sum of the learning rates of these steps, of every group that has stepped.
    """

    count: int = 0
    sums: dict[GroupKey, float] = field(default_factory=dict)

    def take(self) -> dict[GroupKey, float]:
        """The sums; they are acted on now."""
        sums, self.count, self.sums = self.sums, 0, {}
        return sums


class OptimizerSteps:
    """Counts the real steps of optimizers and sums up the learning rate of each parameter group over them.

    A hook on the optimizer itself sees exactly the steps that happen: not the micro-batches of gradient accumulation,
    not a step that a gradient scaler skips, each step of each optimizer under manual optimization; and it sees the
    learning rate of that very step, before a scheduler changes it. A decoupled regularizer shrinks by the sums of its
    ``pending`` steps, so that steps it did not act on at once are not lost.

    Attributes:
        count: steps of all optimizers.
        optimizers: the optimizers that are watched.
    """

    def __init__(self) -> None:
        self.count = 0
        self.optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._pending: list[PendingSteps] = []
        self._rates: dict[GroupKey, float] = {}
        self._owner: dict[int, GroupKey] = {}

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Watch ``optimizers``; those that are watched already are not watched twice.

        Raises:
            TypeError: for an optimizer that is not a ``torch.optim.Optimizer``.
        """
        for optimizer in optimizers:
            if any(optimizer is known for known in self.optimizers):
                continue
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"Expected optimizers to be torch.optim.Optimizer, whose steps can be observed, but got "
                    f"{type(optimizer).__name__}."
                )
            number = len(self.optimizers)
            self.optimizers.append(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._hook(number)))
        self._owner.clear()

    def detach(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.optimizers.clear()
        self._owner.clear()

    def _hook(self, number: int) -> Any:
        def stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # a fused optimizer under a gradient scaler is called for a step that it then skips by itself
            found_inf = getattr(optimizer, "found_inf", None)
            if isinstance(found_inf, Tensor) and bool(found_inf.item()):
                return
            self.count += 1
            for pending in self._pending:
                pending.count += 1
            for group, options in enumerate(optimizer.param_groups):
                key = (number, group)
                self._rates[key] = float(options["lr"])
                for pending in self._pending:
                    pending.sums[key] = pending.sums.get(key, 0.0) + self._rates[key]

        return stepped

    def owner(self, parameter: Tensor) -> GroupKey | None:
        """Where ``parameter`` is optimized: the first optimizer and group that hold it; None if nowhere."""
        if not self._owner:
            for number, optimizer in enumerate(self.optimizers):
                for group, options in enumerate(optimizer.param_groups):
                    for p in options["params"]:
                        self._owner.setdefault(id(p), (number, group))
        return self._owner.get(id(parameter))

    def forget_owners(self) -> None:
        """Look the owners up anew: parameter groups may have been added."""
        self._owner.clear()

    def pending(self) -> PendingSteps:
        """A new account of the steps from now on, for one who acts on them."""
        self._pending.append(PendingSteps())
        return self._pending[-1]

    def learning_rate(self, key: GroupKey) -> float:
        """Learning rate of the last step of the group, 0.0 before the first."""
        return self._rates.get(key, 0.0)
