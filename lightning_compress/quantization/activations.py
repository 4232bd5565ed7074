"""Quantizers of activations: the grid of a tensor follows from its range, observed now, observed before, or learned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.quantization.int8 import reduced_range, rounded_inputs
from lightning_compress.quantizers.base import check_bits, straight_through
from lightning_compress.quantizers.learned import LEAST, learned_step

SMALLEST = 6.1e-5  # scale: fbgemm's, so that its reciprocal fits half precision
NO_RANGE = 0.1  # scale where all values are 0: fbgemm's


@dataclass(eq=False)
class InputState:
    """What a quantizer of activations knows from before.

    Args:
        range: the least and the largest value, (2,); None before any was seen, and where ranges are not observed.
        step: what is learned, a leaf (1, 1); None where nothing is.
        signed: whether there are negative steps; None before it is known, and where steps are not learned.
    """

    range: Tensor | None = None
    step: Tensor | None = None
    signed: bool | None = None

    def copy(self) -> InputState:
        """A copy with tensors of its own."""
        step = None if self.step is None else self.step.detach().clone().requires_grad_(self.step.requires_grad)
        return InputState(None if self.range is None else self.range.clone(), step, self.signed)


class ActivationQuantizer(ABC):
    """Takes activations to few values, and gradients back as if it had not."""

    bits: int

    @abstractmethod
    def __call__(self, inputs: Tensor, state: InputState, training: bool) -> Tensor:
        """Like the inputs, with the values of the grid; in training the state may change.

        Args:
            inputs: floating point, with at least one element.
            state: from ``first_state``, or from calls before.
            training: whether ranges follow the inputs.
        """

    def first_state(self) -> InputState:
        """What is known before any call."""
        return InputState()

    def is_ready(self, state: InputState) -> bool:
        """Whether the state is enough to evaluate with it."""
        return True

    def fixed_grid(self, state: InputState) -> tuple[Tensor, Tensor] | None:
        """Of evaluation: what an integer is worth, float32 (), and the integer of the value 0, int8 or uint8 ().

        None where the grid follows from every call.
        """
        return None


@dataclass(frozen=True)
class DynamicRange(ActivationQuantizer):
    r"""Equal steps over the range of every call.

    .. math:: \hat x = c\,(\operatorname{round}(x / c + z) - z), \quad
        c = \frac{\max(x, 0) - \min(x, 0)}{n}, \quad z = \operatorname{round}(-\min(x, 0) / c), \quad n = 2^b - 1

    with the rounding of torch's dynamic int8 kernel, bit for bit in float32.

    Args:
        bits: :math:`b`, from 2 to 8.
        reduced: whether 8 bits are :math:`n = 127` steps, which every CPU computes with. None is what this machine
            needs: 127 on a CPU without VNNI instructions, 255 on others and on GPUs.

    Raises:
        ValueError: for other bits, or ``reduced`` with fewer.
    """

    bits: int = 8
    reduced: bool | None = None

    def __post_init__(self) -> None:
        check_bits("DynamicRange", self.bits, 2, 8)
        if self.reduced not in (None, False) and self.bits != 8:
            raise ValueError(f"Expected 8 bits with reduced={self.reduced!r}, but got {self.bits}. Leave reduced out.")

    def __call__(self, inputs: Tensor, state: InputState, training: bool) -> Tensor:
        """The inputs on the grid of their own range; the state is not used."""
        with torch.no_grad():
            wide, steps = _wide(inputs), self.steps(inputs.device)
            values = None
            eager = not torch.compiler.is_compiling()  # a graph cannot have tensors of quantized types
            if self.bits == 8 and eager and wide.device.type == "cpu" and wide.dtype == torch.float32:
                values = rounded_inputs(wide, steps == 127)  # the same, in a fraction of the time
            if values is None:
                values = on_range(wide, steps, 2**self.bits - 1)
        return straight_through(inputs, values.to(inputs.dtype))

    def steps(self, device: torch.device) -> int:
        """:math:`n` on this device."""
        reduced = self.reduced
        if reduced is None:
            reduced = self.bits == 8 and device.type == "cpu" and bool(reduced_range())
        return 127 if reduced else 2**self.bits - 1


@dataclass(frozen=True)
class ObservedRange(ActivationQuantizer):
    r"""Equal steps over a range that follows the training batches, and is fixed in evaluation.

    .. math:: [l, h] \leftarrow (1 - m)\,[l, h] + m\,[\min x, \max x]

    The grid is that of ``DynamicRange``, without its seven bits; what lies beyond is cut off and gets no gradient.
    Before the first training batch every call goes by its own range. Processes of a fit observe their own batches.

    Args:
        bits: from 2 to 8.
        momentum: :math:`m`, above 0 and at most 1.

    Raises:
        ValueError: for other bits or momenta.

    References: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference".
    """

    bits: int = 8
    momentum: float = 0.05

    def __post_init__(self) -> None:
        check_bits("ObservedRange", self.bits, 2, 8)
        if not 0 < self.momentum <= 1:
            raise ValueError(f"Expected momentum, the part of a new batch, to be in (0, 1], but got {self.momentum!r}.")

    def __call__(self, inputs: Tensor, state: InputState, training: bool) -> Tensor:
        """The inputs on the grid of the range."""
        with torch.no_grad():
            wide, observed = _wide(inputs), state.range
            if training or observed is None:
                now = torch.stack(wide.aminmax())
                observed = now if observed is None else observed.to(now) + self.momentum * (now - observed.to(now))
            if training:
                state.range = observed
            steps = 2**self.bits - 1
            least, most = observed.to(wide).unbind()
            values, passes = _on_grid(wide, least, most, steps, steps)
            values = values.to(inputs.dtype)
        return straight_through(inputs, values, passes)

    def is_ready(self, state: InputState) -> bool:
        """Whether a training batch was seen."""
        return state.range is not None

    def fixed_grid(self, state: InputState) -> tuple[Tensor, Tensor]:
        """What an integer is worth, float32 (), and the integer of the value 0, uint8 ()."""
        assert state.range is not None
        least, most = state.range.float().unbind()
        step, zero = _scale_and_zero(least.clamp(max=0), most.clamp(min=0), 2**self.bits - 1)
        return step, zero.to(torch.uint8)


@dataclass(frozen=True)
class LearnedRange(ActivationQuantizer):
    r"""Equal steps of a size that is learned by the loss.

    .. math:: \hat x = c \operatorname{clip}(\operatorname{round}(x / c), -Q_N, Q_P)

    with :math:`Q_P = 2^{b-1} - 1 = Q_N` where there are negative values, otherwise :math:`Q_P = 2^b - 1, Q_N = 0`, and
    :math:`c_0 = 2 \operatorname{mean}|x| / \sqrt{Q_P}` of the first batch. Gradients are those of ``LearnedStep``,
    those of c multiplied by :math:`1 / \sqrt{N Q_P}` for the N elements of an example.

    Args:
        bits: :math:`b`, from 2 to 8.
        signed: whether there are negative steps; None is found out from the first batch.

    Raises:
        ValueError: for other bits.

    References: Esser et al. 2020, "Learned Step Size Quantization".
    """

    bits: int = 8
    signed: bool | None = None

    def __post_init__(self) -> None:
        check_bits("LearnedRange", self.bits, 2, 8)

    def first_state(self) -> InputState:
        """A step that gets its value with the first batch, so that an optimizer can have it before."""
        return InputState(step=torch.zeros(1, 1, dtype=torch.float32).requires_grad_())

    def __call__(self, inputs: Tensor, state: InputState, training: bool) -> Tensor:
        """The inputs on the grid of the step; the first inputs that are not all 0 set it."""
        assert state.step is not None
        wide = _wide(inputs)
        if not self.is_ready(state):
            self._begin(wide.detach(), state)
            if not self.is_ready(state):
                return inputs  # all 0
        low, high = self.ends(bool(state.signed))
        examples = wide.reshape(wide.shape[0] if wide.dim() > 1 else 1, -1)
        step = state.step.to(wide).expand(examples.shape[0], 1)
        return learned_step(examples, step, low, high).reshape(inputs.shape).to(inputs.dtype)

    def ends(self, signed: bool) -> tuple[int, int]:
        """The smallest and the largest integer."""
        high = 2 ** (self.bits - 1) - 1
        return (-high, high) if signed else (0, 2**self.bits - 1)

    def is_ready(self, state: InputState) -> bool:
        """Whether a batch was seen."""
        return state.signed is not None

    def fixed_grid(self, state: InputState) -> tuple[Tensor, Tensor]:
        """What an integer is worth, float32 (), and the integer of the value 0, (): int8 if signed, else uint8."""
        assert state.step is not None
        step = state.step.detach().float().reshape(()).clamp(min=LEAST)
        return step, torch.tensor(0, dtype=torch.int8 if state.signed else torch.uint8)

    def _begin(self, inputs: Tensor, state: InputState) -> None:
        size = inputs.abs().mean()
        if not bool(size > 0):
            return
        assert state.step is not None
        state.signed = bool((inputs < 0).any()) if self.signed is None else self.signed
        with torch.no_grad():
            state.step.fill_((2 * size / math.sqrt(self.ends(state.signed)[1])).clamp(min=LEAST))


def on_range(inputs: Tensor, steps: int, largest: int) -> Tensor:
    """Inputs on the grid of their range: so many steps, integers from 0 to ``largest``."""
    least, most = inputs.reshape(-1).aminmax(dim=0)  # with a dim: ONNX has none for all
    return _on_grid(inputs, least, most, steps, largest)[0]


def _wide(inputs: Tensor) -> Tensor:
    return inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs


def _on_grid(inputs: Tensor, least: Tensor, most: Tensor, steps: int, largest: int) -> tuple[Tensor, Tensor]:
    """Values of the grid of a range, and which inputs are not cut off: what fbgemm computes, in its precision."""
    scale, zero = _scale_and_zero(least.clamp(max=0), most.clamp(min=0), steps)
    factor, moved = 1 / scale, zero
    if inputs.device.type == "cpu":  # where the kernel multiplies and adds with a single rounding
        inputs, factor, moved = inputs.double(), factor.double(), zero.double()
    integers = (inputs * factor).add_(moved).to(scale.dtype).round_()
    kept = integers.clamp(0, largest)
    passes = integers == kept
    return kept.sub_(zero).mul_(scale), passes


def _scale_and_zero(least: Tensor, most: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range around 0, from 0 to ``steps``; like the range, and computed in float64."""
    low, high = least.double(), most.double()
    scale = (high - low) / steps
    narrow = scale.to(least.dtype)
    scale = torch.where((narrow == 0) | (1 / narrow).isinf(), NO_RANGE, scale)
    small, factor = scale < SMALLEST, (SMALLEST / scale.to(least.dtype)).to(least.dtype)
    both = small & (low < 0) & (high > 0)
    new_low = torch.where(both, (least * factor).double(), torch.where(small & (high == 0), -SMALLEST * steps, low))
    new_high = torch.where(both, (most * factor).double(), torch.where(small & (low == 0), SMALLEST * steps, high))
    scale = torch.where(small, SMALLEST, scale)
    from_low, from_high = -new_low / scale, steps - new_high / scale
    # the end whose position has the smaller error of rounding decides
    nearer = -(new_low / scale).abs() < steps - (new_high / scale).abs()
    zero = torch.where(nearer, from_low, from_high).round().clamp(0, steps)
    return scale.to(least.dtype), zero.to(least.dtype)


__all__ = ["ActivationQuantizer", "DynamicRange", "InputState", "LearnedRange", "ObservedRange", "on_range"]
