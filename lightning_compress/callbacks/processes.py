"""The processes of one fit: how they decide alike, fail together, and never wait for one that does not come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """All processes of a fit, seen from one of them; one process alone talks to nobody.

    Every method is called by all processes, in the same order. What happens there has a name, so that processes that
    have lost step with each other notice. If it fails in one process it fails in all of them; a process that has ended
    or hangs makes the others fail within the timeout of the process group.

    Args:
        rank: number of this process.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Processes:
        """Those of ``trainer``, whose process group has been set up."""
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            return cls(trainer.global_rank, trainer.world_size)
        return cls()

    def together(self, what: str, compute: Callable[[], Value]) -> Value:
        """What ``compute`` returns in this process, once it has returned in all of them.

        Raises:
            Exception: what ``compute`` has raised in this process.
            RuntimeError: if it has raised in another process, or another process did not arrive.
        """
        if self.count == 1:
            return compute()
        try:
            value = compute()
        except Exception as error:
            self._gather(what, f"{type(error).__name__}: {error}")
            raise
        failures = [(rank, text) for rank, text in enumerate(self._gather(what, None)) if text is not None]
        if failures:
            rank, text = failures[0]
            raise RuntimeError(
                f"Expected all {self.count} processes to {what}, but process {rank} failed, and the fit ends in all "
                f"of them. There it was {text}"
            )
        return value

    def first(
        self,
        what: str,
        compute: Callable[[], Value],
        pack: Callable[[Value], Any] | None = None,
        unpack: Callable[[Any], Value] | None = None,
    ) -> Value:
        """What ``compute`` returns in process 0, the only one that calls it.

        Args:
            what: what happens, after "to".
            compute: the function.
            pack: makes of its result what is sent to the others; ``unpack`` is its inverse. Default: the result itself.
            unpack: see ``pack``.

        Raises:
            RuntimeError: as `together`.
        """
        if self.count == 1:
            return compute()
        own: list[Value] = []
        packed: Any = None
        if self.rank == 0:

            def lead() -> Any:
                own.append(compute())
                return own[0] if pack is None else pack(own[0])

            packed = self.together(what, lead)
        else:
            self.together(what, lambda: None)
        packed = self._broadcast(what, packed)
        if own:
            return own[0]
        return packed if unpack is None else unpack(packed)

    def agreed(self, what: str, compute: Callable[[], Value]) -> Value:
        """What ``compute`` returns in process 0, once it has returned in all of them: it may communicate itself.

        Raises:
            Exception: as `together`.
        """
        value = self.together(what, compute)
        return value if self.count == 1 else self._broadcast(what, value)

    def gather(self, what: str, value: Value) -> list[Value]:
        """The value of every process, in the order of their ranks.

        Raises:
            RuntimeError: as `together`.
        """
        return [value] if self.count == 1 else self._gather(what, value)

    def mean(self, what: str, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes: one message without a name, cheap enough for every step.

        Raises:
            RuntimeError: as `together`.
        """
        if self.count == 1:
            return values
        total = values.clone()
        self._communicate(what, lambda: dist.all_reduce(total))
        return total / self.count

    def _gather(self, what: str, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        self._communicate(what, lambda: dist.all_gather_object(found, (what, value)))
        places = [place for place, _ in found]
        if len(set(places)) > 1:
            others = ", ".join(f"process {rank} was about to {place}" for rank, place in enumerate(places))
            raise RuntimeError(
                f"Expected all processes to be at the same point of the fit, but {others}. Look for what differs "
                "between them: a hook, a callback or a batch that only some of them have."
            )
        return [value for _, value in found]

    def _broadcast(self, what: str, value: Any) -> Any:
        box = [value]
        self._communicate(what, lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def _communicate(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise RuntimeError(
                f"Expected all {self.count} processes to {what}, but process {self.rank} did not hear from another "
                f"one: it has ended, or did not arrive within the timeout of the process group. Look at what the "
                f"other processes have printed last. Here it was {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error


class _Communication(Exception):
    """A module is about to communicate."""


class _Silence(TorchDispatchMode):
    """Raises before anything is sent to another process."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise _Communication(str(func))
        return func(*args, **(kwargs or {}))


def check_silent(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if a call of ``module`` communicates: process 0, which calls it alone, would wait for ever."""
    try:
        with torch.no_grad(), _Silence():
            module(*args, **kwargs)
    except _Communication as communication:
        raise ValueError(
            f"Expected a module that computes without the other processes, because process 0 calls it alone to "
            f"discover its structures, but {type(module).__name__} calls {communication}. Communicate in the step "
            "instead, or name a sub-module that does not: module=..."
        ) from None
    except Exception:  # whatever else the user's forward raises is for those who need its outputs
        return
