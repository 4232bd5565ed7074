"""All or nothing: a snapshot of everything that surgery may change, restored exactly when anything goes wrong."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

# containers whose contents are part of a module's state: hooks, parameters, sub-modules, size lists
_CONTAINERS = (dict, OrderedDict, list, set)


class Transaction:
    """Restores modules, tensors and optimizer state as they were at its creation, unless it ends without an exception.

    Tensors are restored by reference to their old storage, so a snapshot costs no memory for weights: whoever works
    inside a transaction must exchange data and never write into it.

    Args:
        modules: every module whose attributes, hooks, class, parameters or buffers may change.
        optimizers: optimizers whose state and lists of parameters may change.

    >>> from torch import nn
    >>> layer = nn.Linear(3, 2)
    >>> with Transaction([layer]) as transaction:
    ...     layer.weight.data = layer.weight.data[:1]
    ...     layer.out_features = 1
    ...     transaction.rollback()
    >>> layer
    Linear(in_features=3, out_features=2, bias=True)
    """

    def __init__(self, modules: Iterable[nn.Module], optimizers: Iterable[Any] = ()) -> None:
        self._modules = [_ModuleState(module) for module in {id(m): m for m in modules}.values()]
        tensors: dict[int, Tensor] = {}
        for state in self._modules:
            module = state.module
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensors.setdefault(id(tensor), tensor)
        self._tensors = [(tensor, tensor.data, tensor.grad if tensor.is_leaf else None) for tensor in tensors.values()]
        self._states: list[tuple[Any, dict[Any, tuple[Any, dict[Any, Any]]]]] = []
        self._groups: list[tuple[list[Any], list[Any]]] = []
        for optimizer in optimizers:
            self._states.append((optimizer.state, {p: (s, dict(s)) for p, s in optimizer.state.items()}))
            self._groups += [(group["params"], list(group["params"])) for group in optimizer.param_groups]

    def rollback(self) -> None:
        """Restore everything now; may be called more than once."""
        for state in self._modules:
            state.restore()
        for tensor, data, gradient in self._tensors:
            if tensor.is_leaf and tensor.grad is not gradient:
                tensor.grad = None
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.dtype != data.dtype:
                if tensor.is_leaf:
                    tensor.grad = None  # its shape must agree with the data at every moment
                tensor.data = data
            if tensor.is_leaf and tensor.grad is not gradient:
                tensor.grad = gradient
        for group, parameters in self._groups:
            group[:] = parameters
        for live, saved in self._states:
            for parameter in [p for p in live if p not in saved]:
                del live[parameter]
            for parameter, (state, content) in saved.items():
                state.clear()
                state.update(content)
                live[parameter] = state

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.rollback()


class _ModuleState:
    """Class and attributes of one module, containers one level deep."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.attributes = dict(module.__dict__)
        self.contents = {name: value.copy() for name, value in self.attributes.items() if type(value) in _CONTAINERS}

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        live = self.module.__dict__
        live.clear()
        live.update(self.attributes)
        for name, content in self.contents.items():
            container = live[name]
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
