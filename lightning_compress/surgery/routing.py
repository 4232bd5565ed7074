"""The router's mask: scores of removed experts are minus infinity before anything is chosen.

The mask works on the product that makes the scores, wherever it is written: while the module that owns the router's
weight runs, every matrix product with that weight (or a view or a cast of it) gives -inf at the removed positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv"})
VIEWS = frozenset({"t", "transpose", "permute", "detach", "alias", "view", "_unsafe_view", "expand", "unsqueeze"})
COPIES = frozenset({"_to_copy", "clone", "contiguous"})


class _Masked(TorchDispatchMode):
    """Writes -inf into the scores that ``weight`` makes."""

    def __init__(self, weight: Tensor, removed: Tensor) -> None:
        super().__init__()
        self.removed = removed.to(weight.device)
        self.size = weight.shape[0]
        self.applied = False
        self._memory = weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.numel()
        self._derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def _is_router(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return value in self._derived or (
            value.numel() == self._memory[2]
            and (value.untyped_storage().data_ptr(), value.storage_offset()) == self._memory[:2]
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func._schema.name).split("::")[-1]
        if name in COPIES | VIEWS:
            if args and self._is_router(args[0]):
                self._derived[result] = True
        elif name in PRODUCTS and any(self._is_router(v) for v in tree_leaves((args, kwargs))):
            result.index_fill_(-1, self.removed, -torch.inf)
            self.applied = True
        return result


class RouterMask:
    """Hooks of the module that owns a router's weight.

    Args:
        parameter: name of the weight in the module.
        removed: experts that may not be chosen, int64.
    """

    def __init__(self, parameter: str, removed: Tensor) -> None:
        self.parameter = parameter
        self.removed = removed
        self._modes: list[_Masked] = []

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        weight = module._parameters[self.parameter]
        assert weight is not None
        mode = _Masked(weight.data, self.removed)
        self._modes.append(mode)
        mode.__enter__()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an exception too."""
        if self._modes:
            mode = self._modes.pop()
            mode.__exit__(None, None, None)
            if output is not None and not mode.applied:
                raise RuntimeError(
                    f"Expected {type(module).__name__} to make the scores of its experts with {self.parameter!r} as "
                    "when it was traced, but no such product was seen, so experts cannot be masked."
                )


__all__ = ["RouterMask"]
