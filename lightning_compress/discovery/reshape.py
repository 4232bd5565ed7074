"""Dimensions of a view.

Old and new dimensions line up where their cumulative sizes do, so equal sizes never confuse it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.discovery.axes import Axis, AxisMismatch, flat, pin, regroup, split

MISMATCH = "it is viewed as dimensions that do not line up with it"


def view(dims: Sequence[Axis | None], old: Sequence[int], new: Sequence[int]) -> list[Axis | None]:
    """Dimensions of ``tensor.view(new)`` for a tensor of shape ``old``; neither may be empty.

    Dimensions that cannot be lined up are pinned.
    """
    i = j = 0
    result: list[Axis | None] = []
    while i < len(old) or j < len(new):
        group_old, group_new = [], []
        count_old = count_new = 1
        if i < len(old):
            group_old.append(i)
            count_old = old[i]
            i += 1
        if j < len(new):
            group_new.append(j)
            count_new = new[j]
            j += 1
        while count_old != count_new:
            if count_old < count_new:
                count_old *= old[i]
                group_old.append(i)
                i += 1
            else:
                count_new *= new[j]
                group_new.append(j)
                j += 1
        source = [axis for axis in (dims[k] for k in group_old) if axis is not None]
        sizes = [new[k] for k in group_new if new[k] != 1]
        try:
            if not sizes:
                lined_up: list[Axis] = []
            elif len(source) == 1 and len(sizes) == 1:
                lined_up = source  # untouched, so that copies stay apart
            elif len(source) == 1:
                lined_up = split(source[0], sizes)
            else:
                lined_up = regroup([part for axis in source for part in _open(axis)], sizes)
        except AxisMismatch:  # the dimensions beside this group do line up
            for axis in source:
                pin(axis, MISMATCH)
            lined_up = [Axis(size, [MISMATCH]) for size in sizes]
        position = iter(lined_up)
        result += [next(position) if new[k] != 1 else None for k in group_new]
    return result


def _open(axis: Axis) -> list[Axis]:
    """Factors of a product; an axis whose copies are told apart stays closed."""
    return [axis] if axis.copies is not None else flat(axis, "product")
