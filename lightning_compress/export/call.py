"""One call of a model as a flat list of named tensors: the interface that every exported format has."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.discovery.outputs import flatten
from lightning_compress.discovery.tracer import output_tensors

Places = tuple[tuple[int, int], ...]  # (number of the input, dimension) pairs that have one size


@dataclass(frozen=True)
class Call:
    """The tensors of a call.

    Args:
        names: their names, after the parameters of ``forward``.
        tensors: the tensors.
        rebuild: from tensors in this order to (args, kwargs); everything that is no tensor is as in the example.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]


def flatten_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The tensors of ``model(*args, **kwargs)``, inside tuples, lists and dicts too.

    Raises:
        ValueError: if there is no tensor, or one inside an object that is no plain container.
    """
    leaves, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    parameters = _parameter_names(model, len(args))
    names: list[str] = []
    numbers: list[int] = []
    for number, (path, leaf) in enumerate(leaves):
        key = path[1].idx if isinstance(path[1], pytree.SequenceKey) else getattr(path[1], "key", path[1])
        top = parameters[key] if isinstance(key, int) else str(key)
        if isinstance(leaf, Tensor):
            inner = "".join(f"_{getattr(step, 'key', getattr(step, 'idx', step))}" for step in path[2:])
            names.append(_free(identifier(top + inner, "input"), names))
            numbers.append(number)
        elif next(output_tensors(leaf), None) is not None:
            raise ValueError(
                f"Expected tensors, or tuples, lists and dicts of them, in the example, but {top!r} is an object of "
                f"{type(leaf).__name__} with tensors inside, which would be frozen into the file. Pass dict(...) of "
                "what is a mapping, and leave out caches."
            )
    if not names:
        raise ValueError("Expected an example with at least one tensor, but got none. Pass example=(args, kwargs).")
    values = [leaf for _, leaf in leaves]

    def rebuild(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = list(values)
        for number, tensor in zip(numbers, tensors, strict=True):
            filled[number] = tensor
        positional, named = pytree.tree_unflatten(filled, spec)
        return tuple(positional), dict(named)

    return Call(tuple(names), tuple(values[number] for number in numbers), rebuild)


class Seen:
    """What a forward pass notes; an object of its own, because attributes of modules are put back after a trace."""

    outputs: tuple[str, ...] = ()


class FlatModel(nn.Module):
    """A model behind the interface of a file: named tensors in, the tensors that a caller sees out.

    Args:
        model: the model.
        call: its example call.
        ties: places of the inputs that have one size.
        dtype: type to compute in; inputs and outputs keep theirs. None: the model's own.
    """

    def __init__(self, model: nn.Module, call: Call, ties: Sequence[Places] = (), dtype: torch.dtype | None = None):
        super().__init__()
        self.model = model if dtype is None else copy.deepcopy(model).to(dtype)
        self._call, self._ties, self._dtype = call, tuple(ties), dtype
        self._seen = Seen()

    def forward(self, *tensors: Tensor) -> Any:
        """The output itself if it is a tensor, else name -> tensor; what is kept for later calls is no output."""
        for places in self._ties:
            (first, axis), *others = places
            for number, dim in others:
                torch._check(tensors[number].shape[dim] == tensors[first].shape[axis])
        args, kwargs = self._call.rebuild([self._cast(t, self._dtype) for t in tensors])
        found = flatten(self.model(*args, **kwargs))
        outputs: dict[str, Tensor] = {}
        for path, output in found.items():
            if not output.internal:
                name = identifier(path.removeprefix("output").replace("'", ""), "output")
                outputs[_free(name, [*self._call.names, *outputs])] = self._cast(
                    output.tensor, None if self._dtype is None else torch.float32
                )
        self._seen.outputs = tuple(outputs)
        return outputs["output"] if list(found) == ["output"] and "output" in outputs else outputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs of the latest call."""
        return self._seen.outputs

    @staticmethod
    def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def named(flat: FlatModel) -> FlatModel:
    """The same module with the names of its inputs in the signature of ``forward``, where exporters look for them."""
    names = ["self", *flat._call.names]

    def forward(self: FlatModel, *tensors: Tensor, **more: Tensor) -> Any:
        return FlatModel.forward(self, *tensors, *(more[name] for name in names[1 + len(tensors) :]))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    flat.__class__ = type("FlatModel", (FlatModel,), {"forward": forward})
    return flat


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output of ``FlatModel``, in order."""
    return [output] if isinstance(output, Tensor) else list(output.values())


def identifier(text: str, fallback: str) -> str:
    """``text`` as a name: letters, digits and underscores, no digit in front."""
    name = re.sub(r"\W+", "_", text).strip("_")
    return f"{fallback}_{name}".rstrip("_") if not name or name[0].isdigit() else name


def _free(name: str, taken: Sequence[str]) -> str:
    if name not in taken and name != "self":
        return name
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    """A name for each positional argument."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        signature = inspect.Signature()
    found = [p.name for p in signature.parameters.values() if p.kind in kinds][:count]
    return found + [f"input_{number}" for number in range(len(found), count)]
