"""Parameters of which a process holds a part: where that part lies, and what all parts sum up to.

A parameter that torch shards is a DTensor. It has the shape of the whole; its memory is one block of positions along
one axis (blocks of the last processes may be smaller, or empty).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: object) -> bool:
    """Whether a tensor belongs to several processes together."""
    # without this import, which is slow, there is no such tensor
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The memory that this process holds of a tensor: all of an ordinary one."""
    if not is_spread(tensor):
        part: Tensor = tensor
        return part
    with torch.no_grad():
        part = tensor.to_local()
    return part


def whole(tensor: Any) -> Tensor:
    """All of a tensor, in every process that holds a part of it; all of them call this together."""
    if not is_spread(tensor):
        full: Tensor = tensor
        return full
    with torch.no_grad():
        # parts that are kept on the CPU travel between the devices of the mesh
        full = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    return full


@dataclass(frozen=True)
class Part:
    """The block of a tensor that this process holds.

    Args:
        axis: the axis that is split; None where the process holds all.
        start: position of its first element along that axis.
        stop: one behind the last.
        group: the processes that hold the other blocks; None where this one holds all.
    """

    axis: int | None = None
    start: int = 0
    stop: int = 0
    group: Any = None

    @classmethod
    def of(cls, tensor: Any, name: str = "a parameter") -> Part:
        """Where the memory of ``tensor`` in this process lies.

        Raises:
            ValueError: for a tensor that is split otherwise than in blocks along one axis.
        """
        if not is_spread(tensor):
            return cls()
        mesh, placements = tensor.device_mesh, tensor.placements
        split = [number for number, placement in enumerate(placements) if not placement.is_replicate()]
        if not split:
            return cls()
        placement = placements[split[0]]
        if len(split) > 1 or type(placement).__name__ != "Shard":
            raise ValueError(
                f"Expected {name!r} to be split in blocks along one axis, as fully_shard does, but its placements are "
                f"{placements}. Use tensor_parallel_size=1, or compress under strategy='ddp'."
            )
        axis = int(placement.dim)
        size, count, rank = tensor.shape[axis], mesh.size(split[0]), mesh.get_local_rank(split[0])
        block = -(-size // count)  # the size of all blocks but the last
        start, stop = min(rank * block, size), min((rank + 1) * block, size)
        held = local(tensor).shape[axis]
        if held != stop - start:
            raise ValueError(
                f"Expected process {rank} to hold positions {start} to {stop} of axis {axis} of {name!r}, but it holds "
                f"{held}. Compress under strategy='ddp'."
            )
        return cls(axis, start, stop, mesh.get_group(split[0]))

    def along(self, axis: int, size: int) -> slice:
        """The positions of one axis, of that size in the whole tensor, that this process holds."""
        return slice(self.start, self.stop) if axis == self.axis else slice(0, size)

    def positions(self, axis: int, positions: Tensor) -> Tensor:
        """Which of ``positions`` of the whole tensor this process holds, counted from its own first one."""
        if axis != self.axis:
            return positions
        return positions[(positions >= self.start) & (positions < self.stop)] - self.start

    def total(self, values: Tensor, axis: int, size: int) -> Tensor:
        """Sum over all processes of one value per position of an axis, of which this one has those that it holds.

        Args:
            values: shape (positions of the axis that this process holds,).
            axis: the axis.
            size: its size in the whole tensor.

        Returns:
            Shape (size,).
        """
        if self.group is None:
            return values
        everything = values.new_zeros(size)
        everything[self.along(axis, size)] = values
        return add_up(everything, self.group)


def add_up(values: Tensor, group: Any) -> Tensor:
    """Sum of ``values`` over the processes of a group, in place; None is this process alone."""
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values


@torch.no_grad()
def zero_positions(tensors: Iterable[Tensor], axis: int, positions: Tensor) -> None:
    """Set positions of one axis of whole tensors to zero, each process in its part."""
    for tensor in tensors:
        own = local(tensor)
        own.index_fill_(axis, Part.of(tensor).positions(axis, positions).to(own.device), 0)


__all__ = ["Part", "add_up", "is_spread", "local", "whole", "zero_positions"]
