"""One forward pass for a whole repair: batches halt at a weight, it is changed, and they go on with what it gives now.

Without it every weight asks for passes of its own up to it, half of a pass on average. Calls run in threads, one at a
time, because a thread can stand still anywhere in a model, whatever its modules do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_compress.post_training.products import Product, ProductTap

DEVICES = ("cpu", "cuda")  # whose autocast a thread does not inherit


class OutOfStep(Exception):
    """Calls did not come by the same weights in the same order."""


class _Stopped(BaseException):
    """Nobody wants to know how the call ends; no model catches this by accident."""


class HaltedCall(threading.Thread):
    """A call of a model that stands still behind each product with some weights, until the next ``go``.

    The product is then computed again, in case that the weight has been changed. Where it is added to something else,
    the call stands still before the sum, so that both are known.

    Args:
        call: calls the model.
        names: id of a weight -> its name.
        summed: names of weights whose products are added to something.

    Attributes:
        product: where it stands; None when it is through.
        inputs, output: of the product.
        other: what the product is added to, in its layout; None for nothing.
        result: what the call returned.
    """

    def __init__(self, call: Callable[[], Any], names: Mapping[int, str], summed: Collection[str]) -> None:
        super().__init__(daemon=True)
        self.product: Product | None = None
        self.inputs: Tensor | None = None
        self.output: Tensor | None = None
        self.other: Tensor | None = None
        self.result: Any = None
        self._call, self._summed = call, summed
        self._tap = ProductTap(names, after=self._after, joined=self._joined)
        self._autocast = [(d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d)]
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._error: BaseException | None = None

    def go(self) -> Product | None:
        """Go on to the next weight; None at the end of the call.

        Raises:
            Exception: what the call raised.
        """
        if self.ident is None:
            self.start()
        self._mine.release()
        self._theirs.acquire()
        if self._error is not None:
            raise self._error
        return self.product

    def stop(self) -> None:
        """Leave the call where it stands."""
        self._stopped = True
        if self.is_alive():
            self._mine.release()
            self.join()

    def run(self) -> None:
        """What the thread does."""
        self._mine.acquire()
        try:
            if not self._stopped:
                with ExitStack() as stack:
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.no_grad())
                    if self._device is not None:
                        stack.enter_context(torch.cuda.device(self._device))
                    for device, dtype in self._autocast:  # a cache would keep weights as they were
                        stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
                    stack.enter_context(self._tap)
                    self.result = self._call()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.product = self.inputs = self.output = self.other = None
            self._theirs.release()

    def _after(self, product: Product, inputs: Tensor, output: Tensor) -> None:
        if product.parameter not in self._summed:
            self._halt(product, inputs, output, None)
        else:
            self.inputs = inputs

    def _joined(self, product: Product, output: Tensor, other: Tensor) -> None:
        if product.parameter in self._summed:
            assert self.inputs is not None
            self._halt(product, self.inputs, output, other)

    def _halt(self, product: Product, inputs: Tensor, output: Tensor, other: Tensor | None) -> None:
        self.product, self.inputs, self.output, self.other = product, inputs, output, other
        self._theirs.release()
        self._mine.acquire()
        if self._stopped:
            raise _Stopped
        output.copy_(self._tap.again())  # what looks at its memory, looks at the new values


class Lockstep:
    """Calls that go from weight to weight together.

    Args:
        calls: the calls.
        order: names of the weights in the order in which all of them come by.
    """

    def __init__(self, calls: Sequence[HaltedCall], order: Sequence[str]) -> None:
        self.calls, self.order = tuple(calls), tuple(order)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for call in self.calls:
            call.stop()

    def go(self, name: str | None) -> None:
        """Let all calls go on to a weight, or (None) to their end.

        Raises:
            OutOfStep: if one comes to another.
        """
        for call in self.calls:
            product = call.go()
            found = None if product is None else product.parameter
            if found != name:
                raise OutOfStep(f"expected {name}, but a call came to {found}")


__all__ = ["HaltedCall", "Lockstep", "OutOfStep"]
