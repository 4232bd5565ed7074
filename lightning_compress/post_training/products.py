"""Products of an activation with a weight, seen where they are computed: what reads the units, in any module.

    y = x W^T      torch.nn.functional.linear, in nn.MultiheadAttention too
    y = x W        torch.addmm, torch.matmul, @
    y = conv(x, W) torch.nn.functional.conv1d and conv2d of one group: a product with unfolded patches

A `TorchFunctionMode` recognizes weights by identity, so that it does not matter which module, or no module, holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_compress.structures import Slice, Structure, named_tensors
from lightning_compress.tokens.tap import MULTI_HEAD

LINEAR = F.linear
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, F.conv1d: 1, F.conv2d: 2}
MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
ADDITION = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


@dataclass(frozen=True)
class Product:
    """One use of a weight.

    Args:
        parameter: its name.
        axis: axis of the weight that is summed over.
        channel: dim of the input that runs along that axis.
        patches: for a convolution: input -> (examples, channels * taps, places); None for the other forms.
    """

    parameter: str
    axis: int
    channel: int
    patches: Callable[[Tensor], Tensor] | None = None

    def rows(self, inputs: Tensor, real: Tensor | None = None) -> Tensor:
        """What the weight is multiplied with, (rows, columns of ``matrix``), without padding where that is known.

        Args:
            inputs: the activation.
            real: bool (examples, tokens).
        """
        if self.patches is not None:
            return self.patches(inputs).transpose(1, 2).flatten(0, 1)
        return _without_padding(inputs, real)

    def outputs(self, outputs: Tensor, real: Tensor | None = None) -> Tensor:
        """The products in the order of ``rows``, (rows, outputs)."""
        if self.patches is not None:
            return outputs.flatten(2).transpose(1, 2).flatten(0, 1)
        return _without_padding(outputs, real)


def _without_padding(values: Tensor, real: Tensor | None) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    if real is not None and values.dim() > 1 and flat.shape[0] == real.numel():
        return flat[real.reshape(-1)]
    return flat


class ProductTap(TorchFunctionMode):
    """Hears products with some weights in the calls under it.

    Args:
        names: id of a weight -> its name.
        before: (product, input) -> the input to use instead.
        after: (product, input, output), after the product.
        joined: (product, output, other), before the output of the latest product, or a view of it, is added to another
            activation, which comes in the layout of the output: the residual stream, mostly. Not if anything else
            was computed from the output before.

    Attributes:
        again: computes the latest product once more.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        before: Callable[[Product, Tensor], Tensor] | None = None,
        after: Callable[[Product, Tensor, Tensor], None] | None = None,
        joined: Callable[[Product, Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.before, self.after, self.joined = names, before, after, joined
        self.again: Callable[[], Tensor] = _nothing
        self._latest: tuple[Product, Tensor, Tensor, int] | None = None  # product, output, input and its version

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = None if func is MULTI_HEAD else self._product(func, args, kwargs)
        if found is None:
            before = self._latest
            if before is not None and func in ADDITION and kwargs.get("alpha", 1) == 1:
                self._added(args)
            result = self._inside(args, kwargs) if func is MULTI_HEAD else func(*args, **kwargs)
            if before is not None and self._latest is before and _reads(before[1], (*args, *kwargs.values()), result):
                self._latest = None
            return result
        product, place = found
        if self.before is not None:
            changed = self.before(product, args[place] if isinstance(place, int) else kwargs[place])
            if isinstance(place, int):
                args = (*args[:place], changed, *args[place + 1 :])
            else:
                kwargs = {**kwargs, place: changed}
        output: Tensor = func(*args, **kwargs)
        self.again = partial(func, *args, **kwargs)
        inputs = args[place] if isinstance(place, int) else kwargs[place]
        if self.after is not None:
            self.after(product, inputs, output)
        if self.joined is not None:
            self._latest = product, output, inputs, inputs._version
        return output

    def _added(self, terms: tuple[Any, ...]) -> None:
        """Tell of a sum of the latest output and something of its size."""
        assert self._latest is not None and self.joined is not None
        product, output, inputs, version = self._latest
        if len(terms) != 2 or not all(isinstance(t, Tensor) and t.shape == terms[0].shape for t in terms):
            return
        for mine, other in (terms, terms[::-1]):
            if mine.numel() == output.numel() and _storage(mine) == _storage(output) != _storage(other):
                self._latest = None
                if inputs._version == version:  # else what was multiplied is no longer there
                    self.joined(product, output, _laid_out(other, mine, output))
                return

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Product, int | str] | None:
        def known(place: int, name: str) -> str | None:
            value = args[place] if len(args) > place else kwargs.get(name)
            return self.names.get(id(value))

        if func is LINEAR:
            name = known(1, "weight")
            return None if name is None else (Product(name, 1, -1), 0 if args else "input")
        if func is torch.addmm:
            name = known(2, "mat2")
            scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
            return None if name is None or scaled or len(args) < 2 else (Product(name, 0, -1), 1)
        if func in MATMUL:
            name = known(1, "other")
            return None if name is None or args[1].dim() != 2 else (Product(name, 0, -1), 0)
        if func in CONVOLUTIONS:
            name = known(1, "weight")
            return None if name is None or not args else self._convolution(CONVOLUTIONS[func], name, args, kwargs)
        return None

    def _convolution(
        self, dims: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Product, int] | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        padding = given.get("padding", 0)
        if given.get("groups", 1) != 1 or isinstance(padding, str) or given["input"].dim() != dims + 2:
            return None
        sizes = {"kernel_size": tuple(given["weight"].shape[2:]), "padding": padding}
        sizes |= {key: given.get(key, 1) for key in ("stride", "dilation")}
        if dims == 1:  # unfold knows images: a signal is one row of one
            first = {"kernel_size": 1, "padding": 0, "stride": 1, "dilation": 1}
            sizes = {key: (first[key], _one(value)) for key, value in sizes.items()}

        def patches(inputs: Tensor) -> Tensor:
            return F.unfold(inputs.unsqueeze(2) if dims == 1 else inputs, **sizes)

        return Product(name, 1, 1, patches), 0

    def _inside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`multi_head_attention_forward` with its own projections through this mode; it is one call to a mode."""
        names = {
            **vars(F),
            "linear": lambda *inner, **named: self.__torch_function__(LINEAR, (), inner, named),
            "has_torch_function": lambda tensors: False,
        }
        function = FunctionType(MULTI_HEAD.__code__, names, MULTI_HEAD.__name__, MULTI_HEAD.__defaults__)
        function.__kwdefaults__ = MULTI_HEAD.__kwdefaults__
        return function(*args, **kwargs)


def _nothing() -> Tensor:
    raise RuntimeError("Expected a product before it is computed again, but there was none.")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reads(output: Tensor, given: Iterable[Any], result: Any) -> bool:
    """Whether something new was computed from ``output``; views, and what is no tensor, are not."""
    made = [r for r in (result if isinstance(result, tuple | list) else (result,)) if isinstance(r, Tensor)]
    memory = _storage(output)
    return any(_storage(r) != memory for r in made) and any(
        isinstance(g, Tensor) and _storage(g) == memory for g in given
    )


def _laid_out(other: Tensor, mine: Tensor, output: Tensor) -> Tensor:
    """``other``, whose elements belong to those of ``mine``, a view of all of ``output``, as they belong to it."""
    memory = output.new_empty(output.untyped_storage().nbytes() // output.element_size())
    memory.as_strided(mine.shape, mine.stride(), mine.storage_offset()).copy_(other)
    return memory.as_strided(output.shape, output.stride(), output.storage_offset())


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


def names_of(model: nn.Module, parameters: Iterable[str]) -> dict[int, str]:
    """id of each tensor of ``model`` -> its name, for these names."""
    tensors = named_tensors(model)
    return {id(tensors[name]): name for name in parameters}


def readers(structure: Structure) -> tuple[Slice, ...]:
    """Slices in which weights read the units, so that zeros there silence them."""
    return tuple(p for p in structure.slices if p.zero and p.role == "consumer") if structure.kind != "expert" else ()


def matrix(weight: Tensor, axis: int) -> Tensor:
    """A weight as (outputs, columns): columns run along ``axis`` and, for a convolution, along the taps inside it."""
    if weight.dim() == 2:
        return weight if axis == 1 else weight.T
    return weight.flatten(1) if axis == 1 else weight.transpose(0, axis).flatten(1)


def columns(weight: Tensor, piece: Slice) -> Tensor:
    """Columns of ``matrix`` that each unit owns, int64 (units, columns)."""
    taps = weight[0, 0].numel() if weight.dim() > 2 else 1
    table = piece.indices.unsqueeze(-1) * taps + torch.arange(taps)
    return table.flatten(1)


__all__ = ["Product", "ProductTap", "columns", "matrix", "names_of", "readers"]
