"""Models without values: weights on the meta device, or made under FakeTensorMode.

Such a model costs no memory, whatever its size. For the traced pass every tensor without values is exchanged for a
stand-in: a fake tensor that says it lies on an ordinary device, so that the same operations run as with values. What is
computed from real inputs alone (positions, masks, look-up indices) stays real, so the code that reads them takes
the branch that it really takes:

    real ids, masks --real operations--> real positions, masks --+
                                                                 +--> stand-ins all the way to the output
    weights (meta, fake) --> stand-ins --------------------------+

Where the forward reads a value that nobody knows (the experts that a router chose), the pass goes on as if the values
were all ones (all true), and a warning names the operation: what was found holds for the branch that this takes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# Values are made up for small tensors only: masks, router choices, lengths.
LARGEST_GUESS = 2**24

# What stand-ins raise where values are needed; an operation of somebody's own raises any RuntimeError.
_UNKNOWN = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,
)


def has_values(tensor: Tensor) -> bool:
    """Whether there is memory behind a tensor."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def lacking_values(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers of ``model`` that have no values."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if not has_values(tensor)]


def storage_key(tensor: Tensor) -> int:
    """The same number for tensors that lie in one storage; without values there is no address, but still a storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() if has_values(tensor) else -int(storage._cdata)


class StandIns:
    """Exchanges tensors without values for fake ones of ``device``, and runs operations on them.

    Attributes:
        guessed: operations that read values which nobody knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.guessed: list[str] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, value: Any) -> Any:
        """The stand-in of a tensor without values, the same one each time; anything else as it is."""
        if not isinstance(value, Tensor) or has_values(value) or self.owns(value):
            return value
        if value not in self._known:
            twin = self._empty(value)
            if isinstance(value, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=value.requires_grad)
            self._known[value] = twin
        return self._known[value]

    def owns(self, value: Any) -> bool:
        """Whether this is one of our stand-ins, or was computed from them."""
        return isinstance(value, FakeTensor) and value.fake_mode is self._mode

    def _empty(self, like: Tensor) -> Tensor:
        with self._mode:
            return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=self.device)

    @contextlib.contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Stand-ins in place of the parameters, buffers and plain attributes of all modules of ``model``."""
        saved = [(m, dict(m.__dict__)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        try:
            for module, attributes in saved:
                for name, value in attributes.items():
                    exchanged = self._exchanged(value)
                    if exchanged is not value:
                        module.__dict__[name] = exchanged
            yield
        finally:
            for module, attributes in saved:
                module.__dict__.clear()
                module.__dict__.update(attributes)

    def _exchanged(self, value: Any) -> Any:
        """An attribute with stand-ins, one container deep; the same object if nothing in it needs one."""
        if isinstance(value, Tensor):
            return self.of(value)
        kind = type(value)
        if kind in (list, tuple):  # the flat weights of recurrent layers are such a list
            items = [self.of(item) for item in value]
            return kind(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
        if isinstance(value, dict):
            changed = {k: self.of(v) for k, v in value.items() if isinstance(v, Tensor)}
            if any(changed[k] is not value[k] for k in changed):
                result = value.copy()
                result.update(changed)
                return result
        return value

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Arguments with stand-ins, and the result of the operation on them: (args, kwargs, result).

        Raises:
            ValueError: if the operation cannot do without values.
        """
        args, kwargs = tree_map(self.of, (args, kwargs))
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "meta":
            kwargs["device"] = self.device
        if not tree_any(self.owns, (args, kwargs)):
            return args, kwargs, func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            result = self._guess(func, args, kwargs, error)
        written = [t for t in _written(func, args, kwargs) if not self.owns(t)]
        if written and isinstance(result, Tensor):
            result = written[0]  # a real tensor that unknown values were written into: the object stays what it is
        return args, kwargs, result

    def _guess(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Any:
        """The result as if all unknown values were ones."""
        name = str(func._schema.name).split("::")[-1]
        unknown = [t for t in tree_leaves((args, kwargs)) if self.owns(t)]
        size = sum(t.numel() for t in unknown)
        try:
            if size > LARGEST_GUESS:
                raise error
            ones, options = tree_map(
                lambda t: torch.ones(t.shape, dtype=t.dtype, device=self.device) if self.owns(t) else t, (args, kwargs)
            )
            result = func(*ones, **options)
        except Exception as failure:
            if not isinstance(error, _UNKNOWN):
                raise error from None  # as with values: the call itself is wrong
            raise ValueError(
                f"Expected every operation of the model to run without values, since weights or inputs have none (they "
                f"are on the meta device or fake), but {name} does not: {failure}. Discover the structures on "
                f"real weights, or of a smaller model of this kind."
            ) from error
        self.guessed.append(name)
        written = _written(func, args, kwargs)
        if written:
            return written[0]
        # what was computed from made-up numbers is unknown again; made-up indices are needed as they are
        return tree_map(lambda t: self._empty(t) if isinstance(t, Tensor) and t.is_floating_point() else t, result)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that the operation writes into."""
    if not func._schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """New tensors have values, also where the caller builds models under ``torch.device("meta")`` or FakeTensorMode."""
    with _disable_current_modes(), torch.device("cpu"):
        yield


@contextlib.contextmanager
def without_values(model: nn.Module, inputs: list[Tensor]) -> Iterator[StandIns | None]:
    """Stand-ins inside ``model`` where it or ``inputs`` lack values, else None; everything is put back at the end.

    Warns:
        UserWarning: if the pass read values that nobody knows.
    """
    tensors = [*inputs, *model.parameters(), *model.buffers()]
    if all(has_values(tensor) for tensor in tensors):
        yield None
        return
    device = next((t.device for t in tensors if has_values(t)), torch.device("cpu"))
    stand_ins = StandIns(device)
    # a FakeTensorMode of the caller's would take the values of what is real
    with _disable_current_modes(), stand_ins.inside(model):
        yield stand_ins
    if stand_ins.guessed:
        names = ", ".join(dict.fromkeys(stand_ins.guessed))
        warnings.warn(
            f"The model has no weights, but its forward reads values that they decide ({names}). Discovery went on as "
            "if these were all ones (all true). Verify the structures once the weights are there: "
            "discover(..., prove=True), or apply_plan(..., verify=(args, kwargs)).",
            UserWarning,
            stacklevel=5,
        )
