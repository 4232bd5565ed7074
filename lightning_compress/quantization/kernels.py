"""Modules whose weights are packed: who reads a weight gets its values, and some layers compute in another way.

As with quantizers on weights, the class of the module is exchanged for one with a property of the weight's name. An
embedding looks its rows up and unpacks those. A linear layer whose inputs are quantized dynamically multiplies int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.quantization.activations import DynamicRange
from lightning_compress.quantization.inputs import INPUT, InputQuantizer
from lightning_compress.quantization.int8 import int8_kernel, int8_product, reduced_range
from lightning_compress.quantization.packed import GRAPH, PackedForm, PackedWeight, buffer_name
from lightning_compress.quantization_switch import quantization_is_off

# torch 2.6 does not tell export and compilation apart
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

PACKED = "_packed_weights"
KERNEL = "_int8_kernel"
Holder = tuple[nn.Module, str]  # a module, and the name under which it reads a weight
Way = Literal["read", "rows", "int8"]


def install_packed(
    holders: Sequence[Holder], name: str, form: PackedForm, tensors: Mapping[str, Tensor], kept: bool
) -> PackedWeight:
    """Put integers in the place of a parameter; ``choose_ways`` must follow.

    Args:
        holders: everything that reads the parameter; the first gets the buffers.
        name: of the parameter.
        form: what the bytes mean.
        tensors: the bytes, scales and offsets, by suffix.
        kept: whether values are computed once.
    """
    owner, own_key = holders[0]
    packed = PackedWeight(name, form, owner, own_key, kept)
    for module, key in holders:
        del module._parameters[key]
        vars(module)[PACKED] = {**packed_of(module), key: packed}
    for suffix, tensor in tensors.items():
        owner.register_buffer(buffer_name(own_key, suffix), tensor)
    return packed


def choose_ways(model: nn.Module, native: bool) -> dict[str, Way]:
    """Give modules with packed weights the classes that read them; how each computes, by the names of its weights.

    Args:
        model: the model.
        native: whether linear layers multiply int8 where they can; what is read otherwise is unpacked once then,
            because time counts.
    """
    ways: dict[str, Way] = {}
    read: list[PackedWeight] = []
    for path, module in model.named_modules():
        held = packed_of(module)
        if not held:
            continue
        for key, packed in held.items():
            way: Way = "read"
            if native and int8_obstacle(module, key, packed.form) is None:
                way = "int8"
            elif key == "weight" and not packed.kept and _looks_up(module):
                way = "rows"
            else:
                read.append(packed)
            ways[f"{path}.{key}" if path else key] = way
        special = ways.get(f"{path}.weight" if path else "weight", "read")
        module.__class__ = _class_with(plain_class(module), tuple(sorted(held)), special)  # type: ignore[arg-type]
        if special == "int8":
            vars(module)[INPUT].in_kernel = True
    if native:
        for packed in read:
            packed.kept = True
    return ways


def packed_of(module: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights that a module reads, by their names in it."""
    return vars(module).get(PACKED, {})


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by the names of the parameters that they were; shared ones once."""
    found: dict[int, tuple[str, PackedWeight]] = {}
    for path, module in model.named_modules():
        for key, packed in packed_of(module).items():
            found.setdefault(id(packed), (f"{path}.{key}" if path else key, packed))
    return dict(found.values())


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before its weights were packed."""
    kind = type(module)
    return kind.__bases__[0] if packed_of(module) and "_packed" in vars(kind) else kind


def int8_obstacle(module: nn.Module, key: str, form: PackedForm) -> str | None:
    """Why a module cannot multiply int8; None if it can."""
    quantizing: InputQuantizer | None = vars(module).get(INPUT)
    if (obstacle := _kind_obstacle(module, key)) is not None:
        return obstacle
    if quantizing is None or not isinstance(quantizing.quantizer, DynamicRange) or not quantizing.enabled:
        return "its inputs are not quantized by a DynamicRange"
    if quantizing.quantizer.bits != 8:
        return f"its inputs have {quantizing.quantizer.bits} bits, not 8"
    if quantizing.quantizer.reduced is False and reduced_range():
        return "its inputs have 255 steps, which this machine does not compute exactly"
    return weight_obstacle(module, key, form)


def weight_obstacle(module: nn.Module, key: str, form: PackedForm) -> str | None:
    """Why the weight of a module with quantized inputs is none of a product of int8, wherever; None if it is."""
    if (obstacle := _kind_obstacle(module, key)) is not None:
        return obstacle
    hooks = list(module._forward_pre_hooks.values())
    if not hooks or hooks[-1] is not vars(module).get(INPUT):
        return "another hook changes its inputs after they are quantized"
    if form.offset or form.low < -128 or form.high > 127:
        return "its integers are no int8 around 0"
    if form.scope.group is not None:
        return "rows have several scales"
    if form.dtype != torch.float32:
        return f"its type is {str(form.dtype).removeprefix('torch.')}, not float32"
    return None


def _kind_obstacle(module: nn.Module, key: str) -> str | None:
    plain = type(module).forward in (nn.Linear.forward, _forward_int8)
    if key != "weight" or not isinstance(module, nn.Linear) or not plain:
        return f"{type(module).__name__} is no plain linear layer"
    if "forward" in vars(module):
        return "its forward has been replaced, as token pruning does where a tail begins"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "attention reads it and does not call its layer"
    return None


@contextmanager
def int8_compared(model: nn.Module) -> Iterator[list[float]]:
    """Under it every int8 product is compared with the same product of float32; relative errors go into the list."""
    errors: list[float] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        expected = _forward_plain(module, *args, **kwargs)
        if expected.numel():
            errors.append(float((output - expected).abs().max()) / (float(expected.abs().max()) or 1.0))

    layers = [module for module in model.modules() if packed_of(module) and type(module).forward is _forward_int8]
    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in layers]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and _has_forward_of(module, nn.Embedding) and module.max_norm is None


def _has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module).forward is kind.forward and "forward" not in vars(module)


@cache
def _class_with(plain: type[nn.Module], keys: tuple[str, ...], way: Way) -> type[nn.Module]:
    """A subclass whose weights are read from their integers."""

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        own = [packed for packed in packed_of(module).values() if packed.owner is module]
        before = [{suffix: packed.buffer(suffix) for suffix in packed.form.tensors} for packed in own]
        plain._apply(module, function, recurse)
        for packed, tensors in zip(own, before, strict=True):
            packed.follow(function, tensors)
        return module

    def load(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain._load_from_state_dict(module, *args, **kwargs)
        for packed in packed_of(module).values():
            packed.changed()

    members: dict[str, Any] = {key: property(_reader(key)) for key in keys}
    members |= {"_apply": apply, "_load_from_state_dict": load, "_packed": keys}
    if way != "read":
        members["forward"] = _forward_rows if way == "rows" else _forward_int8
    members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), members)


def _reader(key: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        packed: PackedWeight = vars(module)[PACKED][key]
        return packed.values()

    return read


def _forward_rows(module: nn.Module, input: Tensor) -> Tensor:
    packed: PackedWeight = vars(module)[PACKED]["weight"]
    return packed.rows(input)


def _forward_int8(module: nn.Module, input: Tensor) -> Tensor:
    packed: PackedWeight = vars(module)[PACKED]["weight"]
    quantizing: InputQuantizer = vars(module)[INPUT]
    quantizer = quantizing.quantizer
    assert isinstance(quantizer, DynamicRange)
    autocast = torch.is_autocast_enabled("cpu")
    fits = packed.device.type == input.device.type == "cpu" and packed.form.dtype == torch.float32
    fits = fits and (input.dtype == torch.float32 or (autocast and input.is_floating_point())) and input.numel() > 0
    if not fits or not quantizing.enabled or quantization_is_off() or is_exporting():
        return _forward_plain(module, input)  # exported, too: a graph cannot have the kernel
    wide, kernel = input.float(), _kernel_of(module, packed)
    reduced = quantizer.steps(packed.device) == 127
    try:
        if torch.is_grad_enabled():
            output = _Int8Product.apply(wide, module.bias, packed, kernel, reduced)
        else:
            output = int8_product(wide, kernel, reduced)
    except RuntimeError:
        if bool(wide.isfinite().all()) and wide.shape[-1] == packed.form.shape[1]:
            raise
        return _forward_plain(module, input)  # NaN, which the kernel refuses, goes through; so do torch's own messages
    quantizing.calls += 1
    return output.to(torch.get_autocast_dtype("cpu")) if autocast else output


def _forward_plain(module: nn.Module, input: Tensor) -> Tensor:
    quantizing: InputQuantizer = vars(module)[INPUT]
    linear: Any = module
    return functional.linear(quantizing.quantized(input, module.training), linear.weight, linear.bias)


def _kernel_of(module: nn.Module, packed: PackedWeight) -> Any:
    """What the kernel wants of the weight, made when the first call needs it and when something has changed."""
    bias: Any = module.bias
    other = packed_of(module).get("bias")
    if other is not None:
        stamp: Any = (packed.version, other.version)
    else:
        counted = isinstance(bias, Tensor) and not bias.is_inference()
        stamp = (packed.version, id(bias), bias._version if counted else 0)
    held: _Kernel | None = vars(module).get(KERNEL)
    if held is None or held.stamp != stamp:
        with torch.inference_mode(False), torch.no_grad():
            made = int8_kernel(packed.quantized().integers, packed.buffer("scale"), bias)
        held = vars(module)[KERNEL] = _Kernel(made, stamp, bias)
    return held.kernel


class _Kernel:
    """A kernel, which copies of the module make for themselves."""

    def __init__(self, kernel: Any, stamp: Any, bias: Any) -> None:
        self.kernel, self.stamp = kernel, stamp
        self.bias = bias  # as long as it lives nothing else has its id

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


class _Int8Product(torch.autograd.Function):
    """The kernel, which would lose gradients without a word; here they pass straight through the rounding."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bias: Tensor | None, packed: PackedWeight, kernel: Any, reduced: bool
    ) -> Tensor:
        ctx.packed = packed
        return int8_product(inputs, kernel, reduced)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (gradient,) = gradients
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.packed.values(), of_bias, None, None, None


__all__ = [
    "GRAPH",
    "Holder",
    "Way",
    "choose_ways",
    "install_packed",
    "int8_compared",
    "int8_obstacle",
    "packed_of",
    "packed_weights",
    "plain_class",
    "weight_obstacle",
]
