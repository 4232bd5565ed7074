"""A weight as packed integers: the buffers that a module has in its place, and the values that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.operators import dequantize
from lightning_compress.quantizers import Grid, Quantized, Quantizer, Scope, pack, packed_bytes, unpack
from lightning_compress.quantizers.quantized import slot_bits

GRAPH = "graph_"  # in front of the name of a parameter: of the buffer with its integers, in a graph
HALF = (torch.float16, torch.bfloat16)
WORDS = {4: torch.int16, 2: torch.int32, 1: torch.int64}  # with a byte for every slot, by its bits


@dataclass(frozen=True)
class PackedForm:
    """What the bytes mean.

    Args:
        quantizer: that made the integers.
        low: the smallest integer.
        high: the largest integer.
        bits: of an integer.
        shape: of the weight.
        dtype: of the weight.
        offset: whether blocks have an offset.
    """

    quantizer: Quantizer
    low: int
    high: int
    bits: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: bool

    @classmethod
    def of(cls, quantizer: Quantizer, quantized: Quantized) -> PackedForm:
        """That of these integers."""
        grid, shape = quantized.grid, tuple(quantized.integers.shape)
        return cls(quantizer, grid.low, grid.high, quantized.bits, shape, quantized.dtype, grid.offset is not None)

    @property
    def scope(self) -> Scope:
        """Which elements share a scale."""
        return Scope(self.quantizer.scope)

    @property
    def elements(self) -> int:
        """Of the weight."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales and offsets, at least float32."""
        return torch.float32 if self.dtype in HALF else self.dtype

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what is stored, by suffix."""
        blocks = (self.scope.blocks(self.shape), 1)
        found = {
            "packed": (torch.uint8, (packed_bytes(self.elements, self.bits),)),
            "scale": (self.scale_dtype, blocks),
        }
        if self.offset:
            found["offset"] = (self.scale_dtype, blocks)
        return found

    @property
    def bytes(self) -> int:
        """Of everything that is stored."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.tensors.values())


def packed_tensors(quantized: Quantized) -> dict[str, Tensor]:
    """What is stored of these integers, by suffix."""
    grid = quantized.grid
    found = {"packed": pack(quantized.integers, grid.low, quantized.bits), "scale": grid.scale}
    if grid.offset is not None:
        found["offset"] = grid.offset
    return found


class PackedWeight:
    """One weight that is stored as integers, in buffers of the module that held it first.

    Attributes:
        name: of the parameter that there was, the first of several.
        form: what the bytes mean.
        owner: the module that has the buffers.
        key: name of the parameter in it; buffers are called ``weight_packed``, ``weight_scale``, ``weight_offset``.
        kept: whether values are computed once and kept, or at every read.
        version: changes with the buffers.
        in_graph: whether it is part of a graph for another runtime, and its integers are a buffer.
    """

    def __init__(self, name: str, form: PackedForm, owner: nn.Module, key: str, kept: bool) -> None:
        self.name, self.form, self.owner, self.key, self.kept = name, form, owner, key, kept
        self.version = 0
        self.in_graph = False
        self._values: Tensor | None = None

    def buffer(self, suffix: str) -> Tensor:
        """One of the buffers: packed, scale or offset."""
        tensor = self.owner._buffers[buffer_name(self.key, suffix)]
        assert tensor is not None
        return tensor

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.buffer("packed").device

    def quantized(self) -> Quantized:
        """The integers."""
        form = self.form
        integers = unpack(self.buffer("packed"), form.shape, form.low, form.bits)
        if integers.dtype == torch.int16 and form.low >= -128 and form.high <= 127:
            integers = integers.to(torch.int8)
        return Quantized(integers, self._grid(), form.scope, form.bits, form.dtype)

    def values(self) -> Tensor:
        """The weight."""
        if self.in_graph:
            return self._of_graph()
        if not self.kept:
            return self._dequantized()
        if self._values is None:
            with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode is no good outside of it
                self._values = self._dequantized()
        return self._values

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, (*ids, ...): only they are unpacked."""
        form, flat = self.form, ids.reshape(-1)
        rows, row = form.shape[0], form.elements // max(1, form.shape[0])
        width, packed = slot_bits(form.bits), self.buffer("packed")
        if self.in_graph:
            integers = self._integers.index_select(0, flat).reshape(-1, row).to(form.scale_dtype)
        elif row * width % 8 == 0:
            integers = self._numbers(packed.view(rows, -1).index_select(0, flat).reshape(-1)).view(-1, row)
        else:  # rows begin within a byte
            flat = torch.arange(rows, device=flat.device).index_select(0, flat)  # refuses what lies outside
            places = (flat.unsqueeze(1) * row + torch.arange(row, device=flat.device)) * width
            found = packed.index_select(0, (places // 8).reshape(-1)).to(torch.int32).view(places.shape)
            integers = ((found >> (places % 8)) & (2**width - 1)).to(form.scale_dtype) + form.low
        grid = self._grid()
        if form.scope.text != "tensor":
            parts = (None if part is None else part.view(rows, -1, 1) for part in (grid.scale, grid.offset))
            scale, offset = (None if part is None else part.index_select(0, flat).reshape(-1, 1) for part in parts)
            assert scale is not None
            grid = replace(grid, scale=scale, offset=offset)
        values = grid.values(integers.reshape(-1, form.scope.group or max(1, row)))
        return values.reshape(*ids.shape, *form.shape[1:]).to(form.dtype)

    def follow(self, change: Callable[[Tensor], Tensor], before: dict[str, Tensor]) -> None:
        """Take part in ``Module._apply``: the weight gets the type that it would have got, scales stay wide enough.

        Args:
            change: the function that was applied to all tensors.
            before: the buffers that there were, by suffix.
        """
        dtype = change(torch.empty(0, dtype=self.form.dtype, device=before["packed"].device)).dtype
        self.form = replace(self.form, dtype=dtype)
        for suffix, tensor in before.items():
            now = self.buffer(suffix)
            if suffix != "packed" and now.dtype != self.form.scale_dtype:
                self.owner._buffers[buffer_name(self.key, suffix)] = tensor.to(now.device, self.form.scale_dtype)
        self.changed()

    def changed(self) -> None:
        """Forget what was made of the buffers."""
        self.version += 1
        self._values = None

    def _grid(self) -> Grid:
        offset = self.buffer("offset") if self.form.offset else None
        return Grid(self.form.low, self.form.high, self.buffer("scale"), offset)

    @property
    def _integers(self) -> Tensor:
        integers = self.owner._buffers[GRAPH + self.key]
        assert integers is not None
        return integers

    def _of_graph(self) -> Tensor:
        integers, grid = self.form.scope.split(self._integers), self._grid()
        if integers.dtype == torch.int8 and grid.scale.dtype == torch.float32:
            values = dequantize(integers, grid.scale.reshape(-1))
            values = values if grid.offset is None else values + grid.offset
        else:
            values = grid.values(integers)
        return values.reshape(self.form.shape).to(self.form.dtype)

    def _dequantized(self) -> Tensor:
        integers = self._numbers(self.buffer("packed"))[: self.form.elements].view(self.form.shape)
        values = self._grid().values(self.form.scope.split(integers))
        return values.reshape(self.form.shape).to(self.form.dtype)

    def _numbers(self, packed: Tensor) -> Tensor:
        """Integers of these bytes, those of slots that are not filled, too, (integers,), in the type of the scale.

        ``unpack`` says the same; this takes less than half of the time, which every forward pass waits for.
        """
        width, low, dtype = slot_bits(self.form.bits), self.form.low, self.form.scale_dtype
        if width == 8:
            return packed.to(dtype).add_(low)
        if width == 16:
            pairs = packed.view(-1, 2).to(dtype)
            return pairs[:, 0] + 256 * pairs[:, 1] + low
        bytes_ = torch.arange(256, dtype=torch.int32, device=packed.device).unsqueeze(1)
        shifts = width * torch.arange(8 // width, dtype=torch.int32, device=packed.device)
        slots = ((bytes_ >> shifts) & (2**width - 1)).to(torch.uint8)
        # the slots of a byte as one number, so that looking them up moves whole words
        table = slots.view(WORDS[width]).reshape(-1)
        return table.index_select(0, packed.int()).view(torch.uint8).to(dtype).add_(low)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update({**vars(self), "_values": None})
        copied.owner = copy.deepcopy(self.owner, memo)
        return copied


def buffer_name(key: str, suffix: str) -> str:
    """Of a buffer of the parameter ``key``."""
    return f"{key}_{suffix}"


__all__ = ["GRAPH", "PackedForm", "PackedWeight", "buffer_name", "packed_tensors"]
