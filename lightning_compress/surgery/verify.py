"""Running the example call reproducibly, and comparing what it returns."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_compress.discovery.memory import forgotten
from lightning_compress.discovery.outputs import Output, flatten
from lightning_compress.discovery.tracer import decomposed, evaluation
from lightning_compress.quantization_switch import quantization_off
from lightning_compress.surgery.errors import NotFinite, SurgeryError
from lightning_compress.surgery.precision import DoublePrecision, to_double
from lightning_compress.token_switch import tokens_off

Outputs = dict[str, Output]


class Mismatch(Exception):
    """Outputs that cannot be compared, or one that is not finite; the text says which."""


class Rehearsal:
    """Context in which a model can be called again and again for comparison, and is left as it was.

    Evaluation mode, no gradients, no autocast, no quantization, unfused kernels, double precision, the same random
    numbers in every call. Buffers and attributes that a call writes are restored after it, random number generators and
    training flags at the end.

    Args:
        model: the model; its weights should be in double precision (``DoubleWeights``).
        tokens: whether a token pruning that is installed stays on; removals are compared with all tokens.
    """

    def __init__(self, model: nn.Module, tokens: bool = False) -> None:
        self._model = model
        self._tokens = tokens
        self._devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self._stack = ExitStack()

    def __enter__(self) -> Rehearsal:
        with ExitStack() as stack:
            stack.enter_context(_restored_randomness(self._devices))
            stack.enter_context(evaluation(self._model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(decomposed())
            stack.enter_context(nullcontext() if self._tokens else tokens_off())
            stack.enter_context(quantization_off())
            for kind in ("cpu", "cuda") if self._devices else ("cpu",):
                stack.enter_context(torch.autocast(kind, enabled=False))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, call: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, exact: bool = True) -> Outputs:
        """The outputs of ``call(*args, **kwargs)``; ``call`` is the model or one of its sub-modules.

        Not ``exact``, the call is made in the precision of its own.
        """
        random.seed(0)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would queue seeds for every backend, which is slow
        for device in self._devices:
            torch.cuda.default_generators[device].manual_seed(0)
        buffers = [(buffer, buffer.clone()) for buffer in call.buffers()]
        inputs = (tuple(args), dict(kwargs))
        inputs = to_double(inputs) if exact else tree_map_only(Tensor, Tensor.clone, inputs)
        try:
            with forgotten(call.modules()), DoublePrecision() if exact else nullcontext():
                return flatten(call(*inputs[0], **inputs[1]))
        finally:
            for buffer, before in buffers:
                if buffer.shape == before.shape:
                    buffer.copy_(before)

    def reference(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outputs:
        """The outputs of the whole model, checked to be worth a comparison.

        Raises:
            SurgeryError: if the call fails in double precision, returns no tensor, or returns NaN (``NotFinite``).
        """
        try:
            outputs = self.run(self._model, args, kwargs)
        except Exception as failure:  # foreign code may raise anything
            raise SurgeryError(
                "Expected the example call to run in evaluation mode and float64, but it raised "
                f"{type(failure).__name__}: {failure}"
            ) from failure
        if not outputs:
            raise SurgeryError(
                "Expected the example call to return a tensor, but it returns none, so a removal cannot be verified."
            )
        for path, output in outputs.items():
            if output.tensor.is_floating_point() and bool(output.tensor.isnan().any()):
                raise NotFinite(
                    f"Expected finite outputs of the example call, but {path} holds NaN before anything is removed. "
                    "Check the weights and the example."
                )
        return outputs


@contextmanager
def _restored_randomness(devices: Collection[int]) -> Iterator[None]:
    python_state, state = random.getstate(), torch.get_rng_state()
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(state)
        for device, saved in states.items():
            torch.cuda.set_rng_state(saved, device)


def difference(reference: Outputs, outputs: Outputs) -> float:
    """Largest over the outputs of max |difference| / max(1, max |reference|).

    Equal infinities (masked scores) count as equal; an integer or boolean output that differs anywhere counts as 1.
    What is internal (a key/value cache) follows a removal and is not compared.

    Raises:
        Mismatch: if an output is missing or has another shape, or holds NaN where the reference does not.
    """
    worst = 0.0
    for path, expected in reference.items():
        if expected.internal:
            continue
        if path not in outputs:
            raise Mismatch(f"{path} is missing")
        a, b = expected.tensor, outputs[path].tensor
        if a.shape != b.shape:
            raise Mismatch(f"{path} has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, float(not torch.equal(a, b)))
            continue
        gap = torch.where(a == b, torch.zeros_like(a), a - b).abs()
        if bool(gap.isnan().any()):
            raise Mismatch(f"{path} holds NaN")
        magnitude = torch.where(a.isinf(), torch.zeros_like(a), a).abs().max()
        worst = max(worst, float(gap.max()) / max(1.0, float(magnitude)))
    return worst
