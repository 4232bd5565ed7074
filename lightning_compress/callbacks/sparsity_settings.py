"""The arguments of StructuredSparsity, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_compress.callbacks.groups import Groups, regularizer_for
from lightning_compress.importance import Importance
from lightning_compress.regularizers import Regularizer, tprune_strategy
from lightning_compress.schedules import Shape, ramp
from lightning_compress.structures import check_kinds


@dataclass(frozen=True)
class SparsitySettings:
    """What `StructuredSparsity` was asked for; its docstring says what each argument means.

    Args:
        regularizer: the regularizer with its maps.
        groups: what it acts on.
        kinds: kinds of structures.
        mode: "proximal" or "loss".
        strength: None for automatic.
        importance: how units are ranked.
        trimmed: whether units that the budget keeps are exempt.
        block_shape: size of a block.
        block_grid: number of blocks.
        modules: patterns of modules.
        strategy: one of TPrune's strategies.
        decoder: modules that are its decoder.
        schedule: shape of the budget's ramp.
    """

    regularizer: Regularizer
    groups: Groups
    kinds: tuple[str, ...]
    mode: str
    strength: float | None
    importance: Importance
    trimmed: bool
    block_shape: tuple[int, int] | None
    block_grid: tuple[int, int] | None
    modules: tuple[str, ...] | None
    strategy: str | None
    decoder: tuple[str, ...]
    schedule: Shape

    @property
    def automatic(self) -> bool:
        """Whether a budget sets the strength."""
        return self.strength is None

    @classmethod
    def of(
        cls,
        regularizer: str,
        kinds: Sequence[str],
        mode: str,
        strength: float | Literal["auto"],
        importance: Importance,
        trimmed: bool | None,
        groups: str,
        block_shape: tuple[int, int] | None,
        block_grid: tuple[int, int] | None,
        modules: str | Sequence[str] | None,
        strategy: str | None,
        decoder: str | Sequence[str],
        schedule: Shape,
    ) -> SparsitySettings:
        """The settings, or ValueError saying what does not fit."""
        entry, acts_on = regularizer_for(regularizer, groups, strategy)
        if strategy is not None:
            tprune_strategy(strategy)
            kinds = ("qk_dim", "vo_dim", "ffn")
        if mode not in ("proximal", "loss"):
            raise ValueError(f"Expected mode to be 'proximal' or 'loss', but got {mode!r}.")
        automatic = isinstance(strength, str) and strength == "auto"
        if not automatic and (
            isinstance(strength, bool | str) or not isinstance(strength, int | float) or not 0 <= strength < math.inf
        ):
            raise ValueError(f"Expected strength to be 'auto' or a number of at least 0, but got {strength!r}.")
        if automatic and mode == "loss":
            raise ValueError(
                "Expected a number for the strength of mode='loss', but got 'auto': a penalty in the loss reaches no "
                "exact zero, so no strength meets a budget. Call "
                f"StructuredSparsity({regularizer!r}, mode='loss', strength=1e-4)."
            )
        if (block_shape or block_grid) and acts_on != "blocks":
            raise ValueError(
                f"Expected block_shape and block_grid with groups='blocks' only, but got groups={acts_on!r}. "
                "Call StructuredSparsity('block_group_lasso', block_grid=(2, 2))."
            )
        if modules is not None and acts_on == "coupled":
            raise ValueError(
                "Expected modules with groups='rows', 'columns' or 'blocks' only: coupled units span several modules. "
                "Choose kinds=..., or one part of the model with module=...."
            )
        whole = [kind for kind in check_kinds(kinds) if kind in ("layer", "expert")]
        if whole:
            raise ValueError(
                f"Expected kinds whose units can be shrunk to zero, but {whole} cannot: no weight makes them silent. "
                "Leave them to FinalizeCompression(kinds=...), which ranks and removes them as they are."
            )
        check_importance(importance)
        ramp(0.0, shape=schedule)  # an unknown schedule is refused now, not when the ramp begins
        return cls(
            entry,
            acts_on,
            check_kinds(kinds),
            mode,
            None if automatic else float(strength),
            importance,
            automatic if trimmed is None else trimmed,
            None if block_shape is None else (block_shape[0], block_shape[1]),
            None if block_grid is None else (block_grid[0], block_grid[1]),
            None if modules is None else _names(modules),
            strategy,
            _names(decoder),
            schedule,
        )


def check_importance(importance: Importance) -> None:
    """Raise ValueError unless units can be ranked by ``importance``."""
    if not (callable(importance) or (isinstance(importance, str) and importance in ("norm", "taylor"))):
        raise ValueError(f"Expected importance to be 'norm', 'taylor' or a function, but got {importance!r}.")


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {name} to be an integer of at least 1, but got {value!r}.")


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
