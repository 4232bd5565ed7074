"""From a model that computes as if its weights were integers to one whose weights are."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.discovery.outputs import Output, flatten
from lightning_compress.discovery.tracer import evaluation
from lightning_compress.example_call import example_call
from lightning_compress.progress import Progress, quiet
from lightning_compress.quantization.conversion import DENSE, ConversionReport
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization.inputs import detach_input_quantizers, input_quantizers
from lightning_compress.quantization.int8 import check_available, reduced_range
from lightning_compress.quantization.kernels import (
    Holder,
    choose_ways,
    install_packed,
    int8_compared,
    int8_obstacle,
    packed_weights,
)
from lightning_compress.quantization.packed import PackedForm, buffer_name, packed_tensors
from lightning_compress.quantization.weights import detach_quantizers, holders_of, weight_quantizers
from lightning_compress.timing import measure_latency

BACKENDS = ("native", "packed", "unpacked")
SEED = 0
LAYER_TOLERANCE = 1e-4  # of one int8 product, whose rounding is some 1e-6
TOLERANCE = 0.05  # of outputs, where quantization itself changes no more
ONCE = "unpacked once"
HOW = {
    "int8": "multiplied in int8",
    "rows": "unpacked row by row, where they are looked up",
    "read": "unpacked at every read",
}


def convert(
    model: nn.Module,
    backend: str = "auto",
    example: object = None,
    tolerance: float | None = None,
    seconds: float = 5.0,
    *,
    progress: Progress = quiet,
) -> ConversionReport:
    r"""Replace quantized weights by the integers that they stand for, in place; nothing is changed if it fails.

    .. math:: W \to (k, c, o), \quad \hat W = k\,c + o

    with the integers k packed. They are those of ``WeightQuantizer.quantize``, so the model computes with the weights
    that it computed with before, in evaluation. Its parameters give way to buffers ``weight_packed``, ``weight_scale``
    and, where blocks have offsets, ``weight_offset``; who reads ``weight`` gets its values. A parameter that several
    modules share is stored once, with the first. Quantizers on inputs stay.

    Backends:

    - "native": linear layers with 8 bits or fewer around 0, one scale or one a row, whose inputs are quantized by
      ``DynamicRange(8)``, multiply int8 with torch's dynamic kernel, on the CPU, in float32. Embeddings unpack the rows
      that they look up, and other weights are unpacked once. Each product differs from that of the prepared model by
      about 1e-6; where this moves an input of a later layer across the middle between two steps, it becomes a step. So
      do the sums of another machine: outputs of a prepared encoder of two layers differed by 1e-2 between float32 and
      float64. With an example, products are compared one by one, and must agree within 1e-4.
    - "packed": weights are unpacked at every read, which takes little memory and some time; rows of an embedding are
      unpacked where they are looked up.
    - "unpacked": weights are packed in the state of the model, and unpacked once. As fast as before.
    - "auto": the fastest of these on the example, among those within the tolerance.

    There is none for torchao: it rounds inputs row by row and not by the range of the call, so that its outputs are not
    those of the prepared model; and without ``torch.compile`` its int8 products are some 30 times slower on a CPU than
    those of float32 (torchao 0.18, 64 x 512 x 512).

    Args:
        model: a model with quantizers, from ``attach_quantizers``.
        backend: what it shall compute with.
        example: (args, kwargs) of a call; "auto" needs one, and other backends are compared and measured with one.
        tolerance: largest max |difference| / max |reference| of an output, against the prepared model. None is 0.05,
            or by how much the prepared model differs from the one without quantizers, if that is more: inputs that go
            to the next step are an error of the same kind.
        seconds: for measuring, about.
        progress: wraps what is gone through, for a progress bar, see ``progress_bars``.

    Raises:
        QuantizationError: for a model with nothing quantized or converted before; "auto" without an example; an example
            that fails; outputs that differ by more than the tolerance; "native" where no layer can, on another device
            than the CPU, or without an exact kernel.
        ValueError: for another backend, a tolerance that is no number above 0, or seconds that are not above 0.
        TypeError: if the example is no (args, kwargs).
    """
    _check_arguments(model, backend, example, tolerance, seconds)
    call = None if example is None else example_call("example", example)
    plan, left = _planned(model, backend == "native", progress)
    native = _native(model, plan)
    if backend == "native":
        check_available()
        if None not in native.values():
            raise QuantizationError(
                f"Expected a linear layer that multiplies int8 with backend='native', but there is none: "
                f"{_some(native)}. Use backend='packed', or attach_input_quantizers(model, {{path: DynamicRange()}})."
            )
    possible = _on_cpu(plan) and None in native.values() and reduced_range() is not None
    candidates = [backend] if backend != "auto" else [b for b in BACKENDS if b != "native" or possible]
    trial = _Trial() if call is None else _tried(model, plan, candidates, call, seconds, progress)
    tolerance = max(TOLERANCE, trial.change if math.isfinite(trial.change) else 0) if tolerance is None else tolerance
    chosen = candidates[0] if call is None else _fastest(trial, candidates, tolerance)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    ways = _install(model, plan, chosen)
    after = sum(p.numel() * p.element_size() for p in model.parameters())
    return ConversionReport(
        backend=chosen,
        milliseconds=trial.times,
        errors=trial.errors,
        layer_error=trial.layer_error,
        tolerance=tolerance,
        bytes_before=before,
        bytes_after=after + sum(packed.form.bytes for packed in packed_weights(model).values()),
        converted={p.name: _how(p, ways, chosen, native) for p in plan},
        left=left,
    )


@dataclass(frozen=True)
class _Trial:
    """What became of the candidates on the example; by how much the prepared model differs from the dense one."""

    times: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    layer_error: float | None = None
    change: float = 0.0


@dataclass(frozen=True)
class _Planned:
    """A weight that becomes integers.

    Args:
        name: of the parameter.
        names: all of its names.
        form: what the bytes mean.
        tensors: the bytes, scales and offsets, by suffix.
        device: of the parameter.
    """

    name: str
    names: tuple[str, ...]
    form: PackedForm
    tensors: Mapping[str, Tensor]
    device: torch.device


def _check_arguments(model: nn.Module, backend: str, example: object, tolerance: float | None, seconds: float) -> None:
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"Expected backend to be one of {(*BACKENDS, 'auto')}, but got {backend!r}.")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"Expected tolerance, a relative error, to be above 0, but got {tolerance!r}.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"Expected seconds, for measuring, to be above 0, but got {seconds!r}.")
    if packed_weights(model):
        raise QuantizationError(
            f"Expected a prepared model, but {next(iter(packed_weights(model)))!r} was converted already. Convert a "
            "model once."
        )
    if not weight_quantizers(model):
        raise QuantizationError(
            f"Expected a model with quantized weights, but {type(model).__name__} has none. Put quantizers on first: "
            "attach_quantizers(model, {name: quantizer})."
        )
    if backend == "auto" and example is None:
        raise QuantizationError(
            "Expected an example for backend='auto', which measures the backends, but got none. Pass "
            f"example=(args, kwargs), or choose one of {BACKENDS}."
        )


def _planned(model: nn.Module, check_device: bool, progress: Progress) -> tuple[list[_Planned], dict[str, str]]:
    """The integers of all weights that become some, and why the others do not."""
    parameters = dict(model.named_parameters())
    left = dict.fromkeys(parameters, "without a quantizer")
    found = []
    for name, quantizing in progress(weight_quantizers(model).items(), "integers of weights"):
        holders = [(path, module, key) for path, module, key in holders_of(model, quantizing)]
        _, first, own_key = holders[0]
        parameter = first._parameters[own_key]
        if not quantizing.enabled or parameter is None:
            left[name] = "whose quantizer is off"
            continue
        if check_device and parameter.device.type != "cpu":
            raise QuantizationError(
                f"Expected weights on the CPU for backend='native', but {name!r} lies on {parameter.device}. Convert "
                "model.cpu(), or use backend='packed' or 'unpacked'."
            )
        quantized = quantizing.quantize(parameter)
        form = PackedForm.of(quantizing.quantizer, quantized)
        for suffix in form.tensors:
            if hasattr(first, buffer_name(own_key, suffix)):
                raise QuantizationError(
                    f"Expected no attribute {buffer_name(own_key, suffix)!r} of the module that has {name!r}, because "
                    "its integers are kept under that name, but there is one. Rename it."
                )
        names = tuple(f"{path}.{key}" if path else key for path, _, key in holders)
        found.append(_Planned(name, names, form, packed_tensors(quantized), parameter.device))
        left.pop(name, None)
    for path, on_input in input_quantizers(model).items():
        if on_input.enabled and not on_input.quantizer.is_ready(on_input.state):
            raise QuantizationError(
                f"Expected ranges of inputs to be known, but those of {path!r} are not: {on_input.quantizer} has "
                "seen no batch. Train first, or take it off: detach_input_quantizers(model)."
            )
    if not found:
        raise QuantizationError(
            f"Expected a model with quantized weights, but all quantizers of {type(model).__name__} are off. Set their "
            "enabled to True."
        )
    return found, left


def _native(model: nn.Module, plan: Sequence[_Planned]) -> dict[str, str | None]:
    """By all names of weights, why they are not multiplied in int8; None where they are."""
    return {name: int8_obstacle(*_holder(model, name), planned.form) for planned in plan for name in planned.names}


def _on_cpu(plan: Sequence[_Planned]) -> bool:
    return all(planned.device.type == "cpu" for planned in plan)


def _install(model: nn.Module, plan: Sequence[_Planned], backend: str) -> Mapping[str, str]:
    detach_quantizers(model)
    for planned in plan:
        holders = [_holder(model, name) for name in planned.names]
        install_packed(holders, planned.name, planned.form, planned.tensors, backend == "unpacked")
    return choose_ways(model, backend == "native")


def _holder(model: nn.Module, name: str) -> Holder:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _how(planned: _Planned, ways: Mapping[str, str], backend: str, native: Mapping[str, str | None]) -> str:
    if backend == "unpacked":
        return ONCE
    found = dict.fromkeys(
        f"{ONCE}: {native[name]}" if backend == "native" and ways[name] == "read" else HOW[ways[name]]
        for name in planned.names
    )
    return " and ".join(found)


def _some(native: Mapping[str, str | None]) -> str:
    shown = [f"{name!r}: {why}" for name, why in native.items()][:3]
    return "; ".join(shown) + (f"; and {len(native) - 3} more" if len(native) > 3 else "")


def _tried(
    model: nn.Module,
    plan: Sequence[_Planned],
    candidates: Sequence[str],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    seconds: float,
    progress: Progress,
) -> _Trial:
    """The candidates on the example: copies over the same weights, so that the model is left alone."""
    try:
        prepared, dense = _twin(model), _twin(model)
        detach_quantizers(dense)
        detach_input_quantizers(dense)
        twins = {DENSE: dense}
        expected = _run(prepared, call)
        change = _difference(_run(dense, call), expected)
        errors: dict[str, float] = {}
        layers: list[float] = []
        for name in progress(candidates, "backends compared"):
            twins[name] = _twin(model)
            _install(twins[name], plan, name)
            with int8_compared(twins[name]) as layer_errors:
                errors[name] = _difference(expected, _run(twins[name], call))
            layers += layer_errors
        measured = measure_latency(twins, *call, repeats=101, max_seconds=seconds, progress=progress)
    except QuantizationError:
        raise
    except Exception as cause:  # whatever somebody's model raises
        raise QuantizationError(
            f"Expected the example to run in evaluation mode, but it raised {type(cause).__name__}: {cause}. Nothing "
            "was changed."
        ) from cause
    times = {name: 1e3 * latency.seconds for name, latency in measured.items()}
    return _Trial(times, errors, max(layers, default=None), change)


def _fastest(trial: _Trial, candidates: Sequence[str], tolerance: float) -> str:
    """The fastest of the candidates that agree with the prepared model."""
    exact = trial.layer_error is None or trial.layer_error <= LAYER_TOLERANCE
    if not exact and list(candidates) == ["native"]:
        raise QuantizationError(
            f"Expected int8 products to be those of float32 within {LAYER_TOLERANCE:g}, but on the example the error "
            f"is {trial.layer_error:.1e}. Nothing was changed. Use backend='packed' or 'unpacked'."
        )
    allowed = [name for name in candidates if trial.errors[name] <= tolerance and (exact or name != "native")]
    if not allowed:
        raise QuantizationError(
            f"Expected outputs of the converted model to be those of the prepared one within {tolerance:g}, but the "
            f"errors are {', '.join(f'{name} {trial.errors[name]:.1e}' for name in candidates)}. Nothing was changed. "
            "Pass a larger tolerance if later layers round what differs a little, or use another backend."
        )
    return min(allowed, key=lambda name: trial.times[name])


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same Parameters; what it holds beside them is its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _run(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Output]:
    args, kwargs = call
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluation(model):
        torch.manual_seed(SEED)
        found = flatten(model(*args, **kwargs))
    if not found:
        raise QuantizationError("Expected the example call to return a tensor, to compare it, but it returns none.")
    return found


def _difference(expected: Mapping[str, Output], got: Mapping[str, Output]) -> float:
    """Largest max |difference| / max |reference| of what the caller sees; infinite where NaN or shapes differ."""
    worst = 0.0
    for path, output in expected.items():
        if output.internal:
            continue
        a, b = output.tensor, got[path].tensor if path in got else None
        if b is None or a.shape != b.shape:
            return math.inf
        if not a.numel() or torch.equal(a, b):
            continue
        if not a.is_floating_point():
            return math.inf
        gap = torch.where(a == b, 0, a.double() - b.double()).abs()  # equal infinities are equal
        gap = gap.masked_fill(a.isnan() & b.isnan(), 0)
        largest = float(a.double()[a.isfinite()].abs().amax()) if bool(a.isfinite().any()) else 0.0
        error = float(gap.max()) / (largest or 1.0)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


__all__ = ["BACKENDS", "convert"]
