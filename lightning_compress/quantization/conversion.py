"""What a conversion did: a record of plain numbers, and the table that it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

DENSE = "fp32"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Args:
        backend: what the model computes with now.
        milliseconds: median of one forward pass of every candidate that was measured, and of the model without
            quantization, "fp32"; empty without an example.
        errors: of every candidate, the largest max |difference| / max |reference| of an output of the example, against
            the prepared model; empty without an example.
        layer_error: of int8 products of the example, the largest max |difference| / max |reference|, against products
            of float32 with the same inputs; None without an example or such products.
        tolerance: the largest of the errors that was allowed.
        bytes_before: of all parameters, before.
        bytes_after: of all parameters, packed: integers, scales, offsets, and what was left as it is.
        converted: by names of parameters, how each is computed with.
        left: by names of parameters that were left as they are, why.
    """

    backend: str
    milliseconds: Mapping[str, float]
    errors: Mapping[str, float]
    layer_error: float | None
    tolerance: float
    bytes_before: int
    bytes_after: int
    converted: Mapping[str, str]
    left: Mapping[str, str]

    @property
    def error(self) -> float | None:
        """The largest relative error against the prepared model; None without an example."""
        return self.errors.get(self.backend)

    @property
    def is_faster(self) -> bool | None:
        """Whether the model is faster than without quantization; None without an example."""
        return self.milliseconds[self.backend] < self.milliseconds[DENSE] if self.milliseconds else None

    def __str__(self) -> str:
        """A small table."""
        lines = [f"Converted {len(self.converted)} parameters, backend {self.backend!r}"]
        lines += [f"  {number} {how}" for how, number in Counter(self.converted.values()).items()]
        if self.left:
            lines.append(f"Left {len(self.left)} parameters as they are")
            lines += [f"  {number} {why}" for why, number in Counter(self.left.values()).items()]
        times = f"{self.bytes_before / self.bytes_after:.2f}" if self.bytes_after else "-"
        lines.append(f"Bytes of parameters: {self.bytes_before:,} -> {self.bytes_after:,} ({times} times less)")
        if not self.milliseconds:
            return "\n".join([*lines, "Latency and error: not measured, for want of an example"])
        lines.append(f"{'':10}{'ms':>10}{'error':>10}")
        for name, time in self.milliseconds.items():
            error = f"{self.errors[name]:.1e}" if name in self.errors else "-"
            mark = "  <- kept" if name == self.backend else ""
            if name in self.errors and not self.errors[name] <= self.tolerance:
                mark = f"  above the tolerance of {self.tolerance:g}"
            lines.append(f"{name:10}{time:10.2f}{error:>10}{mark}")
        if self.layer_error is not None:
            lines.append(f"Error of int8 products, each by itself: {self.layer_error:.1e}")
        if not self.is_faster:
            lines.append(f"No candidate that was allowed is faster than {DENSE}: the model is smaller, not faster.")
        return "\n".join(lines)


__all__ = ["DENSE", "ConversionReport"]
