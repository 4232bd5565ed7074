"""The arguments of TokenPruning, checked before anything happens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_compress.tokens.runtime import FILLS


def check_settings(
    macs: float | None,
    strength: float | None,
    method: str,
    mode: str,
    start: float | None,
    hard_at: float | None,
    learning_rate: float | None,
    temperature: Sequence[float] | None,
    min_keep: int,
    fill: str | None,
) -> None:
    """Raise ValueError for arguments of ``TokenPruning`` that contradict each other or are out of range."""
    if method not in ("learned", "top_k", "linear"):
        raise ValueError(f"Expected method to be 'learned', 'top_k' or 'linear', but got {method!r}.")
    if mode not in ("recommended", "faithful"):
        raise ValueError(f"Expected mode to be 'recommended' or 'faithful', but got {mode!r}.")
    if macs is None and strength is None and mode != "faithful":
        raise ValueError("Expected a target, macs or strength, but got none. For example: TokenPruning(macs=0.5).")
    if macs is not None and not 0 < macs <= 1:
        raise ValueError(
            f"Expected macs, the fraction of the multiply-accumulates that is kept, to be in (0, 1], but got {macs!r}. "
            "To keep half: macs=0.5."
        )
    if strength is not None and not 0 <= strength < math.inf:
        raise ValueError(f"Expected strength, the weight of the masks in the loss, to be at least 0, got {strength!r}.")
    if macs is not None and strength is not None and mode != "faithful":
        raise ValueError(
            f"Expected macs or strength, but got macs={macs:g} and strength={strength:g}: the target sets the "
            "strength. With mode='faithful' both go together."
        )
    if method != "learned" and (macs is None or strength is not None or mode != "recommended"):
        raise ValueError(
            f"Expected TokenPruning(macs=..., method={method!r}) without strength and mode, because nothing is "
            f"learned, but got macs={macs}, strength={strength} and mode={mode!r}."
        )
    if start is not None and not 0 <= start < 1:
        raise ValueError(f"Expected start, a fraction of the fit, to be in [0, 1), but got {start}.")
    if hard_at is not None and not (start or 0) < hard_at <= 1:
        raise ValueError(
            f"Expected hard_at, a fraction of the fit after start={start or 0:g}, to be at most 1, but got {hard_at}."
        )
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"Expected learning_rate of the thresholds to be above 0, but got {learning_rate}.")
    if temperature is not None and (len(temperature) != 2 or not all(0 < t < math.inf for t in temperature)):
        raise ValueError(f"Expected temperature to be two numbers above 0, first and last, but got {temperature}.")
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 1:
        raise ValueError(f"Expected min_keep, tokens that stay in every example, to be at least 1, but got {min_keep}.")
    if fill not in (None, *FILLS):
        raise ValueError(f"Expected fill to be None or one of {list(FILLS)}, but got {fill!r}.")


__all__ = ["check_settings"]
