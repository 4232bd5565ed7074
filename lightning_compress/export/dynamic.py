"""Which dimensions of the inputs may have another size than in the example, and calls of other sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.export.call import Call, Places

Groups = dict[str, Places]  # name of a size -> the places that have it
HIDDEN = -1e4  # floats at or below this hide something: masks that are added to logits


def derive(call: Call) -> Groups:
    """The sizes that may vary, as the example shows them.

    Dimension 0 of the inputs is the batch. Of inputs with up to three dimensions every other dim may vary, and of
    larger ones (images) those that agree with such a dim. Dims of one size vary together. Whether the model bears
    another size is found out when it is traced: a width, which a weight fixes, drops out there.
    """
    shapes = [tuple(t.shape) for t in call.tensors]
    batch = next((shape[0] for shape in shapes if shape), None)
    groups: Groups = {}
    if batch is not None:
        # at dim 1 where another layout puts it, as of a mask (batch, length) beside an input (length, batch, width)
        groups["batch"] = tuple((n, s[:2].index(batch)) for n, s in enumerate(shapes) if batch in s[:2])
    rest = [(n, d) for n, s in enumerate(shapes) for d in range(len(s)) if (n, d) not in groups.get("batch", ())]
    small = {shapes[n][d] for n, d in rest if len(shapes[n]) <= 3}
    by_size: dict[int, list[tuple[int, int]]] = {}
    for n, d in rest:
        if shapes[n][d] > 1 and (len(shapes[n]) <= 3 or shapes[n][d] in small):
            by_size.setdefault(shapes[n][d], []).append((n, d))
    for number, places in enumerate(by_size.values()):
        groups["length" if number == 0 else f"length_{number + 1}"] = tuple(places)
    return groups


def chosen(call: Call, dynamic: Mapping[str, Mapping[int, str]]) -> Groups:
    """The sizes that a user names, input -> dimension -> name; places of one name vary together.

    Raises:
        ValueError: for an input or a dimension that the example does not have, or sizes of one name that differ there.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for name, dims in dynamic.items():
        if name not in call.names:
            raise ValueError(f"Expected dynamic to name inputs out of {list(call.names)}, but got {name!r}.")
        number = call.names.index(name)
        shape = tuple(call.tensors[number].shape)
        for dim, size in dims.items():
            if not -len(shape) <= dim < len(shape):
                raise ValueError(f"Expected a dimension of {name!r}, of shape {shape}, in dynamic, but got {dim}.")
            groups.setdefault(size, []).append((number, dim % len(shape)))
    for size, places in groups.items():
        sizes = {call.tensors[n].shape[d] for n, d in places}
        if len(sizes) > 1:
            raise ValueError(
                f"Expected the dimensions that dynamic calls {size!r} to agree in the example, but they are "
                f"{sorted(sizes)}. Give them different names."
            )
    return {size: tuple(places) for size, places in groups.items()}


def resized(call: Call, groups: Groups, sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
    """Random tensors like those of the example, with other sizes in some groups.

    Integers are drawn from the range of the example, floats from a normal distribution of its mean and deviation. Masks
    (booleans, zeros and ones, zeros and minus infinity) stay masks: they are those of the example, stretched.
    """
    tensors = []
    for number, tensor in enumerate(call.tensors):
        shape = list(tensor.shape)
        for name, places in groups.items():
            for n, d in places:
                if n == number:
                    shape[d] = sizes.get(name, shape[d])
        tensors.append(_like(tensor, shape, generator))
    return tensors


def _like(tensor: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    if not tensor.numel() or _is_mask(tensor):
        for dim, size in enumerate(shape):
            positions = torch.arange(size) * tensor.shape[dim] // max(1, size)
            tensor = tensor.index_select(dim, positions)
        return tensor.clone()
    if tensor.is_floating_point():
        values = tensor.double()[torch.isfinite(tensor)]
        mean, deviation = (float(values.mean()), float(values.std(correction=0))) if values.numel() else (0.0, 1.0)
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (mean + (deviation or 1.0) * noise).to(tensor.dtype)
    if tensor.is_complex():
        return torch.randn(*shape, generator=generator, dtype=tensor.dtype)
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, tuple(shape), generator=generator, dtype=tensor.dtype)


def _is_mask(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return True
    if tensor.is_complex():
        return False
    if tensor.is_floating_point():
        return bool(((tensor == 0) | (tensor <= HIDDEN)).all())
    return bool(((tensor == 0) | (tensor == 1)).all())


def other_sizes(
    example: Mapping[str, int], ranges: Mapping[str, tuple[int, int | None]], steps: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Sizes to try beside those of the example: a batch of one, shorter, longer by one, about twice as long.

    Args:
        example: sizes of the example by name.
        ranges: least and greatest size that the trace allows, by name; None: no limit.
        steps: what sizes must be multiples of, by name.
    """
    for batch, length in ((1, 0.5), (3, 1.0), (2, 1.7), (1, 1.3), (5, 1.0 / 3)):
        sizes = {}
        for name, size in example.items():
            low, high = ranges.get(name, (1, None))
            step = steps.get(name, 1)
            wanted = batch if name == "batch" else math.ceil(size * length) + (length == 1.0)
            wanted = max(step, round(wanted / step) * step)
            low = 1 if name == "batch" else low
            sizes[name] = max(low, wanted if high is None else min(wanted, high))
        yield sizes


def torch_dims(call: Call, groups: Groups, required: bool) -> tuple[dict[int, Any], ...]:
    """What ``torch.export`` is told of every input: dims that may vary, or have to, and those that stay."""
    from torch.export import Dim

    free = Dim.DYNAMIC if required else Dim.AUTO
    varying = {place for places in groups.values() for place in places}
    return tuple(
        {dim: free if (number, dim) in varying else Dim.STATIC for dim in range(tensor.dim())}
        for number, tensor in enumerate(call.tensors)
    )
