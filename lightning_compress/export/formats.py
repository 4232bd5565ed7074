"""Writing a traced model in a format, and running what was written."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.export.call import tensors_of
from lightning_compress.export.program import Options, Traced
from lightning_compress.export.quantized import Form, translations

Run = Callable[[Sequence[Tensor]], list[Tensor]]
LARGEST = 2**31 - 2**20  # bytes of weights that one ONNX file, which is limited to 2 GiB, surely holds


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        suffix: of its file.
        extra: the optional dependencies of this library that it needs.
        packages: the modules that come with them.
        write: writes a file, and perhaps others beside it.
        read: opens the file, given the names of its inputs, and returns what runs it.
        integers: whether quantized weights are written as integers, by operators that are translated.
    """

    suffix: str
    extra: str | None
    packages: tuple[str, ...]
    write: Callable[[Traced, Path, Options], None]
    read: Callable[[Path, Sequence[str]], Run]
    integers: bool = False


def check_installed(name: str) -> None:
    """Raise ImportError, naming the extra, unless everything that the format needs can be imported."""
    form = FORMATS[name]
    for package in form.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"Expected {package!r} to be installed for format={name!r}, but it cannot be imported ({error}). "
                f"Install the extra: pip install 'lightning-compress[{form.extra}]'."
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes of exporters on optional packages and on constants that they leave alone."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_onnx(traced: Traced, path: Path, options: Options, form: Form = "integer") -> None:
    """An ONNX file; weights of more than 2 GiB lie beside it, in a file with ``.data`` appended to its name."""
    program = torch.onnx.export(
        traced.program,
        input_names=list(traced.inputs),
        output_names=list(traced.outputs),
        opset_version=options.opset,
        dynamo=True,
        verbose=False,
        custom_translation_table=dict(translations(form)),
    )
    assert program is not None
    _name_sizes(program.model, traced.symbols)
    program.save(str(path), external_data=traced.weights > LARGEST)


def _name_sizes(model: Any, symbols: Mapping[str, str]) -> None:
    """Call sizes "batch" and "length" in the file, not "s43"."""
    import onnx_ir

    def renamed(dim: Any) -> Any:
        if isinstance(dim, int) or dim.value is None:
            return dim
        if dim.value.isdecimal():  # a size that the trace has fixed
            return int(dim.value)
        return onnx_ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), str(dim.value)))

    values = [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = onnx_ir.Shape([renamed(dim) for dim in value.shape])


def read_onnx(path: Path, names: Sequence[str]) -> Run:
    """Runs an ONNX file in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        fed = {name: t.detach().contiguous().numpy() for name, t in zip(names, tensors, strict=True)}
        return [torch.as_tensor(array) for array in session.run(None, fed)]

    return run


def write_torch(traced: Traced, path: Path, options: Options) -> None:
    """A file of ``torch.export.save``."""
    torch.export.save(traced.program, str(path))


def read_torch(path: Path, names: Sequence[str]) -> Run:
    """Runs a file of ``torch.export.save``."""
    module = torch.export.load(str(path)).module()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(module(**dict(zip(names, tensors, strict=True))))

    return run


def write_openvino(traced: Traced, path: Path, options: Options) -> None:
    """OpenVINO's two files, ``.xml`` and ``.bin``, made from an ONNX file; its reader of ONNX keeps names and sizes."""
    import openvino

    between = path.with_suffix(".onnx")
    write_onnx(traced, between, options, "fake")
    openvino.save_model(openvino.Core().read_model(str(between)), str(path), compress_to_fp16=options.half)
    for file in (between, Path(f"{between}.data")):
        file.unlink(missing_ok=True)


def read_openvino(path: Path, names: Sequence[str]) -> Run:
    """Runs OpenVINO's files on the CPU, in float32 whatever the device likes best: the graph is what is judged."""
    import openvino

    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", properties)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        results = compiled({name: t.detach().contiguous().numpy() for name, t in zip(names, tensors, strict=True)})
        return [torch.from_numpy(results[i].copy()) for i in range(len(compiled.outputs))]

    return run


_ONNX = ("onnx", "onnxscript")
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", "onnx", (*_ONNX, "onnxruntime"), write_onnx, read_onnx, True),
    "torch_export": Format(".pt2", None, (), write_torch, read_torch),
    "openvino": Format(".xml", "openvino", (*_ONNX, "openvino"), write_openvino, read_openvino, True),
}
