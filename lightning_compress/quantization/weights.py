"""Quantizers on the weights of a model: whoever reads a weight gets its quantized values.

The class of the module is exchanged for one with a property of the weight's name. The parameter itself stays where it
is: names, checkpoints, optimizers, DistributedDataParallel and surgery see what they saw before, and the state of the
model is that of the plain model. ``torch.nn.utils.parametrize`` would move it to another name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.errors import QuantizationError
from lightning_compress.quantization_switch import quantization_is_off
from lightning_compress.quantizers import Quantized, Quantizer, Scope
from lightning_compress.quantizers.base import check_weight

QUANTIZERS = "_weight_quantizers"
RANDOM = 2**62


class WeightQuantizer:
    """The quantizer of one weight, and what it needs beside the weight.

    Attributes:
        name: of the parameter in the model that it was attached to, the first of several.
        quantizer: a pure function of the weight.
        step: what is learned, a leaf (blocks, 1) that is not registered with the module; None for nothing.
        enabled: whether it quantizes at all.
        mix: part of the weight that is quantized in training, drawn at random; in evaluation it is the whole.
        nearest: whether training rounds as evaluation does, and not at random.
        seed: of everything random; the same in all processes of a fit.
        draw: number of the draw. The same draw gives the same values, in a repeated forward, too.
        calls: how often the weight was read, quantized.
    """

    def __init__(self, name: str, quantizer: Quantizer, weight: Tensor, seed: int = 0) -> None:
        self.name, self.quantizer = name, quantizer
        step = quantizer.first_step(weight.detach())
        self.step = None if step is None else step.detach().requires_grad_()
        self.enabled = True
        self.mix = 1.0
        self.nearest = False
        self.seed, self.draw = seed, 0
        self.calls = 0

    def __call__(self, weight: Tensor, training: bool) -> Tensor:
        """The weight with quantized values, or as it is."""
        if not self.enabled or quantization_is_off():
            return weight
        self.calls += 1
        if not training:
            return self.quantizer(weight, None, self._step(weight))
        generator = self._generator()
        quantized = self.quantizer(weight, None if self.nearest else generator, self._step(weight))
        if self.mix >= 1:
            return quantized
        chosen = torch.rand(weight.shape, generator=generator) < self.mix
        return torch.where(chosen.to(weight.device), quantized, weight)

    def quantize(self, weight: Tensor) -> Quantized:
        """The integers with which evaluation computes."""
        return self.quantizer.quantize(weight.detach(), self._step(weight))

    def _step(self, weight: Tensor) -> Tensor | None:
        return None if self.step is None else self.step.to(weight.device)

    def _generator(self) -> torch.Generator:
        # a counter and no running state: a fit that is resumed draws what it would have drawn
        number = (self.seed * 1_000_003 + zlib.crc32(self.name.encode())) * 2_654_435_761 + self.draw
        return torch.Generator().manual_seed(number % RANDOM)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightQuantizer:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self))
        if self.step is not None:
            copied.step = self.step.detach().clone().requires_grad_()
        return copied


def attach_quantizers(model: nn.Module, chosen: Mapping[str, Quantizer], seed: int = 0) -> dict[str, WeightQuantizer]:
    """Put quantizers on parameters, all or none; a parameter with several names gets one.

    Args:
        model: the model.
        chosen: quantizers by names of parameters.
        seed: of what is random in training.

    Returns:
        The quantizers by the names of their parameters, shared ones under their first name.

    Raises:
        QuantizationError: for a name that is no parameter, one that is quantized already or in two ways, weights that
            are not finite or no floating point numbers, or modules whose weights are not read by name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((path, module, key))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, WeightQuantizer] = {}
    for name, quantizer in chosen.items():
        if name not in parameters:
            raise QuantizationError(
                f"Expected the name of a parameter of {type(model).__name__}, but got {name!r}. It has "
                f"{', '.join(repr(n) for n in list(parameters)[:5])} and {max(0, len(parameters) - 5)} more."
            )
        parameter = parameters[name]
        found = holders[id(parameter)]
        for path, module, key in found:
            _check_holder(path, module, key)
        try:
            check_weight(parameter.detach())
            made_before = made.get(id(parameter))
            if made_before is None:
                made[id(parameter)] = WeightQuantizer(name, quantizer, parameter, seed)
                made[id(parameter)].quantize(parameter)  # what does not divide into groups says so now
            elif made_before.quantizer != quantizer:
                raise ValueError(
                    f"Expected one quantizer for a parameter that is shared, but it is {made_before.name!r} too, which "
                    f"gets {made_before.quantizer}, and here {quantizer}. Choose one for both."
                )
        except ValueError as error:
            raise QuantizationError(f"In {name!r}: {error}") from error
    for number, quantizing in made.items():
        for _, module, key in holders[number]:
            _attach(module, key, quantizing)
    return {quantizing.name: quantizing for quantizing in made.values()}


def weight_quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """The quantizers on a model by the names of their parameters; shared ones once, under the first name."""
    found: dict[int, tuple[str, WeightQuantizer]] = {}
    for path, module in model.named_modules():
        for key, quantizing in _held(module).items():
            found.setdefault(id(quantizing), (f"{path}.{key}" if path else key, quantizing))
    return dict(found.values())


def detach_quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """Take all quantizers off: weights are read as they are. Returns those that there were."""
    found = weight_quantizers(model)
    for module in model.modules():
        if _held(module):
            del vars(module)[QUANTIZERS]
            module.__class__ = type(module).__bases__[0]
    return found


class Suspended:
    """Quantizers that are off a model for a while, in which its weights may become smaller."""

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self._model = model
        self._held = [(name, parameters[name], quantizing) for name, quantizing in detach_quantizers(model).items()]
        self._steps = [quantizing.step for _, _, quantizing in self._held]
        self._first = [
            None if quantizing.step is None else quantizing.quantizer.first_step(parameter.detach())
            for _, parameter, quantizing in self._held
        ]

    def follow(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Cut what is learned beside weights that have become smaller.

        Args:
            kept: positions that stay, by parameter and axis.

        Raises:
            QuantizationError: if the rows of a smaller weight no longer divide into groups.
        """
        for (name, parameter, quantizing), first in zip(self._held, self._first, strict=True):
            if name not in kept:
                continue
            try:
                Scope(quantizing.quantizer.scope).split(parameter.detach())
            except ValueError as error:
                raise QuantizationError(f"In {name!r}, which has become smaller: {error}") from error
            if quantizing.step is not None and first is not None:
                new = self._followed(quantizing, parameter.detach(), kept[name].get(0), first)
                quantizing.step = new.clone().requires_grad_()

    @staticmethod
    def _followed(quantizing: WeightQuantizer, weight: Tensor, rows: Tensor | None, first: Tensor) -> Tensor:
        """The steps of a weight that has become smaller."""
        assert quantizing.step is not None
        step, scope = quantizing.step.detach(), quantizing.quantizer.scope
        if scope == "row":
            return step if rows is None else step.index_select(0, rows.to(step.device))
        if scope == "tensor":
            return step
        # groups are others now: by how much the learned steps differ from the first ones is kept
        again = quantizing.quantizer.first_step(weight)
        assert again is not None
        return again * (step.sum() / first.sum().clamp(min=torch.finfo(first.dtype).tiny))

    def back(self, changed: bool) -> None:
        """Put the quantizers on again; not ``changed``, with the steps that they had.

        A quantizer whose parameter is gone, with a whole layer, is left off.
        """
        for (_, parameter, quantizing), step in zip(self._held, self._steps, strict=True):
            if not changed:
                quantizing.step = step
            for module in self._model.modules():
                for key, own in module._parameters.items():
                    if own is parameter:
                        _attach(module, key, quantizing)


@contextmanager
def suspended(model: nn.Module) -> Iterator[Suspended]:
    """Quantizers are off ``model`` under it: its modules have their own classes, and weights are read as they are.

    If it is left by an exception, everything is as it was.
    """
    off = Suspended(model)
    done = False
    try:
        yield off
        done = True
    finally:
        off.back(done)


def _held(module: nn.Module) -> dict[str, WeightQuantizer]:
    return vars(module).get(QUANTIZERS, {})


def _check_holder(path: str, module: nn.Module, key: str) -> None:
    name = f"{path}.{key}" if path else key
    if key in _held(module):
        raise QuantizationError(
            f"Expected a model without quantizers, but {name!r} has one: {_held(module)[key].quantizer}. Take it off "
            "first: detach_quantizers(model)."
        )
    if isinstance(module, nn.RNNBase):
        raise QuantizationError(
            f"Expected a weight that is read by its name, but {name!r} belongs to {type(module).__name__}, which keeps "
            "a list of its weights. Leave it out."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise QuantizationError(f"Expected ordinary modules, but {name!r} belongs to one that is compiled (scripted).")


def _attach(module: nn.Module, key: str, quantizing: WeightQuantizer) -> None:
    held = {**_held(module), key: quantizing}
    plain = type(module).__bases__[0] if _held(module) else type(module)
    vars(module)[QUANTIZERS] = held
    module.__class__ = _class_with(plain, tuple(sorted(held)))


@cache
def _class_with(plain: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose weights are read through their quantizers."""
    members: dict[str, Any] = {key: property(_reader(key)) for key in keys}
    members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), members)


def _reader(key: str) -> Any:
    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[key]
        return None if parameter is None else vars(module)[QUANTIZERS][key](parameter, module.training)

    return read


def holders_of(model: nn.Module, quantizing: WeightQuantizer) -> Iterator[tuple[str, nn.Module, str]]:
    """Paths and modules that read a weight through this quantizer, and under which name they do."""
    for path, module in model.named_modules():
        yield from ((path, module, key) for key, other in _held(module).items() if other is quantizing)


__all__ = [
    "Suspended",
    "WeightQuantizer",
    "attach_quantizers",
    "detach_quantizers",
    "holders_of",
    "suspended",
    "weight_quantizers",
]
