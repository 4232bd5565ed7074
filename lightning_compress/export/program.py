"""Tracing a model by ``torch.export`` with sizes that may vary, and writing what was traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from lightning_compress.export.call import Call, FlatModel, named
from lightning_compress.export.dynamic import Groups, resized, torch_dims

if TYPE_CHECKING:
    from lightning_compress.export.formats import Format


class ExportError(ValueError):
    """A model that cannot be exported, or whose file does not compute what the model does; nothing was written."""


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Args:
        program: the graph with its weights.
        inputs: names of its inputs.
        outputs: names of its outputs.
        groups: sizes that may vary, and where.
        ranges: least and greatest value of each; None: no limit.
        steps: what each must be a multiple of.
        symbols: symbol of the graph -> name of the size.
        weights: bytes of the weights.
        notes: what the user should know, in sentences.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    groups: Groups
    ranges: Mapping[str, tuple[int, int | None]]
    steps: Mapping[str, int]
    symbols: Mapping[str, str]
    weights: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What a format is told.

    Args:
        opset: version of the ONNX operators; None: the exporter's choice.
        half: whether a format that stores weights in a precision of its own stores them in half precision.
    """

    opset: int | None = None
    half: bool = False


def trace(model: nn.Module, call: Call, groups: Groups, required: bool, dtype: torch.dtype | None, seed: int) -> Traced:
    """Trace ``model`` on a random call.

    Args:
        model: the model in evaluation mode.
        call: the example.
        groups: sizes that may vary.
        required: whether the user asked for them: it is an error then if the model fixes one.
        dtype: type to compute in; None: the model's own.
        seed: of the random call.
    """
    flat = named(FlatModel(model, call, [places for places in groups.values() if len(places) > 1], dtype)).eval()
    sizes = {name: call.tensors[n].shape[d] for name, ((n, d), *_) in groups.items()}
    # A size of one would be taken for a constant. The file keeps what it was traced on: not the user's data.
    example = resized(call, groups, {n: max(2, size) for n, size in sizes.items()}, torch.Generator().manual_seed(seed))
    shapes = dict(zip(call.names, torch_dims(call, groups, required), strict=True))
    program = torch.export.export(
        flat, (), dict(zip(call.names, example, strict=True)), dynamic_shapes=shapes, strict=False
    )
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]
    found: Groups = {}
    ranges: dict[str, tuple[int, int | None]] = {}
    steps: dict[str, int] = {}
    symbols: dict[str, str] = {}
    for name, places in groups.items():
        number, dim = places[0]
        size = values[number].shape[dim]
        if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
            continue
        if not required and name != "batch":
            lengths = sum(known != "batch" for known in found)
            name = f"length_{lengths + 1}" if lengths else "length"
        found[name], symbol = places, size.node.expr
        ranges[name] = (1, None)
        if symbol.is_Symbol:
            symbols[str(symbol)] = name
            ranges[name] = _range(program.range_constraints.get(symbol))
        else:  # as 2 * s: even sizes only
            steps[name] = call.tensors[number].shape[dim]
    notes: tuple[str, ...] = ()
    if not required and "batch" in groups and "batch" not in found:
        notes = ("the batch size is fixed at that of the example, because the model bears no other.",)
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    return Traced(program, call.names, flat.output_names, found, ranges, steps, symbols, weights, notes)


def _range(interval: Any) -> tuple[int, int | None]:
    """Bounds of a size; two, the least that is traced, stands for one."""
    if interval is None:
        return 1, None
    low = int(interval.lower)
    high = int(interval.upper) if interval.upper.is_Integer else None
    return (1 if low <= 2 else low), high


def write(
    form: Format,
    path: Path,
    tracing: Callable[[Groups], Traced],
    groups: Groups,
    retry: bool,
    options: Options,
) -> Traced:
    """Trace and write; where that fails, with ``retry`` once more with the batch as the only size that may vary.

    Raises:
        ExportError: if it cannot be done, with the first reason.
    """
    batch_only = {name: places for name, places in groups.items() if name == "batch"}
    attempts = [groups, batch_only] if retry and batch_only != groups else [groups]
    first: Exception | None = None
    for attempt in attempts:
        try:
            traced = tracing(attempt)
            form.write(traced, path, options)
        except Exception as error:  # exporters raise whatever comes to their mind
            first = first or error
            for file in path.parent.iterdir():
                file.unlink()
            continue
        if first is not None:
            note = f"lengths are fixed at those of the example, because with free ones: {reason(first)}"
            traced = dataclasses.replace(traced, notes=(*traced.notes, note))
        return traced
    assert first is not None
    raise ExportError(
        f"Expected a model that torch.export and {form.suffix} can express, but got {reason(first)} "
        "Change the module that this names, or say which sizes may vary by dynamic={input: {dimension: name}}."
    ) from first


def reason(error: BaseException) -> str:
    """The first lines of what went wrong at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
