"""Integers of few bits in bytes: two of 4 bits, four of 2, eight of 1."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantizers.quantized import packed_bytes, slot_bits


def pack(integers: Tensor, low: int, bits: int) -> Tensor:
    """Integers one behind the other, the first in the lowest bits.

    Args:
        integers: of any shape, from ``low`` to ``low`` + 2 ** bits - 1.
        low: the smallest that may occur; it is stored as 0.
        bits: that an integer has, from 1 to 16; it takes the next of 1, 2, 4, 8 and 16.

    Returns:
        uint8, (bytes,). Slots that are not filled are 0.

    Raises:
        ValueError: for integers that these bits do not hold.
    """
    width = slot_bits(bits)
    moved = integers.reshape(-1).to(torch.int32) - low
    if moved.numel() and not (int(moved.min()) >= 0 and int(moved.max()) < 2**bits):
        raise ValueError(
            f"Expected integers from {low} to {low + 2**bits - 1}, which {bits} bits hold, but got some from "
            f"{int(moved.min()) + low} to {int(moved.max()) + low}."
        )
    if width == 16:
        return torch.stack([moved & 255, moved >> 8], 1).to(torch.uint8).reshape(-1)
    slots = 8 // width
    full = torch.nn.functional.pad(moved, (0, -moved.numel() % slots)).view(-1, slots)
    shifts = width * torch.arange(slots, dtype=torch.int32, device=integers.device)
    return (full << shifts).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...], low: int, bits: int) -> Tensor:
    """The integers that ``pack`` has packed.

    Returns:
        Of this shape, in the smallest of int8, int16 and int32 that holds all integers of these bits.

    Raises:
        ValueError: for another number of bytes than the shape takes.
    """
    elements = 1
    for size in shape:
        elements *= size
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.shape[0] != packed_bytes(elements, bits):
        raise ValueError(
            f"Expected {packed_bytes(elements, bits)} bytes for {elements} integers of {bits} bits, but got "
            f"{packed.dtype} of shape {tuple(packed.shape)}."
        )
    width = slot_bits(bits)
    if width == 16:
        pairs = packed.view(-1, 2).to(torch.int32)
        found = pairs[:, 0] + (pairs[:, 1] << 8)
    else:
        shifts = width * torch.arange(8 // width, dtype=torch.int32, device=packed.device)
        found = ((packed.to(torch.int32).unsqueeze(1) >> shifts) & (2**width - 1)).reshape(-1)[:elements]
    found = found + low
    size = next(n for n in (8, 16, 32) if -(2 ** (n - 1)) <= low and low + 2**bits <= 2 ** (n - 1))
    return found.to({8: torch.int8, 16: torch.int16, 32: torch.int32}[size]).reshape(shape)


__all__ = ["pack", "unpack"]
