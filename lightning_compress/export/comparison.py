"""The file against the model: on the example, and on random calls of other sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.export.call import Call, FlatModel, tensors_of
from lightning_compress.export.dynamic import other_sizes, resized
from lightning_compress.export.formats import Run
from lightning_compress.export.program import ExportError, Traced, reason


@dataclass(frozen=True)
class Tried:
    """One call with what the model returned for it."""

    tensors: Sequence[Tensor]
    expected: Sequence[Tensor]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs."""
        return tuple(tuple(t.shape) for t in self.tensors)


def calls_to_try(model: nn.Module, call: Call, traced: Traced, extra: Sequence[Call], seed: int) -> Iterator[Tried]:
    """The example, the user's further calls, and random ones; those that the model itself refuses are left out.

    A model may refuse a length that the trace knows no limit for: more positions than it has.
    """
    reference = FlatModel(model, call)
    for known in (call, *extra):
        yield Tried(known.tensors, tensors_of(FlatModel(model, known)(*known.tensors)))
    generator = torch.Generator().manual_seed(seed + 1)
    example = {name: call.tensors[n].shape[d] for name, ((n, d), *_) in traced.groups.items()}
    seen: list[dict[str, int]] = []
    for sizes in (example, *other_sizes(example, traced.ranges, traced.steps)):
        if sizes in seen:
            continue
        seen.append(sizes)
        tensors = resized(call, traced.groups, sizes, generator)
        try:
            expected = tensors_of(reference(*tensors))
        except Exception:  # whatever a model raises for a size that it does not take
            continue
        yield Tried(tensors, expected)


def compare(
    calls: Iterable[Tried], run: Run, names: Sequence[str], tolerance: float
) -> tuple[float, tuple[tuple[tuple[int, ...], ...], ...]]:
    """The largest relative error, max |difference| / max |expected| of an output, and the shapes of all calls.

    Raises:
        ExportError: if the error is above the tolerance, or the file does not run or returns other shapes.
    """
    worst, shapes = 0.0, []
    for tried in calls:
        try:
            outputs = run(tried.tensors)
        except Exception as cause:  # runtimes have exceptions of their own
            raise ExportError(
                f"Expected the file to run on inputs of the shapes {tried.shapes}, as the model does, but got "
                f"{reason(cause)} Say which sizes may vary by dynamic={{input: {{dimension: name}}}}."
            ) from cause
        shapes.append(tried.shapes)
        for name, output, expected in zip(names, outputs, tried.expected, strict=True):
            error = relative_error(output, expected)
            if error > tolerance or math.isnan(error):
                raise ExportError(
                    f"Expected output {name!r} to be that of the model within {tolerance:g}, relative to its largest "
                    f"value, but the difference is {error:.2e} for inputs of the shapes {tried.shapes}. Pass a larger "
                    "tolerance if the precision explains it."
                )
            worst = max(worst, error)
    return worst, tuple(shapes)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """max |output - expected| / max |expected|; infinite where shapes, infinities or NaN differ."""
    if output.shape != expected.shape:
        return math.inf
    wide = torch.complex128 if expected.is_complex() else torch.float64
    output, expected = output.to(wide), expected.to(wide)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(output)):
        return math.inf
    odd, other = expected[~finite], output[~finite]
    if not bool(((odd == other) | (odd.isnan() & other.isnan())).all()):
        return math.inf
    difference = (output[finite] - expected[finite]).abs()
    if not difference.numel():
        return 0.0
    scale = float(expected[finite].abs().max())
    return float(difference.max()) / (scale or 1.0)
