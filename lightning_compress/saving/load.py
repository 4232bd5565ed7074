"""Building a saved model: the dense one, its removals replayed, the weights; nothing is executed, all is checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from lightning_compress.saving.base import build
from lightning_compress.saving.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    WEIGHTS,
    FileEntry,
    Manifest,
    TensorEntry,
)
from lightning_compress.saving.state import check_fit, entries, fill
from lightning_compress.surgery import apply_plan


def load_compressed(
    folder: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None = None,
    *,
    nan: bool = False,
    backend: str | None = None,
) -> Any:
    """The model that ``save_compressed`` wrote into ``folder``, in evaluation mode on the CPU.

    No pickle and no code from the folder is executed: the dense model comes from ``factory`` (or from transformers),
    the removals are replayed from data, and every tensor is checked against the manifest before any is used.

    Args:
        folder: the folder.
        factory: builds the dense module that was compressed: ``lambda: MyModel(width=512)``. Not needed for models of
            transformers.
        nan: whether weights may hold NaN.
        backend: what a model that was converted to integers computes with, "native", "packed" or "unpacked"; None is
            what it was saved with.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, truncated, swapped or malformed, or the factory builds another model; the
            message says which file, where, and what was expected.
        ImportError: if the model is one of transformers, which is not installed.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    tensors = _read_weights(place / WEIGHTS, manifest.files[WEIGHTS], manifest.tensors, nan)
    if factory is not None:
        model = factory()
        if not isinstance(model, nn.Module):
            raise ValueError(f"Expected the factory to return an nn.Module, but got {type(model).__name__}.")
    elif manifest.base is not None:
        model = build(manifest.base)
    else:
        raise ValueError(
            f"Expected a factory for {os.fspath(place)!r}, because its dense model is none of transformers, but got "
            "none. Call load_compressed(folder, lambda: MyModel(...))."
        )
    modules = dict(model.named_modules())
    for path, plan in manifest.removals:
        if path not in modules:
            raise ValueError(
                f"Expected the dense model to have a module {path!r}, from which units were removed, but it has none. "
                "The factory must build the dense model that was compressed."
            )
        try:
            apply_plan(modules[path], plan)
        except ValueError:
            raise
        except Exception as failure:  # whatever edits that nobody vouches for make of somebody's module
            raise ValueError(
                f"Expected the removals of {os.fspath(place)!r} to fit the dense model, but replaying them on {path!r} "
                f"raised {type(failure).__name__}: {failure}"
            ) from failure
    # before quantization: a layer that tokens skip is not multiplied in int8, whose range would be that of other tokens
    for record in manifest.tokens:
        record.install(model)
    if manifest.quantization is not None:
        manifest.quantization.install(model, backend)
    elif backend is not None:
        raise ValueError(
            f"Expected backend=None for {os.fspath(place)!r}, because its weights were not converted to integers, but "
            f"got {backend!r}."
        )
    check_fit(model, manifest.tensors, manifest.shared)
    fill(model, tensors, manifest.shared)
    if manifest.quantization is not None:
        manifest.quantization.check_values(model)
    return model.eval()


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a saved model; raises like ``load_compressed``."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a saved model in {os.fspath(folder)!r}, but it has no {MANIFEST}. save_compressed writes one."
        )
    if path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError(
            f"Expected {MANIFEST} to have at most {LARGEST_MANIFEST} bytes, but got {path.stat().st_size}."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: expected text in UTF-8, but got {error}.") from None
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def _read_weights(path: Path, file: FileEntry, expected: Any, nan: bool) -> dict[str, Tensor]:
    """The tensors of a file that is what the manifest says: size, checksum, names, types, shapes, values."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected {os.fspath(path)!r} to exist, as {MANIFEST} says, but it does not.")
    size = path.stat().st_size
    if size != file.bytes:
        raise ValueError(
            f"Expected {path.name} to have {file.bytes} bytes, as {MANIFEST} says, but got {size}: it is truncated or "
            "another file."
        )
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(2**20):
            digest.update(piece)
    if digest.hexdigest() != file.sha256:
        raise ValueError(
            f"Expected {path.name} to have the checksum {file.sha256[:12]}... of {MANIFEST}, but got "
            f"{digest.hexdigest()[:12]}...: it is damaged or another file."
        )
    tensors: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as stored:
            names = set(stored.keys())
            if names != set(expected):
                missing, unknown = sorted(set(expected) - names), sorted(names - set(expected))
                raise ValueError(
                    f"Expected {path.name} to hold the tensors that {MANIFEST} lists, but {missing[:3]} are missing "
                    f"and {unknown[:3]} are unknown."
                )
            for name in sorted(names):
                tensors[name] = stored.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"Expected {path.name} to be a safetensors file, but it cannot be read: {error}.") from None
    for name, entry in entries(tensors).items():
        _check_entry(name, entry, expected[name])
        if not nan and tensors[name].is_floating_point() and bool(torch.isnan(tensors[name]).any()):
            raise ValueError(f"Expected {name!r} to hold numbers, but it holds NaN. Pass nan=True if it should.")
    return tensors


def _check_entry(name: str, got: TensorEntry, expected: TensorEntry) -> None:
    if got != expected:
        raise ValueError(
            f"Expected {name!r} to be {expected.dtype} of shape {expected.shape}, as {MANIFEST} says, but got "
            f"{got.dtype} of shape {got.shape}."
        )


__all__ = ["load_compressed", "read_manifest"]
