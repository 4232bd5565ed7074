"""Surgery on a checkpoint: tensors are cut file by file, and no model is ever made."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_compress.export.safetensors_file import Entry, Header, bytes_of, read_header, rewrite, torch_dtype
from lightning_compress.plan import PruningPlan
from lightning_compress.progress import Progress, quiet
from lightning_compress.surgery.slicing import kept_by_parameter, select

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAN = "pruning_plan.json"

# Files with weights of the uncut model beside the checkpoint: a copy of them would belong to another model.
_WEIGHTS = (
    ".safetensors .safetensors.index.json .bin .bin.index.json .pt .pth .ckpt .h5 .msgpack .gguf .onnx .ot .npz".split()
)

Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class CheckpointReport:
    """What ``apply_plan_to_checkpoint`` wrote.

    Args:
        files: the files with weights.
        cut: names of the tensors that became smaller, as in the checkpoint.
        copied: other files of the folder that were copied.
        left_out: what was not copied: other weights, sub-folders.
        elements_before: number of elements of all tensors before.
        elements_after: the same afterwards.
        bytes_before: size of all tensors before.
        bytes_after: the same afterwards.
        seconds: time that it took.
    """

    files: tuple[str, ...]
    cut: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    elements_before: int
    elements_after: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def __str__(self) -> str:
        kept = self.bytes_after / max(1, self.bytes_before)
        text = (
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({kept:.1%}) in {len(self.files)} file(s), "
            f"{len(self.cut)} tensors cut, {self.seconds:.2f} s"
        )
        return text + (f"; not copied: {', '.join(self.left_out)}" if self.left_out else "")


def apply_plan_to_checkpoint(
    plan: PruningPlan,
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    rename: Rename | None = None,
    missing: Collection[str] = (),
    progress: Progress = quiet,
) -> CheckpointReport:
    """Remove the units that ``plan`` does not keep from a checkpoint on disk, one tensor at a time.

    Reads ``model.safetensors``, or the files that ``model.safetensors.index.json`` lists, and writes the same files
    with smaller tensors: names, types, metadata and the division into files stay. Every other file of the folder
    (configuration, tokenizer) is copied, and the plan is saved beside them as ``pruning_plan.json``. Nothing is
    verified here: the tensors are those that ``apply_plan`` leaves in the model.

    The small model is loaded by giving a fresh model the shapes of the plan, then the weights:

        apply_plan(model, PruningPlan.load(out_dir / "pruning_plan.json"))
        model.load_state_dict(weights of out_dir)

    For this the plan must come out of a report of ``apply_plan``, or carry the tiers of proven structures and be
    applied with ``unverified=True``. A structure without one is cut as "native", in all of its slices. Where
    ``apply_plan`` would later find that a part of them has to stay whole, the shapes disagree on loading, so this
    cannot go unnoticed.

    The folder appears whole or not at all. A folder that was made by an earlier plan is cut again, and the saved plan
    is that of both.

    Args:
        plan: what stays.
        in_dir: folder with the checkpoint.
        out_dir: folder to make; absent or empty.
        rename: the plan's name of a tensor of the checkpoint, as a function or a mapping (other names stay). Several
            tensors may have one name in the plan: copies of a shared parameter, all cut alike.
        missing: parameters and buffers of the plan that the checkpoint rightly lacks, such as buffers that are not
            saved.
        progress: wraps the tensors of each file, for a progress bar, see ``progress_bars``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        FileExistsError: if ``out_dir`` is not empty.
        ValueError: if the checkpoint is malformed or is that of another model, or the plan removes whole modules.
    """
    started = time.perf_counter()
    source, target = Path(in_dir), Path(out_dir)
    _check_target(target)
    _check_units(plan)
    headers, index = read_checkpoint(source)
    entries = {name: entry for header in headers for name, entry in header.entries.items()}
    names = plan_names(entries, rename)
    kept = kept_by_parameter(plan)
    for name in missing:
        if name not in plan.shapes:
            raise ValueError(f"Expected missing to name parameters or buffers of the plan, but got {name!r}.")
    _check_names(plan, names, set(kept) - set(missing), entries)
    new_shapes = _check_shapes(plan, names, kept, entries)
    earlier = source / PLAN
    saved = PruningPlan.load(earlier).compose(plan) if earlier.is_file() else plan

    def cut(name: str, tensor: Tensor) -> Tensor:
        return select(tensor, kept[names[name]])

    copied, left_out = _other_files(source, headers)
    elements_before = sum(math.prod(e.shape) for e in entries.values())
    elements_after = sum(math.prod(new_shapes.get(n, e.shape)) for n, e in entries.items())
    bytes_before = sum(e.bytes for e in entries.values())
    bytes_after = sum(bytes_of(new_shapes[n], e) if n in new_shapes else e.bytes for n, e in entries.items())
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        for header in headers:
            mine = {name: shape for name, shape in new_shapes.items() if name in header.entries}
            rewrite(header, temporary / header.path.name, mine, cut, progress)
        if index is not None:
            text = json.dumps(_new_index(index, bytes_after, elements_before - elements_after), indent=2)
            (temporary / INDEX).write_text(text + "\n", encoding="utf-8")
        for name in copied:
            shutil.copyfile(source / name, temporary / name)
        saved.save(temporary / PLAN)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o777 & ~mask)  # made for the owner alone
        if target.exists():
            target.rmdir()  # empty, or this fails
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return CheckpointReport(
        files=tuple(header.path.name for header in headers),
        cut=tuple(new_shapes),
        copied=copied,
        left_out=left_out,
        elements_before=elements_before,
        elements_after=elements_after,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        seconds=time.perf_counter() - started,
    )


# Reading


def read_checkpoint(folder: Path) -> tuple[list[Header], dict[str, Any] | None]:
    """Headers of the files of a checkpoint, and its index if it has one; checks that they agree.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if a file is malformed, or the index and the files disagree.
    """
    path = folder / INDEX
    if not path.is_file():
        if not (folder / SINGLE).is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"Expected {INDEX} or {SINGLE} in {os.fspath(folder)!r}, but got {found}.")
        return [read_header(folder / SINGLE)], None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, but it cannot be parsed: {error}.") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise ValueError(f'Expected {path} to have a "weight_map" from tensor to file, but it has none.')
    for file in files.values():
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"Expected {path} to list .safetensors files of its own folder, but got {file!r}.")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"Expected {file!r} in {os.fspath(folder)!r}, as {INDEX} says, but it lacks it.")
    headers = [read_header(folder / file) for file in dict.fromkeys(files.values())]
    held = [(name, header.path.name) for header in headers for name in header.entries]
    if len(held) != len(files) or dict(held) != files:
        wrong = sorted({name for name, _ in {*held} ^ {*files.items()}})
        raise ValueError(
            f"Expected {INDEX} to list exactly the tensors of its files, but they disagree on {len(wrong)} of them, "
            f"{wrong[:3]} among them."
        )
    return headers, index


def plan_names(names: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """Name in the checkpoint -> name in the plan."""
    if rename is None:
        return {name: name for name in names}
    if callable(rename):
        return {name: rename(name) for name in names}
    given = list(names)
    unknown = sorted(set(rename) - set(given))
    if unknown:
        raise ValueError(f"Expected rename to map names of the checkpoint, but it has no {unknown[0]!r}.")
    return {name: rename.get(name, name) for name in given}


# Checks, all before anything is written


def _check_target(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"Expected out_dir to be absent or an empty folder, but {os.fspath(target)!r} is not.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"Expected the folder {os.fspath(target.parent)!r}, in which out_dir is to be made.")


def _check_units(plan: PruningPlan) -> None:
    for structure in plan.structures:
        if structure.members and plan.removed(structure.name):
            raise ValueError(
                f"Expected units that are positions in tensors, but those of {structure.name!r} are whole modules "
                f"({structure.members[0]!r}, ...), whose removal renames tensors. Leave it out of the plan, or use "
                "apply_plan on the model."
            )


def _check_names(
    plan: PruningPlan, names: Mapping[str, str], needed: Collection[str], entries: Mapping[str, Entry]
) -> None:
    lacking = [name for name in plan.shapes if name in needed and name not in set(names.values())]
    if not lacking:
        return
    raise ValueError(
        f"Expected the checkpoint to have {lacking[0]!r}, which the plan cuts, but it has none ({len(lacking)} of "
        f"{len(needed)} are missing). {_advice(lacking, needed, entries)}"
    )


def _advice(lacking: list[str], needed: Collection[str], entries: Mapping[str, Entry]) -> str:
    first = lacking[0]
    for name in entries:
        longer, shorter = name.removesuffix(f".{first}"), first.removesuffix(f".{name}")
        if longer != name and all(f"{longer}.{n}" in entries for n in needed):
            prefix = longer + "."
            return f"All are there behind {prefix!r}: pass rename=lambda name: name.removeprefix({prefix!r})."
        if shorter != first and all(n.removeprefix(f"{shorter}.") in entries for n in needed):
            prefix = shorter + "."
            return f"All are there without {prefix!r}: pass rename=lambda name: {prefix!r} + name."
    return (
        "If it has another name there (that of a parameter it is shared with, say), pass rename={name in the "
        "checkpoint: name in the plan}; if it is a buffer that is not saved, pass missing=[name]."
    )


def _check_shapes(
    plan: PruningPlan,
    names: Mapping[str, str],
    kept: Mapping[str, Mapping[int, Tensor]],
    entries: Mapping[str, Entry],
) -> dict[str, tuple[int, ...]]:
    """New shape of every tensor that is cut, by its name in the checkpoint."""
    after = plan.new_shapes()
    known = {name: entry for name, entry in entries.items() if names[name] in plan.shapes}
    done = all(entry.shape == after[names[name]] for name, entry in known.items())
    for name, entry in known.items():
        shape = plan.shapes[names[name]]
        if entry.shape != shape:
            reason = "This plan was already applied to it." if done else "This is a plan for another model."
            raise ValueError(
                f"Expected {name!r} to have shape {shape} in the checkpoint, as in the model that the plan was made "
                f"for, but got {entry.shape}. {reason}"
            )
        if names[name] in kept:
            torch_dtype(entry)
    return {name: after[names[name]] for name in known if names[name] in kept}


# Writing


def _other_files(source: Path, headers: list[Header]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files to copy, and of what is left out."""
    copied: list[str] = []
    left_out: list[str] = []
    written = {PLAN, INDEX, *(header.path.name for header in headers)}
    for path in sorted(source.iterdir()):
        if path.name not in written:
            other = not path.is_file() or path.name.endswith(tuple(_WEIGHTS))
            (left_out if other else copied).append(path.name)
    return tuple(copied), tuple(left_out)


def _new_index(index: dict[str, Any], total_size: int, removed: int) -> dict[str, Any]:
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = total_size
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] -= removed
    return {**index, "metadata": metadata}


__all__ = ["CheckpointReport", "apply_plan_to_checkpoint", "plan_names", "read_checkpoint"]
