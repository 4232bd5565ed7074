"""A converted model without its tensors: which weights are integers, what bytes mean, how inputs are rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.activations import ActivationQuantizer, InputState
from lightning_compress.quantization.convert import BACKENDS
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization.inputs import attach_input_quantizers, input_quantizers
from lightning_compress.quantization.int8 import check_available
from lightning_compress.quantization.kernels import Holder, choose_ways, install_packed, packed_of, packed_weights
from lightning_compress.quantization.packed import PackedForm, buffer_name
from lightning_compress.quantization.record import (
    LARGEST,
    READER,
    activation_from,
    activation_state,
    quantizer_from,
    quantizer_state,
)

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
MOST_BITS, MOST_DIMS, LARGEST_DIMENSION = 16, 16, 2**40
WEIGHT = ("module", "parameter", "shared", "quantizer", "bits", "low", "high", "offset", "shape", "dtype")
INPUT = ("module", "quantizer", "range", "step", "signed")

Fit = tuple[torch.dtype, tuple[int, ...]]  # type and shape of a tensor


@dataclass(frozen=True)
class WeightRecord:
    """A weight that is stored as integers.

    Args:
        places: path of the module, and the name of the parameter in it, of everything that reads the weight; the first
            has the buffers.
        form: what the bytes mean.
    """

    places: tuple[tuple[str, str], ...]
    form: PackedForm

    @property
    def tensors(self) -> dict[str, Fit]:
        """Type and shape of its tensors by their names in the state of the model."""
        path, key = self.places[0]
        prefix = f"{path}." if path else ""
        return {prefix + buffer_name(key, suffix): fit for suffix, fit in self.form.tensors.items()}


@dataclass(frozen=True)
class InputRecord:
    """A module whose inputs are quantized.

    Args:
        module: its path.
        quantizer: how.
        range: observed; None where it is not.
        step: learned; None where it is not.
        signed: whether there are negative steps; None where that is not learned.
    """

    module: str
    quantizer: ActivationQuantizer
    range: tuple[float, float] | None = None
    step: float | None = None
    signed: bool | None = None

    def state(self) -> InputState:
        """What the quantizer knows."""
        known = InputState(signed=self.signed)
        if self.range is not None:
            known.range = _exact(self.range)
        if self.step is not None:
            known.step = _exact((self.step,)).reshape(1, 1).requires_grad_()
        return known


@dataclass(frozen=True)
class QuantizationRecord:
    """What was converted in a model.

    Args:
        backend: what it computes with, one of ``BACKENDS``.
        weights: those that are integers.
        inputs: modules whose inputs are quantized.
    """

    backend: str
    weights: tuple[WeightRecord, ...]
    inputs: tuple[InputRecord, ...]

    def state(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "backend": self.backend,
            "weights": [_weight_state(weight) for weight in self.weights],
            "inputs": [
                {
                    "module": one.module,
                    "quantizer": activation_state(one.quantizer),
                    "range": None if one.range is None else list(one.range),
                    "step": one.step,
                    "signed": one.signed,
                }
                for one in self.inputs
            ],
        }

    def install(self, model: nn.Module, backend: str | None = None) -> None:
        """Put buffers, without values, in the place of ``model``'s parameters; its tensors are to be loaded then.

        Args:
            model: the dense model, smaller by what was removed.
            backend: what to compute with; None for what was saved.

        Raises:
            ValueError: if the model has no such modules or parameters, or parameters of other shapes.
            QuantizationError: for "native" without an exact kernel.
        """
        chosen = backend or self.backend
        if chosen not in BACKENDS:
            raise ValueError(f"Expected backend to be one of {BACKENDS}, but got {chosen!r}.")
        if chosen == "native":
            check_available()
        modules = dict(model.named_modules())
        for number, weight in enumerate(self.weights):
            where = f"quantization.weights[{number}]"
            holders = [_holder(modules, path, key, weight.form.shape, where) for path, key in weight.places]
            tensors = {suffix: torch.zeros(shape, dtype=kind) for suffix, (kind, shape) in weight.form.tensors.items()}
            first = ".".join(filter(None, weight.places[0]))
            install_packed(holders, first, weight.form, tensors, kept=chosen == "unpacked")
        for number, one in enumerate(self.inputs):
            if one.module not in modules:
                raise _misfit(f"quantization.inputs[{number}].module", f"a module {one.module!r}")
        made = attach_input_quantizers(model, {one.module: one.quantizer for one in self.inputs})
        for one in self.inputs:
            made[one.module].state = one.state()
        choose_ways(model, chosen == "native")

    def check_values(self, model: nn.Module) -> None:
        """Look at what was loaded.

        Raises:
            ValueError: for integers that the quantizer does not make, or scales that are not finite or below 0.
        """
        for number, packed in enumerate(packed_weights(model).values()):
            form, integers = packed.form, packed.quantized().integers
            if integers.numel() and (int(integers.min()) < form.low or int(integers.max()) > form.high):
                raise ValueError(
                    f"Expected integers of quantization.weights[{number}] from {form.low} to {form.high}, but got some "
                    f"from {int(integers.min())} to {int(integers.max())}: {packed.name!r} is damaged."
                )
            scale = packed.buffer("scale")
            if not bool((scale.isfinite() & (scale >= 0)).all()):
                raise ValueError(
                    f"Expected scales of quantization.weights[{number}] to be finite and at least 0, but some are not: "
                    f"{packed.name!r} is damaged."
                )


def quantization_record(model: nn.Module) -> QuantizationRecord | None:
    """The record of a converted model; None for others.

    Raises:
        QuantizationError: for quantizers that are none of this library, or ranges that are not finite.
    """
    found = packed_weights(model)
    if not found:
        return None
    places: dict[int, list[tuple[str, str]]] = {id(packed): [] for packed in found.values()}
    for path, module in model.named_modules():
        for key, packed in packed_of(module).items():
            first = packed.owner is module and packed.key == key  # it has the buffers
            found_places = places[id(packed)]
            found_places.insert(0 if first else len(found_places), (path, key))
    on_inputs = {path: one for path, one in input_quantizers(model).items() if one.enabled}
    if any(one.in_kernel for one in on_inputs.values()):
        backend = "native"
    else:
        backend = "unpacked" if next(iter(found.values())).kept else "packed"
    weights = tuple(WeightRecord(tuple(places[id(packed)]), packed.form) for packed in found.values())
    return QuantizationRecord(
        backend, weights, tuple(_input(path, one.quantizer, one.state) for path, one in on_inputs.items())
    )


def read_quantization_record(value: object, path: str, stored: Mapping[str, Fit]) -> QuantizationRecord:
    """The record of a JSON object, after every check that needs no model.

    Args:
        value: parsed JSON.
        path: where it lies in its file, for messages.
        stored: types and shapes of the tensors that the file lists, by name.

    Raises:
        ValueError: for anything else than what ``QuantizationRecord.state`` returns, or tensors that do not fit it.
    """
    data = READER.object(value, path, ("backend", "weights", "inputs"))
    weights = []
    for item, where in ((item, where) for where, item in READER.items(data["weights"], f"{path}.weights")):
        weights.append(_read_weight(item, where))
        for name, fit in weights[-1].tensors.items():
            if stored.get(name) != fit:
                READER.refuse(where, f"of a tensor {name!r}, {_in_words(fit)}", _in_words(stored.get(name)))
    if not weights:
        READER.refuse(f"{path}.weights", "a list with a weight", data["weights"])
    seen: set[tuple[str, str]] = set()
    for number, weight in enumerate(weights):
        for place in weight.places:
            if place in seen:
                READER.refuse(f"{path}.weights[{number}]", "of a parameter that has no other record", ".".join(place))
            seen.add(place)
    inputs = [_read_input(item, where) for where, item in READER.items(data["inputs"], f"{path}.inputs")]
    for number, one in enumerate(inputs):
        if one.module in {other.module for other in inputs[:number]}:
            READER.refuse(f"{path}.inputs[{number}].module", "of no other record", one.module)
    return QuantizationRecord(
        READER.string(data["backend"], f"{path}.backend", BACKENDS), tuple(weights), tuple(inputs)
    )


def _weight_state(weight: WeightRecord) -> dict[str, Any]:
    form, (module, parameter) = weight.form, weight.places[0]
    return {
        "module": module,
        "parameter": parameter,
        "shared": [list(place) for place in weight.places[1:]],
        "quantizer": quantizer_state(form.quantizer),
        "bits": form.bits,
        "low": form.low,
        "high": form.high,
        "offset": form.offset,
        "shape": list(form.shape),
        "dtype": str(form.dtype).removeprefix("torch."),
    }


def _read_weight(value: object, path: str) -> WeightRecord:
    data = READER.object(value, path, WEIGHT)
    places = [tuple(READER.string(data[key], f"{path}.{key}") for key in ("module", "parameter"))]
    for where, item in READER.items(data["shared"], f"{path}.shared"):
        names = READER.items(item, where)
        if len(names) != 2:
            READER.refuse(where, "a list of a module and a parameter", item)
        places.append(tuple(READER.string(name, at) for at, name in names))
    quantizer = quantizer_from(data["quantizer"], f"{path}.quantizer")
    bits = READER.integer(data["bits"], f"{path}.bits", 1, MOST_BITS)
    if bits != quantizer.stored_bits:
        READER.refuse(f"{path}.bits", f"{quantizer.stored_bits}, as {quantizer} stores", bits)
    low = READER.integer(data["low"], f"{path}.low", -(2**MOST_BITS), 0)
    high = READER.integer(data["high"], f"{path}.high", low + 1, low + 2**bits - 1)
    sizes = READER.items(data["shape"], f"{path}.shape")
    if len(sizes) > MOST_DIMS:
        READER.refuse(f"{path}.shape", f"a list of at most {MOST_DIMS} sizes", data["shape"])
    shape = tuple(READER.integer(size, where, 1, LARGEST_DIMENSION) for where, size in sizes)
    form = PackedForm(
        quantizer,
        low,
        high,
        bits,
        shape,
        DTYPES[READER.string(data["dtype"], f"{path}.dtype", tuple(DTYPES))],
        READER.boolean(data["offset"], f"{path}.offset"),
    )
    row = form.elements // shape[0] if shape else 1
    if form.scope.group is not None and row % form.scope.group:
        READER.refuse(f"{path}.shape", f"one whose rows are a multiple of {form.scope.group}", list(shape))
    return WeightRecord(tuple((module, key) for module, key in places), form)


def _read_input(value: object, path: str) -> InputRecord:
    data = READER.object(value, path, INPUT)
    quantizer = activation_from(data["quantizer"], f"{path}.quantizer")
    known = quantizer.first_state()
    observed: tuple[float, float] | None = None
    if data["range"] is not None:
        ends = READER.items(data["range"], f"{path}.range")
        if len(ends) != 2:
            READER.refuse(f"{path}.range", "a list of two numbers, or null", data["range"])
        low = READER.number(ends[0][1], ends[0][0], -LARGEST, LARGEST)
        observed = low, READER.number(ends[1][1], ends[1][0], low, LARGEST)
    step = None if data["step"] is None else READER.number(data["step"], f"{path}.step", 0, LARGEST)
    signed = None if data["signed"] is None else READER.boolean(data["signed"], f"{path}.signed")
    if (step is None) != (known.step is None):
        READER.refuse(f"{path}.step", f"{'null' if known.step is None else 'a number'} for {quantizer}", step)
    found = InputRecord(READER.string(data["module"], f"{path}.module"), quantizer, observed, step, signed)
    if not quantizer.is_ready(found.state()):
        known_now = {"range": observed, "signed": signed}
        READER.refuse(path, f"with what {quantizer} needs to know, its range or its sign", known_now)
    return found


def _input(path: str, quantizer: ActivationQuantizer, state: InputState) -> InputRecord:
    numbers = [*(() if state.range is None else state.range.tolist())]
    step = None if state.step is None else state.step.detach().item()
    if not all(map(math.isfinite, [*numbers, step or 0.0])):
        raise QuantizationError(
            f"Expected the range of inputs of {path!r} to be finite, but got {numbers or step}. Look for a batch with "
            "NaN or infinite activations."
        )
    return InputRecord(path, quantizer, (numbers[0], numbers[1]) if numbers else None, step, state.signed)


def _holder(modules: Mapping[str, nn.Module], path: str, key: str, shape: tuple[int, ...], where: str) -> Holder:
    name = f"{path}.{key}" if path else key
    parameter = modules[path]._parameters.get(key) if path in modules else None
    if parameter is None:
        raise _misfit(where, f"a parameter {name!r}")
    if tuple(parameter.shape) != shape:
        raise _misfit(where, f"a parameter {name!r} of shape {shape}", f"one of shape {tuple(parameter.shape)}")
    return modules[path], key


def _misfit(where: str, expected: str, got: str = "none") -> ValueError:
    return ValueError(
        f"Expected the rebuilt model to have {expected}, as {where} says, but it has {got}. The factory must build the "
        "dense model that was compressed."
    )


def _in_words(fit: Fit | None) -> str:
    return "none" if fit is None else f"{str(fit[0]).removeprefix('torch.')} of shape {fit[1]}"


def _exact(numbers: tuple[float, ...]) -> Tensor:
    """In float32 if that holds them, as it does what was computed in it."""
    narrow = torch.tensor(numbers, dtype=torch.float32)
    return narrow if tuple(narrow.tolist()) == tuple(numbers) else torch.tensor(numbers, dtype=torch.float64)


__all__ = [
    "InputRecord",
    "QuantizationRecord",
    "WeightRecord",
    "quantization_record",
    "read_quantization_record",
]
