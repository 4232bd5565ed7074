"""Packed integers: the size is the arithmetic, and what comes out is what went in."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.quantizers import Binary, Stochastic, Uniform, pack, packed_bytes, unpack

SLOTS = {1: 8, 2: 4, 3: 2, 4: 2, 5: 1, 7: 1, 8: 1}  # integers in a byte


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 9, 16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (4, 3, 2)])
@pytest.mark.parametrize("signed", [True, False])
def test_round_trip(bits: int, shape: tuple[int, ...], signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    integers = torch.randint(low, low + 2**bits, shape, generator=torch.Generator().manual_seed(0))
    packed = pack(integers, low, bits)
    elements = integers.numel()
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(elements, bits)
    assert packed.numel() == (2 * elements if bits > 8 else -(-elements // SLOTS[bits]))
    found = unpack(packed, shape, low, bits)
    assert torch.equal(found.long(), integers)
    assert found.dtype.is_signed and torch.iinfo(found.dtype).max >= low + 2**bits - 1


def test_the_first_integer_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3, 0, 2]), 0, 2).tolist() == [0b00_11_10_01, 0b10]
    assert pack(torch.tensor([-1, 1]), -1, 4).tolist() == [0b0010_0000]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from -2 to 1, which 2 bits hold, but got some from -2 to 2"):
        pack(torch.tensor([-2, 2]), -2, 2)
    with pytest.raises(ValueError, match=r"2 bytes for 5 integers of 2 bits, but got torch.uint8 of shape \(3,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), (5,), 0, 2)
    with pytest.raises(ValueError, match=r"but got torch.int8 of shape \(2,\)"):
        unpack(torch.zeros(2, dtype=torch.int8), (5,), 0, 2)


def test_sizes_of_weights() -> None:
    weight = torch.randn(16, 64)
    assert Uniform(8).quantize(weight).bytes == 1024 + 16 * 4
    assert Uniform(4).quantize(weight).bytes == 512 + 16 * 4
    assert Uniform(4, "group:32").quantize(weight).bytes == 512 + 32 * 4
    assert Uniform(2).quantize(weight).bytes == 256 + 16 * 4
    assert Uniform(8, symmetric=False).quantize(weight).bytes == 1024 + 2 * 16 * 4
    assert Binary().quantize(weight).bytes == 128 + 2 * 16 * 4
    assert Stochastic(8, strict=False).quantize(weight).bytes == 2048 + 16 * 4
