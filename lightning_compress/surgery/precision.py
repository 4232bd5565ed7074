"""The model in float64, for the length of a check: weights, buffers, inputs, and the casts inside its forward.

Rounding is what a tolerance of 1e-6 must not be spent on. The weights can be perturbed at the same time, so that a
model whose weights are already zero where units will go, or that starts from zeros, cannot make the comparison vacuous.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from math import copysign, inf, sqrt
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress.discovery.outputs import flatten
from lightning_compress.progress import Progress, quiet

DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def to_double(value: Any) -> Any:
    """A copy of a nested argument: tensors are copied, floating-point ones to float64; the rest is passed on."""
    if isinstance(value, Tensor):
        return value.detach().to(DOUBLE.get(value.dtype, value.dtype), copy=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_double(item) for item in value))
    if type(value) in (list, tuple):
        return type(value)(to_double(item) for item in value)
    if isinstance(value, dict):
        try:
            return type(value)((key, to_double(item)) for key, item in value.items())
        except TypeError:  # a dict with a constructor of its own
            return {key: to_double(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: to_double(getattr(value, f.name)) for f in fields(value) if f.init}
        return replace(value, **changed)
    return _copied(value)


def _copied(value: Any) -> Any:
    """A copy of an object that holds tensors (a key/value cache, which a call writes into), else the object itself."""
    if not hasattr(value, "__dict__") or isinstance(value, type | nn.Module):
        return value
    held = {id(output.tensor): to_double(output.tensor) for output in flatten(value).values()}
    if not held:
        return value
    try:
        return copy.deepcopy(value, held)
    except Exception:  # not everything can be copied
        return value


# The lowest number of float64 masks scores here and there; two of them added would be infinite, and the scores NaN.
LARGEST = torch.finfo(torch.float32).max


class DoublePrecision(TorchDispatchMode):
    """Keeps a forward in float64: casts and factories of lower precision give float64, mixed arguments are raised.

    Numbers beyond the range of float32 are brought back into it: they stand for infinity, and what the forward does
    with them was written for float32.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        low: list[Tensor] = []
        count = high = 0

        def look(value: Any) -> None:
            nonlocal count, high
            if isinstance(value, Tensor):
                count += 1
                if value.dtype in DOUBLE:
                    low.append(value)
                elif value.dtype in (torch.float64, torch.complex128):
                    high += 1
            elif type(value) in (list, tuple):
                for item in value:
                    look(item)

        kwargs = dict(kwargs) if kwargs else {}
        for value in (*args, *kwargs.values()):
            look(value)
        written = args[0] if func._schema.is_mutable and args else None
        mixed = bool(low) and high > 0

        def raised(value: Any) -> Any:
            if isinstance(value, Tensor):
                return (
                    value.to(DOUBLE[value.dtype]) if mixed and value.dtype in DOUBLE and value is not written else value
                )
            if isinstance(value, torch.dtype):
                return DOUBLE.get(value, value)
            if type(value) is float and LARGEST < abs(value) < inf:
                return copysign(LARGEST, value)
            if type(value) in (list, tuple):
                return type(value)(raised(item) for item in value)
            return value

        arguments = [raised(value) for value in args]
        if func is torch.ops.aten._grouped_mm.default and arguments[0].dtype == torch.float64:
            return grouped_matmul(*arguments, **{key: raised(value) for key, value in kwargs.items()})
        if func is torch.ops.aten._to_copy.default and kwargs.keys() == {"dtype"}:
            dtype = raised(kwargs["dtype"])
            if arguments[0].dtype == dtype and 0 not in arguments[0].stride():
                # a cast that does nothing in the model's own precision; strides must stay, as some operations mind them
                return torch.empty_strided(
                    arguments[0].shape, arguments[0].stride(), dtype=dtype, device=arguments[0].device
                ).copy_(arguments[0])
        result = func(*arguments, **{key: raised(value) for key, value in kwargs.items()})
        if not count and isinstance(result, Tensor) and result.dtype in DOUBLE:
            return result.to(DOUBLE[result.dtype])
        return result


def grouped_matmul(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: object, **__: object) -> Tensor:
    """A product of matrices in groups, in any precision; torch's kernel knows half and single precision only.

        (rows, k) x (groups, k, n) -> (rows, n)         rows offs[g - 1] : offs[g] by matrix g
        (groups, m, k) x (k, columns) -> (m, columns)   columns offs[g - 1] : offs[g] by matrix g
        (m, k) x (k, n) -> (groups, m, n)               k offs[g - 1] : offs[g] makes matrix g
        (groups, m, k) x (groups, k, n) -> (groups, m, n)

    Args:
        left: left factor.
        right: right factor.
        offs: int32 tensor of shape (groups,), where each group ends.
    """
    if offs is None:
        return left @ right
    stops = offs.tolist()
    spans = list(zip([0, *stops[:-1]], stops, strict=True))
    if left.dim() == 2 and right.dim() == 2:
        return torch.stack([left[:, a:b] @ right[a:b] for a, b in spans])
    if left.dim() == 2:
        result = left.new_zeros(left.shape[0], right.shape[2])
        for group, (a, b) in enumerate(spans):
            result[a:b] = left[a:b] @ right[group]
        return result
    result = left.new_zeros(left.shape[1], right.shape[1])
    for group, (a, b) in enumerate(spans):
        result[:, a:b] = left[group] @ right[:, a:b]
    return result


class DoubleWeights:
    """Context: every parameter and buffer of ``model`` holds a float64 copy of itself; the original data comes back.

    Args:
        model: its parameters and buffers keep their identity.
        perturbed: whether to add noise to all parameters and to ``buffers``: a tenth of their root mean square plus
            half of a usual initialisation. Deterministic, and free of random number state.
        buffers: names of the buffers to perturb too (by a positive amount, as variances must stay positive).
        progress: shows the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        perturbed: bool = False,
        buffers: Collection[str] = (),
        progress: Progress = quiet,
    ) -> None:
        self._model = model
        self._perturbed = perturbed
        self._progress = progress
        self._noisy_buffers = frozenset(buffers)
        self._saved: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __enter__(self) -> DoubleWeights:
        noise = torch.randn(8191, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            parameters = list(self._model.parameters())
            for number, parameter in enumerate(self._progress(parameters, "weights in float64")):
                self._exchange(parameter, noise.roll(number * 97) if self._perturbed else None)
            for number, (name, buffer) in enumerate(self._model.named_buffers()):
                noisy = self._perturbed and name in self._noisy_buffers
                self._exchange(buffer, noise.roll(number * 89).abs() if noisy else None)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _exchange(self, tensor: Tensor, noise: Tensor | None) -> None:
        data = tensor.data
        double = data.to(DOUBLE.get(data.dtype, data.dtype), copy=True)
        if noise is not None and double.dtype == torch.float64 and double.numel():
            add_tiled(noise.to(double.device), double)
        # a gradient must have the dtype and the shape of its tensor at every moment: the gradient steps aside
        gradient = tensor.grad if tensor.is_leaf else None
        self._saved.append((tensor, data, gradient))
        if gradient is not None:
            tensor.grad = None
        tensor.data = double

    def _restore(self) -> None:
        for tensor, data, gradient in self._saved:
            tensor.data = data
            if gradient is not None:
                tensor.grad = gradient
        self._saved.clear()


def add_noise(value: Any) -> Any:
    """A copy of a nested argument (see ``to_double``) with noise of unit size on floating-point tensors."""
    noise = torch.randn(1009, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    copied = to_double(value)
    for tensor in tree_leaves(copied):
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.numel():
            wanted = -(-tensor.numel() // noise.numel())
            tensor.add_(noise.to(tensor.device).repeat(wanted)[: tensor.numel()].view(tensor.shape))
    return copied


def add_tiled(noise: Tensor, tensor: Tensor) -> None:
    """Add ``noise``, scaled and repeated, to ``tensor`` in place.

    Give it a prime length, so that rows get different pieces of it.

    The scale is a tenth of the root mean square of ``tensor`` plus half of 1 / sqrt(fan in), a usual initialisation.
    """
    n, period = tensor.numel(), noise.numel()
    fan_in = n / tensor.shape[0] if tensor.dim() > 1 else 100.0
    noise = noise * (0.1 * float(tensor.norm()) / sqrt(n) + 0.5 / sqrt(fan_in))
    flat = tensor.contiguous().view(-1)
    whole = n - n % period
    flat[:whole].view(-1, period).add_(noise)
    flat[whole:].add_(noise[: n - whole])
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view_as(tensor))


def zero_positions(tensors: Mapping[str, Tensor], removed: Mapping[tuple[str, int], Tensor]) -> None:
    """Write zeros at the positions ``removed[parameter, axis]``, in place."""
    for (name, axis), positions in removed.items():
        data = tensors[name].data
        data.index_fill_(axis, positions.to(data.device), 0)


def read_positions(
    tensors: Mapping[str, Tensor], places: Mapping[tuple[str, int], Tensor]
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Copies of what lies at the positions ``places[parameter, axis]``, with the positions."""
    found = {}
    for (name, axis), positions in places.items():
        data = tensors[name].data
        found[name, axis] = (positions, data.index_select(axis, positions.to(data.device)))
    return found


def write_positions(tensors: Mapping[str, Tensor], values: Mapping[tuple[str, int], tuple[Tensor, Tensor]]) -> None:
    """Write back what ``read_positions`` has read, in place."""
    for (name, axis), (positions, value) in values.items():
        data = tensors[name].data
        data.index_copy_(axis, positions.to(data.device), value)
