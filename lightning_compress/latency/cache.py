"""Tables kept on disk: what a table depends on, as a hash, and files that are checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.latency.table import VERSION, LatencyTable
from lightning_compress.structures import Structures

VARIABLE = "LIGHTNING_COMPRESS_CACHE"
LARGEST_FILE = 16 * 2**20  # bytes; a larger file is not one of ours


def cache_folder() -> Path:
    """The folder of the cache: ``$LIGHTNING_COMPRESS_CACHE``, else ``~/.cache/lightning_compress``."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lightning_compress"


def cache_file(key: str) -> Path:
    """Where the table with this key is kept."""
    return cache_folder() / "latency" / f"{key}.json"


def read_table(key: str, structures: Structures) -> LatencyTable | None:
    """The table with this key if there is a sound one; a damaged file is left alone, with a warning."""
    path = cache_file(key)
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"expected at most {LARGEST_FILE} bytes, but got {path.stat().st_size}.")
        table = LatencyTable.from_json(path.read_text(encoding="utf-8"))
        if table.key != key:
            raise ValueError(f"expected the key {key}, but got {table.key[:80]!r}.")
        if table.counts != structures.counts:
            raise ValueError("expected the structures of this model, but it has others.")
        return table
    except (OSError, ValueError) as error:
        warnings.warn(
            f"The latency table in {path} is ignored and measured anew, because it is damaged: {error}", stacklevel=2
        )
        return None


def write_table(table: LatencyTable) -> None:
    """Keep the table for later; where that is not possible, say so and go on."""
    path = cache_file(table.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(table.to_json())
            os.replace(name, path)  # never half a file
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(
            f"The latency table cannot be kept in {path.parent} ({error}): set {VARIABLE} to a folder that can be "
            "written.",
            stacklevel=2,
        )


def device_name(model: nn.Module) -> str:
    """Name of the device that the parameters of ``model`` are on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table_key(model: nn.Module, structures: Structures, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Hash of everything that the latency of a call depends on, weights and inputs aside: they count by their shapes.

    The model by its modules, their types, their plain attributes and those of objects they hold (a configuration);
    the structures with the way they go; the device, its threads and precision settings; the versions of torch and of
    the format.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    content = {
        "version": VERSION,
        "torch": torch.__version__,
        "device": device_name(model),
        "threads": torch.get_num_threads(),
        "autocast": {
            kind: str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
            for kind in ("cpu", "cuda")
        },
        "float32": torch.get_float32_matmul_precision(),
        "modules": [[n, type(m).__module__, type(m).__qualname__, _attributes(m)] for n, m in model.named_modules()],
        "tensors": [[n, list(t.shape), str(t.dtype), t.device.type] for n, t in tensors],
        "structures": [
            [
                s.name,
                s.kind,
                s.units,
                s.tier,
                [[p.parameter, p.axis, p.size, p.role, list(p.indices.shape)] for p in s.slices],
                [repr(edit) for edit in s.edits],
                [s.floor, *s.members],
            ]
            for s in structures
        ],
        "macs": sorted([list(names), c] for names, c in structures.macs),
        "call": [_leaf(leaf) for leaf in pytree.tree_leaves((tuple(args), dict(kwargs)))],
        "names": sorted(kwargs),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _leaf(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{value.device.type}"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__qualname__


def _plain(holder: object) -> dict[str, str]:
    return {k: repr(v) for k, v in vars(holder).items() if isinstance(v, bool | int | float | str)}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain public attributes of a module, and all plain ones of the public objects that it holds."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, bool | int | float | str):
            found[name] = repr(value)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value):
            found[name] = _plain(value)
    return found


def call_in_words(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Shapes of the tensors of a call."""
    named = [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]
    shapes = [f"{n} {'x'.join(map(str, v.shape))}" for n, v in named if isinstance(v, Tensor)]
    return f"one call ({', '.join(shapes)})" if shapes else "one call"
