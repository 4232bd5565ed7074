"""Safetensors files read and written one tensor at a time.

    8 bytes: length of the header | header, JSON: name -> dtype, shape, offsets | data

The header says where every tensor lies, so a file can be copied tensor by tensor: what is not changed is never in
memory, and what is changed is there alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_compress.progress import Progress, quiet

CHUNK = 2**24  # bytes copied at once

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        name: its name.
        dtype: its type as the format spells it.
        shape: its shape.
        start: first byte in the file.
        stop: byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors by name in the order of their data, and its metadata."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] | None


def read_header(path: Path) -> Header:
    """The header of a safetensors file; raises ValueError for a file that is malformed or cut short."""
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file, reads no data
            pass
    except SafetensorError as error:
        raise ValueError(f"Expected a whole safetensors file, but {path} is not: {error}.") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None)
    data = 8 + length
    entries = [
        Entry(name, value["dtype"], tuple(value["shape"]), *(data + offset for offset in value["data_offsets"]))
        for name, value in header.items()
    ]
    return Header(path, {entry.name: entry for entry in sorted(entries, key=lambda e: e.start)}, metadata)


def read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    """One tensor of an open file; raises ValueError for a type that torch does not have."""
    dtype = torch_dtype(entry)
    if not entry.bytes:
        return torch.empty(entry.shape, dtype=dtype)
    data = bytearray(entry.bytes)
    file.seek(entry.start)
    file.readinto(data)  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def torch_dtype(entry: Entry) -> torch.dtype:
    """The type of the elements; raises ValueError for one that cannot be cut element by element."""
    if entry.dtype not in DTYPES:
        raise ValueError(
            f"Expected {entry.name!r} to have a type that can be cut, one of {list(DTYPES)}, but got {entry.dtype}. "
            "Remove units before quantization."
        )
    return DTYPES[entry.dtype]


def rewrite(
    source: Header,
    target: Path,
    new_shapes: Mapping[str, tuple[int, ...]],
    change: Callable[[str, Tensor], Tensor],
    progress: Progress = quiet,
) -> None:
    """Copy a file with some tensors changed; never holds more than one of them.

    Args:
        source: header of the file to copy.
        target: file to write.
        new_shapes: shape that each changed tensor will have, by name.
        change: ``change(name, tensor)`` returns the tensor to write, of that shape and of the same type.
        progress: shows the tensors.
    """
    # the largest elements first, so that all data is aligned whatever the shapes are
    entries = sorted(source.entries.values(), key=lambda e: -DTYPES[e.dtype].itemsize if e.dtype in DTYPES else 0)
    header: dict[str, object] = {} if source.metadata is None else {"__metadata__": dict(source.metadata)}
    offset = 0
    for entry in entries:
        shape = new_shapes.get(entry.name)
        size = entry.bytes if shape is None else math.prod(shape) * torch_dtype(entry).itemsize
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape if shape is None else shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with source.path.open("rb") as reader, target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little"))
        writer.write(text)
        for entry in progress(entries, f"tensors of {source.path.name}"):
            shape = new_shapes.get(entry.name)
            if shape is None:
                _copy(reader, writer, entry)
                continue
            tensor = change(entry.name, read_tensor(reader, entry))
            assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == torch_dtype(entry), entry.name
            if tensor.numel():
                writer.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        writer.flush()
        os.fsync(writer.fileno())


def _copy(reader: BinaryIO, writer: BinaryIO, entry: Entry) -> None:
    reader.seek(entry.start)
    left = entry.bytes
    while left:
        chunk = reader.read(min(CHUNK, left))
        if not chunk:
            raise ValueError(f"Expected {left} more bytes of {entry.name!r}, but the file ends.")
        writer.write(chunk)
        left -= len(chunk)


def bytes_of(shape: Sequence[int], entry: Entry) -> int:
    """Size of a tensor of the type of ``entry`` in this shape."""
    return math.prod(shape) * torch_dtype(entry).itemsize
