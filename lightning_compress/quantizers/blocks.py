"""Blocks of a weight that share a scale: the whole tensor, its rows, or groups of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

FORMS = "'tensor', 'row' or 'group:K' with K elements of a row"


@dataclass(frozen=True)
class Scope:
    """Which elements share a scale.

    Args:
        text: "tensor", all of them; "row", those with the same first index, as the weights of one output; "group:K",
            K neighbours of a row.

    Raises:
        ValueError: for another text.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text not in ("tensor", "row") and self.group is None:
            raise ValueError(f"Expected scope to be {FORMS}, but got {self.text!r}. For example: scope='group:64'.")

    @property
    def group(self) -> int | None:
        """Elements of a group; None where rows are not divided."""
        found = re.fullmatch(r"group:([1-9][0-9]{0,8})", self.text) if isinstance(self.text, str) else None
        return int(found[1]) if found else None

    def split(self, weight: Tensor) -> Tensor:
        """The weight as (blocks, elements of a block).

        Raises:
            ValueError: if a row is no multiple of the group.
        """
        if self.text == "tensor" or weight.dim() == 0:
            return weight.reshape(1, -1)
        if self.text == "row":
            return weight.reshape(weight.shape[0], -1)
        assert self.group is not None
        row = weight[0].numel() if weight.shape[0] else 0
        if row % self.group:
            raise ValueError(
                f"Expected rows that are a multiple of {self.group}, for scope={self.text!r}, but got a weight of "
                f"shape {tuple(weight.shape)} with rows of {row}. Choose a divisor of {row}, or scope='row'."
            )
        return weight.reshape(-1, self.group)

    def blocks(self, shape: tuple[int, ...]) -> int:
        """Number of blocks of a weight of this shape."""
        if self.text == "tensor" or not shape:
            return 1
        if self.group is None:
            return shape[0]
        elements = 1
        for size in shape:
            elements *= size
        return elements // self.group


__all__ = ["Scope"]
