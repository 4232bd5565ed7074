"""A model as a file for another runtime, checked against PyTorch before it appears."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.discovery.tracer import evaluation
from lightning_compress.discovery.valueless import lacking_values
from lightning_compress.export.call import flatten_call
from lightning_compress.export.comparison import calls_to_try, compare
from lightning_compress.export.dynamic import chosen, derive
from lightning_compress.export.formats import FORMATS, check_installed, quiet
from lightning_compress.export.program import Options, trace, write
from lightning_compress.export.quantized import TOLERANCE, check_quantized
from lightning_compress.progress import Progress
from lightning_compress.progress import quiet as no_bar
from lightning_compress.quantization.graph import as_graph
from lightning_compress.surgery.guards import check_plain

Precision = Literal["float32", "float16", "bfloat16"]
TOLERANCES: dict[str | None, float] = {None: 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class ExportResult:
    """What ``export_model`` wrote.

    Args:
        path: the file.
        format: its format.
        error: the largest difference to PyTorch over all calls tried, relative to the largest value of the output.
        tolerance: what the error had to stay below.
        tried: shapes of the inputs of every call tried, in order of ``inputs``; the first is the example.
        inputs: names of the inputs.
        outputs: names of the outputs.
        dynamic: sizes that may vary: name -> (input, dimension) pairs that have it.
        ranges: their least and greatest value as the trace knows it; None: no limit.
        files: every file, with its bytes.
        precision: what the weights were converted to; None: nothing.
        seconds: time that it took.
    """

    path: Path
    format: str
    error: float
    tolerance: float
    tried: tuple[tuple[tuple[int, ...], ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, tuple[tuple[str, int], ...]]
    ranges: Mapping[str, tuple[int, int | None]]
    files: Mapping[str, int]
    precision: str | None
    seconds: float

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{name} ({' and '.join(f'{i}[{d}]' for i, d in places)})" for name, places in self.dynamic.items()
        )
        return (
            f"{self.path}: {self.format}, {self.bytes / 1e6:.1f} MB, largest relative error {self.error:.1e} over "
            f"{len(self.tried)} calls; sizes that may vary: {sizes or 'none'}"
        )


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: Literal["onnx", "torch_export", "openvino"] = "onnx",
    example: tuple[Sequence[Any], Mapping[str, Any]] = ((), {}),
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    precision: Precision | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    check: Sequence[tuple[Sequence[Any], Mapping[str, Any]]] = (),
    seed: int = 0,
    progress: Progress = no_bar,
) -> ExportResult:
    """Write ``model``, in evaluation mode, as a file that runs without it, and compare the file with PyTorch.

    The file is run on the example and on random calls of other batch sizes and lengths, and appears only if all outputs
    agree. Its inputs are the tensors of the example, by the names of the parameters of ``forward``; everything else in
    the example is fixed. Its outputs are the tensors that the model returns, without what it keeps for later calls.

    Args:
        model: the model, dense or compressed, with native cuts and shims.
        path: the file; ends in ``.onnx``, ``.pt2`` or ``.xml``. An existing file is replaced.
        format: "onnx", "torch_export" (``torch.export.save``) or "openvino".
        example: arguments and keyword arguments of a call, of two examples or more where the model needs that.
        dynamic: what may have another size, as input -> dimension -> name, such as
            ``{"x": {0: "batch", 2: "time"}}``; ``{}`` for nothing. By default whatever the model bears: the batch,
            which is dimension 0, and lengths; dims that agree in the example vary together.
        precision: type of weights and computation; inputs and outputs stay as they are. For "openvino" the type of the
            stored weights, "float32" or "float16": there the device decides how to compute.
        opset: version of the ONNX operators; the exporter's choice by default.
        tolerance: largest relative error that is accepted; by default 1e-4, 2e-2 for float16, 1e-1 for bfloat16.
        check: further calls to compare, (args, kwargs) pairs like the example.
        seed: of the random calls.
        progress: wraps the calls that are compared, for a progress bar, see ``progress_bars``.

    Raises:
        ImportError: if the format needs a package that is not installed; names the extra.
        ExportError: if the model cannot be traced or converted, or the file differs from the model.
        ValueError: for arguments that do not fit.
    """
    begin = time.perf_counter()
    target = _check_arguments(path, format, precision, opset, dynamic)
    check_plain(model)
    if lacking := lacking_values(model):
        raise ValueError(f"Expected weights with values, but {lacking[0]!r} has none. Load the weights first.")
    check_installed(format)
    rounded = check_quantized(model, precision)
    tolerance = (TOLERANCE if rounded else TOLERANCES[precision]) if tolerance is None else tolerance
    model, example, check = _on_cpu(model, example, check)
    call = flatten_call(model, *example)
    groups = derive(call) if dynamic is None else chosen(call, dynamic)
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside its target, because a rename is atomic only within a file system
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        with _as_exported(model):
            with as_graph(model) if FORMATS[format].integers else contextlib.nullcontext():
                traced = write(
                    FORMATS[format],
                    work / target.name,
                    lambda free: trace(model, call, free, dynamic is not None, dtype_of(format, precision), seed),
                    groups,
                    retry=dynamic is None,
                    options=Options(opset, half=precision == "float16"),
                )
            calls = calls_to_try(model, call, traced, [flatten_call(model, *c) for c in check], seed)
            run = FORMATS[format].read(work / target.name, call.names)
            error, tried = compare(progress(calls, "calls compared"), run, traced.outputs, tolerance)
        files = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
        for name in sorted(files, key=lambda n: n == target.name):  # the file that refers to the others last
            with open(work / name, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(work / name, target.parent / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    notes = list(traced.notes)
    if traced.groups and len(set(tried)) < 2:
        notes.append(
            f"no other sizes of {list(traced.groups)} were tried, because the model refused each of them. If sizes "
            "belong together, say so by dynamic={input: {dimension: name}}."
        )
    for note in notes:
        warnings.warn(f"{target.name}: {note}", stacklevel=2)
    return ExportResult(
        path=target,
        format=format,
        error=error,
        tolerance=tolerance,
        tried=tried,
        inputs=call.names,
        outputs=traced.outputs,
        dynamic={name: tuple((call.names[n], d) for n, d in places) for name, places in traced.groups.items()},
        ranges=traced.ranges,
        files=files,
        precision=precision,
        seconds=time.perf_counter() - begin,
    )


@contextlib.contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, notes of exporters, or fused kernels that no other runtime has."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluation(model), quiet():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


def _on_cpu(model: nn.Module, *calls: Any) -> tuple[Any, ...]:
    """The model and the calls, as copies on the CPU if the model is elsewhere: the file is run there."""
    if all(t.device.type == "cpu" for t in [*model.parameters(), *model.buffers()]):
        return model, *calls
    moved = [pytree.tree_map_only(Tensor, lambda t: t.cpu(), c) for c in calls]
    return copy.deepcopy(model).cpu(), *moved


def _check_arguments(
    path: str | os.PathLike[str],
    format: str,
    precision: str | None,
    opset: int | None,
    dynamic: Mapping[str, Mapping[int, str]] | None,
) -> Path:
    if format not in FORMATS:
        raise ValueError(f"Expected format to be one of {list(FORMATS)}, but got {format!r}.")
    target, suffix = Path(path), FORMATS[format].suffix
    if target.suffix != suffix:
        raise ValueError(f"Expected a path that ends in {suffix!r} for format={format!r}, but got {os.fspath(path)!r}.")
    if precision not in TOLERANCES:
        raise ValueError(f"Expected precision to be one of {list(TOLERANCES)}, but got {precision!r}.")
    if format == "openvino" and precision == "bfloat16":
        raise ValueError(
            "Expected precision 'float32' or 'float16' for the weights in an OpenVINO file, but got 'bfloat16'. "
            "Compute in bfloat16 by the property INFERENCE_PRECISION_HINT when the model is compiled."
        )
    if format == "torch_export" and opset is not None:
        raise ValueError(f"Expected no opset for format='torch_export', which has no ONNX operators, but got {opset}.")
    return target


def dtype_of(format: str, precision: str | None) -> torch.dtype | None:
    """The type that the traced model computes in; None: its own."""
    if precision is None or (format == "openvino" and precision == "float16"):
        return None  # OpenVINO's own way: weights are stored in half precision and the device decides how to compute
    return getattr(torch, precision)


__all__ = ["ExportResult", "export_model"]
