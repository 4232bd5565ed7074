"""The manifest of a saved model, ``compression.json``: how it came about, and what its tensors look like.

{"format": "lightning_compress.model", "version": 1,
 "removals": [{"module": "", "plan": {...}}, ...],                     plan_format.py, in order
 "tensors": {"encoder.weight": {"dtype": "float32", "shape": [64, 32]}, ...},
 "shared": {"decoder.weight": "encoder.weight"},                      other names of a tensor
 "base": {"library": "transformers", "class": ..., "config": {...}},  or null: a factory is needed
 "versions": {"torch": "2.13.0", ...},
 "files": {"model.safetensors": {"bytes": 8192, "sha256": "..."}},
 "quantization": {"backend": "packed", "weights": [...], ...},         quantization/saved.py, or null
 "token_pruning": [{"module": "", "runtime": {...}}]}                 tokens/record.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_compress.plan import PruningPlan
from lightning_compress.quantization.saved import QuantizationRecord, read_quantization_record
from lightning_compress.strict_json import StrictReader
from lightning_compress.tokens.record import TokenRecord, read_token_record

FORMAT, VERSION = "lightning_compress.model", 1
MANIFEST, WEIGHTS = "compression.json", "model.safetensors"
# A manifest is read whole before anything is known of it.
LARGEST_MANIFEST = 2**28
LARGEST_DIMENSION, LARGEST_RANK, LARGEST_FILE = 2**40, 16, 2**50

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*")
_READER = StrictReader("compression manifest")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the state: dtype by name, and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileEntry:
    """One file beside the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Base:
    """Where the dense model comes from if nobody gives a factory.

    Args:
        name: class of transformers.
        config: its configuration as a dictionary.
    """

    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What ``compression.json`` says; see the module docstring."""

    removals: tuple[tuple[str, PruningPlan], ...]
    tensors: Mapping[str, TensorEntry]
    shared: Mapping[str, str]
    base: Base | None
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    tokens: tuple[TokenRecord, ...] = ()
    quantization: QuantizationRecord | None = None

    def to_json(self) -> str:
        """The text of ``compression.json``."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "removals": [{"module": path, "plan": json.loads(plan.to_json())} for path, plan in self.removals],
            "tensors": {n: {"dtype": t.dtype, "shape": list(t.shape)} for n, t in self.tensors.items()},
            "shared": dict(self.shared),
            "base": None
            if self.base is None
            else {"library": "transformers", "class": self.base.name, "config": self.base.config},
            "versions": dict(self.versions),
            "files": {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in self.files.items()},
            "quantization": None if self.quantization is None else self.quantization.state(),
            "token_pruning": [{"module": t.module, "runtime": t.state} for t in self.tokens] or None,
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest, trusting nothing; raises ValueError with the key path of what is malformed."""
        read = _READER
        keys = "format version removals tensors shared base versions files quantization token_pruning".split()
        data = read.object(read.parse(text), "the file", keys)
        read.string(data["format"], "format", [FORMAT])
        if data["version"] != VERSION or isinstance(data["version"], bool):
            read.refuse("version", f"{VERSION} (newer files need a newer lightning_compress)", data["version"])
        tokens = () if data["token_pruning"] is None else read.items(data["token_pruning"], "token_pruning")
        tensors = {n: _tensor(v, f"tensors[{n!r}]") for n, v in read.mapping(data["tensors"], "tensors").items()}
        shared = {n: read.string(v, f"shared[{n!r}]") for n, v in read.mapping(data["shared"], "shared").items()}
        for name, first in shared.items():
            if first not in tensors or name in tensors:
                read.refuse(f"shared[{name!r}]", "the name of a stored tensor, for a name that has none", first)
        quantization = None
        if data["quantization"] is not None:
            stored = {n: (DTYPES[t.dtype], t.shape) for n, t in tensors.items()}
            quantization = read_quantization_record(data["quantization"], "quantization", stored)
        files = {n: _file(v, f"files[{n!r}]") for n, v in read.mapping(data["files"], "files").items()}
        if set(files) != {WEIGHTS}:
            read.refuse("files", f"an object with the key {WEIGHTS!r}", sorted(files))
        versions = read.mapping(data["versions"], "versions")
        return cls(
            removals=tuple(_removal(item, path) for path, item in read.items(data["removals"], "removals")),
            tensors=tensors,
            shared=shared,
            base=_base(data["base"]),
            versions={n: read.string(v, f"versions[{n!r}]") for n, v in versions.items()},
            files=files,
            tokens=tuple(read_token_record(item, path) for path, item in tokens),
            quantization=quantization,
        )


def _removal(value: Any, path: str) -> tuple[str, PruningPlan]:
    value = _READER.object(value, path, ["module", "plan"])
    try:
        plan = PruningPlan.from_json(json.dumps(value["plan"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"Malformed compression manifest: in {path}.plan: {error}") from None
    return _READER.string(value["module"], f"{path}.module"), plan


def _tensor(value: Any, path: str) -> TensorEntry:
    value = _READER.object(value, path, ["dtype", "shape"])
    items = _READER.items(value["shape"], f"{path}.shape")
    if len(items) > LARGEST_RANK:
        _READER.refuse(f"{path}.shape", f"a list of at most {LARGEST_RANK} sizes", value["shape"])
    shape = tuple(_READER.integer(item, where, 0, LARGEST_DIMENSION) for where, item in items)
    return TensorEntry(_READER.string(value["dtype"], f"{path}.dtype", list(DTYPES)), shape)


def _file(value: Any, path: str) -> FileEntry:
    value = _READER.object(value, path, ["bytes", "sha256"])
    digest = _READER.string(value["sha256"], f"{path}.sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        _READER.refuse(f"{path}.sha256", "64 hexadecimal digits", digest)
    return FileEntry(_READER.integer(value["bytes"], f"{path}.bytes", 0, LARGEST_FILE), digest)


def _base(value: Any) -> Base | None:
    if value is None:
        return None
    value = _READER.object(value, "base", ["library", "class", "config"])
    _READER.string(value["library"], "base.library", ["transformers"])
    name = _READER.string(value["class"], "base.class")
    if not _IDENTIFIER.fullmatch(name):
        _READER.refuse("base.class", "the name of a class", name)
    return Base(name, _READER.mapping(value["config"], "base.config"))


__all__ = ["DTYPES", "MANIFEST", "WEIGHTS", "Base", "FileEntry", "Manifest", "TensorEntry"]
