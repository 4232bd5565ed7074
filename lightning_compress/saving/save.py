"""Writing a compressed model: weights, and a manifest that says how to build the module they belong to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from lightning_compress.quantization.saved import quantization_record
from lightning_compress.saving.base import base_of
from lightning_compress.saving.load import load_compressed
from lightning_compress.saving.manifest import MANIFEST, WEIGHTS, FileEntry, Manifest
from lightning_compress.saving.state import entries, state_of
from lightning_compress.surgery.guards import check_names
from lightning_compress.surgery.record import records
from lightning_compress.tokens.record import token_records

LIBRARIES = ("lightning-compress", "torch", "lightning", "transformers", "safetensors")


def save_compressed(
    model: nn.Module,
    folder: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Write ``model`` into a folder from which ``load_compressed`` builds it again, anywhere, without pickle.

    Two files: ``model.safetensors`` with the weights, and ``compression.json`` with the removals that lead from the
    dense model to this one, the shape and type of every tensor, versions and checksums. The folder appears whole or not
    at all. Where the dense model can be built (a model of transformers, or with ``factory``), the model is loaded
    again and compared before that.

    A model that was converted to integers (``quantization.convert``) is saved with them: the file has the packed bytes,
    scales and offsets, and what is not quantized. Quantizers of a model that was not converted are not saved.

    Args:
        model: the model that units were removed from, or a module that contains it, or a dense one.
        folder: where; it must not exist or be empty, or be overwritten.
        factory: builds the dense model; only needed to try the loading of models that are not of transformers.
        overwrite: whether a folder that was saved before is replaced.

    Returns:
        The manifest.

    Raises:
        ValueError: for a compiled or scripted model; for state that is no dense tensor; for quantizers that are
            none of this library; or if the model cannot be built again from what would be saved.
        FileExistsError: if the folder is not empty and not to be replaced, or holds other things.
    """
    target = Path(folder)
    check_names(model)
    check_target(target, overwrite)
    tensors, shared = state_of(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside its target, because a rename is atomic only within a file system
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        safetensors.torch.save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        manifest = Manifest(
            removals=tuple((path, plan) for path, record in records(model).items() for plan in record.plans),
            tensors=entries(tensors),
            shared=shared,
            base=base_of(model),
            versions=_versions(),
            files={WEIGHTS: FileEntry((work / WEIGHTS).stat().st_size, sha256(work / WEIGHTS))},
            tokens=token_records(model),
            quantization=quantization_record(model),
        )
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if factory is not None or manifest.base is not None:
            _try_loading(work, factory, tensors)
        for name in (WEIGHTS, MANIFEST):
            with open(work / name, "rb") as file:
                os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(work, 0o777 & ~mask)  # mkdtemp makes folders for the owner alone
        _put(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def sha256(path: Path) -> str:
    """Checksum of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def check_target(target: Path, overwrite: bool = False) -> None:
    """Raise FileExistsError if a model cannot be saved there."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(
            f"Expected {os.fspath(target)!r} to be a folder or not to exist, but it is something else."
        )
    if not target.exists():
        return
    present = {path.name for path in target.iterdir()}
    if not present:
        return
    if not overwrite:
        raise FileExistsError(
            f"Expected {os.fspath(target)!r} to be empty or not to exist, but it holds {sorted(present)[:3]}. Choose "
            "another folder, or pass overwrite=True to replace a saved model."
        )
    if present != {WEIGHTS, MANIFEST}:
        raise FileExistsError(
            f"Expected {os.fspath(target)!r} to hold a saved model and nothing else, but it holds "
            f"{sorted(present)[:3]}. Only such a folder is replaced."
        )


def _put(work: Path, target: Path) -> None:
    """Give the finished folder its name."""
    if not target.exists():
        os.replace(work, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    os.replace(target, old)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _try_loading(work: Path, factory: Callable[[], nn.Module] | None, tensors: dict[str, torch.Tensor]) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            again, _ = state_of(load_compressed(work, factory))
    except ValueError as error:
        raise ValueError(f"Expected the model to be built again from what is saved, but: {error}") from error
    for name, tensor in tensors.items():
        if not torch.equal(again[name], tensor):
            raise ValueError(f"Expected {name!r} to be the same after loading, but it differs.")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["check_target", "save_compressed", "sha256"]
