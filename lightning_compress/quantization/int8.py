"""The int8 product of torch, with inputs that are rounded by the range of the call: ``linear_dynamic``.

On a CPU without VNNI instructions the kernel adds pairs of products in 16 bits and silently cuts off what does not fit.
Inputs of seven bits fit. Whether they are needed is measured once, on the largest products that can occur.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_compress.quantization.errors import QuantizationError

LONGEST = 64  # of the rows that are tried


def reduced_range() -> bool | None:
    """Whether inputs must have seven bits for the kernel to be exact on this machine; None if it is not even then."""
    return _reduced_range(torch.backends.quantized.engine)


def int8_kernel(integers: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """A weight as the kernel wants it.

    Args:
        integers: int8 (out, in), on the CPU.
        scale: (out, 1), or (1, 1) for one of all rows.
        bias: float32 (out,), or None.
    """
    rows = integers.shape[0]
    with _quiet():
        weight = torch._make_per_channel_quantized_tensor(
            integers,
            scale.reshape(-1).expand(rows).double().contiguous(),
            torch.zeros(rows, dtype=torch.long, device="cpu"),
            0,
        )
        return torch.ops.quantized.linear_prepack(weight, None if bias is None else bias.detach())


def int8_product(inputs: Tensor, kernel: Any, reduced: bool) -> Tensor:
    """Inputs (..., in), float32, times a weight; (..., out)."""
    if inputs.dim() == 1:
        return torch.ops.quantized.linear_dynamic(inputs.unsqueeze(0), kernel, reduced).squeeze(0)
    return torch.ops.quantized.linear_dynamic(inputs, kernel, reduced)


def rounded_inputs(inputs: Tensor, reduced: bool) -> Tensor | None:
    """Inputs, float32 on the CPU, with the values that the kernel rounds them to; None for inputs that it refuses."""
    try:
        # the notice comes once, and came when the kernel was tried, unless all are asked for
        with _quiet() if torch.is_warn_always_enabled() or reduced_range() is None else nullcontext():
            return torch.quantize_per_tensor_dynamic(inputs, torch.quint8, reduced).dequantize()
    except (RuntimeError, AttributeError):  # NaN, or a torch that has it no longer
        return None


def check_available() -> bool:
    """Whether inputs need seven bits.

    Raises:
        QuantizationError: if the kernel is missing or wrong on this machine.
    """
    reduced = reduced_range()
    if reduced is None:
        raise QuantizationError(
            f"Expected the int8 kernel of torch to be exact on this machine, but with the engine "
            f"{torch.backends.quantized.engine!r} it is missing or wrong. Set it to another of "
            f"{torch.backends.quantized.supported_engines}, or use backend='packed'."
        )
    return reduced


@cache
def _reduced_range(engine: str) -> bool | None:
    # whatever modes the first call happens to be under, the answer is kept
    with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        integers = torch.tensor([[127], [-128]], dtype=torch.int8).repeat(1, LONGEST)
        expected = LONGEST * torch.tensor([127, -128], dtype=torch.float32)
        for reduced in (False, True):
            try:
                kernel = int8_kernel(integers, torch.ones(2, 1, dtype=torch.float32), None)
                got = int8_product(torch.ones(LONGEST, dtype=torch.float32), kernel, reduced)
            except (RuntimeError, AttributeError):  # no engine, or a torch that has the kernel no longer
                return None
            if torch.allclose(got, expected, rtol=1e-4):
                return reduced
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notice that tensors of quantized types will go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.quantize_per_tensor, torch\.quantize_per_channel", UserWarning)
        yield


__all__ = ["check_available", "int8_kernel", "int8_product", "reduced_range", "rounded_inputs"]
