"""Quantizers on what modules are called with, in forward pre-hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.activations import ActivationQuantizer
from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization_switch import quantization_is_off

INPUT = "_input_quantizer"


class InputQuantizer:
    """The quantizer of what one module is called with: its first argument.

    Attributes:
        name: path of the module in the model that it was attached to.
        quantizer: what it computes.
        state: what the quantizer knows from before.
        enabled: whether it quantizes at all.
        in_kernel: whether the module does it itself, with its product; then this only says how.
        calls: how often an input was quantized here.
    """

    def __init__(self, name: str, quantizer: ActivationQuantizer) -> None:
        self.name, self.quantizer = name, quantizer
        self.state = quantizer.first_state()
        self.enabled = True
        self.in_kernel = False
        self.calls = 0

    @property
    def step(self) -> Tensor | None:
        """What is learned, a leaf (1, 1) that is not registered with the module; None for nothing."""
        return self.state.step

    def quantized(self, inputs: Tensor, training: bool) -> Tensor:
        """The inputs with quantized values, or as they are."""
        if not self.enabled or quantization_is_off() or not inputs.is_floating_point() or not inputs.numel():
            return inputs
        self.calls += 1
        return self.quantizer(inputs, self.state, training)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook: arguments with the first of them quantized."""
        if self.in_kernel:
            return None
        if args:
            if not isinstance(args[0], Tensor):
                return None
            return (self.quantized(args[0], module.training), *args[1:]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, key: self.quantized(value, module.training)}
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> InputQuantizer:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self))
        copied.state = self.state.copy()
        return copied


def attach_input_quantizers(model: nn.Module, chosen: Mapping[str, ActivationQuantizer]) -> dict[str, InputQuantizer]:
    """Put quantizers on the first arguments of modules, all or none.

    Modules whose weights others read without calling them, as attention of torch does with its output projection, have
    their inputs quantized only where they are called.

    Args:
        model: the model.
        chosen: quantizers by paths of modules.

    Returns:
        The quantizers by paths.

    Raises:
        QuantizationError: for a path that is no module, one that has a quantizer already, or a scripted module.
        TypeError: for something else than a quantizer of activations.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, str] = {}
    for path, quantizer in chosen.items():
        if not isinstance(quantizer, ActivationQuantizer):
            raise TypeError(
                f"Expected a quantizer of activations for {path!r}, but got {type(quantizer).__name__}. There are "
                "DynamicRange, ObservedRange and LearnedRange."
            )
        if path not in modules:
            raise QuantizationError(
                f"Expected the path of a module of {type(model).__name__}, but got {path!r}. It has "
                f"{', '.join(repr(n) for n in list(modules)[:5])} and {max(0, len(modules) - 5)} more."
            )
        module = modules[path]
        if held := vars(module).get(INPUT):
            raise QuantizationError(
                f"Expected a module whose inputs are not quantized, but those of {path!r} are: {held.quantizer}. Take "
                "it off first: detach_input_quantizers(model)."
            )
        if id(module) in found:
            raise QuantizationError(
                f"Expected each module once, but {path!r} is {found[id(module)]!r} too. Name one of them."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise QuantizationError(f"Expected ordinary modules, but {path!r} is compiled (scripted).")
        found[id(module)] = path
    made = {path: InputQuantizer(path, quantizer) for path, quantizer in chosen.items()}
    for path, quantizing in made.items():
        modules[path].__dict__[INPUT] = quantizing
        modules[path].register_forward_pre_hook(quantizing, with_kwargs=True)
    return made


def input_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    """The quantizers on what modules of a model are called with, by their paths."""
    return {path: vars(module)[INPUT] for path, module in model.named_modules() if INPUT in vars(module)}


def detach_input_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    """Take all of them off; returns those that there were.

    Raises:
        QuantizationError: if a module does it within its product, after conversion.
    """
    found = input_quantizers(model)
    for path, quantizing in found.items():
        if quantizing.in_kernel:
            raise QuantizationError(
                f"Expected inputs that are quantized before a module is called, but {path!r} was converted and does it "
                "within its product. Take quantizers off before the model is converted."
            )
    for module in model.modules():
        quantizing = vars(module).pop(INPUT, None)
        if quantizing is None:
            continue
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is quantizing:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return found


__all__ = ["InputQuantizer", "attach_input_quantizers", "detach_input_quantizers", "input_quantizers"]
