"""The tensors of a model as a file holds them, and back: each shared tensor once, nothing executable."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_compress.saving.manifest import DTYPES, TensorEntry


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers by name, on the CPU, and the other names of those that are shared.

    Raises:
        ValueError: for state that is no dense tensor (sharded, quantized, a module's extra state), or has no values.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Expected the state of the model to consist of tensors, but {name!r} is a {type(value).__name__} "
                "(get_extra_state). Keep it in a buffer, or save it beside the model."
            )
        data = value.detach()
        if type(data.data) is not Tensor or _dtype(data) not in DTYPES or data.layout != torch.strided:
            raise ValueError(
                f"Expected {name!r} to be a dense tensor of one of the types {', '.join(DTYPES)}, but got "
                f"{type(data.data).__name__} of {_dtype(data)}. Save before the model is sharded or quantized."
            )
        if data.is_meta:
            raise ValueError(f"Expected {name!r} to have values, but it lies on the meta device. Load weights first.")
        key = (data.device, data.data_ptr(), data.shape, data.stride()) if data.numel() else name
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            # the format refuses views of one storage
            tensors[name] = data.cpu().clone(memory_format=torch.contiguous_format)
    return tensors, shared


def entries(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """What the manifest says about ``tensors``."""
    return {name: TensorEntry(_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}


def check_fit(model: nn.Module, expected: Mapping[str, TensorEntry], shared: Mapping[str, str]) -> None:
    """Raise ValueError unless ``model`` has exactly these tensors, with these shapes."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wanted = {name: entry.shape for name, entry in expected.items()}
    wanted.update({name: wanted[other] for name, other in shared.items()})
    if own == wanted:
        return
    missing, unknown = sorted(wanted.keys() - own.keys()), sorted(own.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"Expected the rebuilt model to have the tensors of the saved one, but it lacks {missing[:3]} "
            f"({len(missing)}) and has {unknown[:3]} ({len(unknown)}) beyond them. The factory must build the dense "
            "model that was compressed."
        )
    name = next(n for n in wanted if own[n] != wanted[n])
    raise ValueError(
        f"Expected {name!r} of the rebuilt model to have shape {wanted[name]}, as in the saved one, but got "
        f"{own[name]}. The factory must build the dense model that was compressed."
    )


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Give the tensors of ``model`` these values and types; tensors that are one object stay one object."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    names = {**{name: name for name in tensors}, **shared}
    done: set[int] = set()
    for name, source in names.items():
        target, value = own[name], tensors[source]
        if id(target) in done:
            continue
        done.add(id(target))
        if target.dtype == value.dtype and not target.is_meta:
            target.copy_(value)
        else:
            target.data = value.to(target.device if not target.is_meta else value.device, copy=True)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


__all__ = ["check_fit", "entries", "fill", "state_of"]
