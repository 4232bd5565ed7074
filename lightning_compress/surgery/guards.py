"""What surgery refuses before it touches anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.discovery.valueless import has_values, lacking_values, storage_key
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.slicing import AxisPositions, owners_of

# class name -> how to get at the plain module; by name because importing all of these is slow
_WRAPPERS = {
    "DataParallel": "Pass model.module and wrap it again afterwards.",
    "DistributedDataParallel": "Pass model.module and wrap it again afterwards: a live reducer keeps the old shapes.",
    "FullyShardedDataParallel": "Remove units before the model is sharded, and shard the smaller model.",
    "FSDPModule": "Remove units before the model is sharded, and shard the smaller model.",
    "OptimizedModule": "Pass model._orig_mod and compile it again afterwards; inside a model that a fit compresses, "
    "compile in place: module.compile().",
}
_SCRIPTED = "Remove units from the eager module and script the smaller one."


def check_plain(model: nn.Module) -> None:
    """Raise SurgeryError for a wrapped, compiled or scripted module anywhere in ``model``; TypeError for no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be an nn.Module, but got {type(model).__name__}.")
    for path, module in model.named_modules():
        where = f" at {path!r}" if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            if path:
                continue  # harmless as long as no plan touches its weights, see check_weights
            raise SurgeryError(f"Expected the plain module, but got {type(module).__name__}. {_SCRIPTED}")
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch"):
                raise SurgeryError(
                    f"Expected the plain module, but got {type(module).__name__}{where}. {_WRAPPERS[base.__name__]}"
                )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise SurgeryError(
                f"Expected the plain module, but {type(module).__name__}{where} was compiled in place by "
                "module.compile(). Remove units first, then compile."
            )


def check_names(model: nn.Module) -> None:
    """Raise SurgeryError for a scripted module, or one with the names of ``torch.compile``: plans have other names."""
    for path, module in model.named_modules():
        where = f" at {path!r}" if path else ""
        if isinstance(module, torch.jit.ScriptModule) and not path:
            raise SurgeryError(f"Expected the plain module, but got {type(module).__name__}. {_SCRIPTED}")
        if type(module).__name__ == "OptimizedModule":
            raise SurgeryError(
                f"Expected the plain module, but got OptimizedModule{where}. {_WRAPPERS['OptimizedModule']}"
            )


def check_values(model: nn.Module, purpose: str) -> None:
    """Raise SurgeryError where weights have no values: outputs are compared by running the model."""
    lacking = lacking_values(model)
    if lacking:
        raise SurgeryError(
            f"Expected weights with values for {purpose}, but {lacking[0]!r} has none (meta device or FakeTensorMode), "
            f"nor have {len(lacking) - 1} others. Discovery, explain and make_plan(scores=...) work without; verify "
            "once the weights are loaded: discover(..., prove=True) or apply_plan(..., verify=(args, kwargs))."
        )


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], kept: Mapping[str, AxisPositions]) -> None:
    """Raise SurgeryError for a tensor of the plan that is not finite, not dense or part of a scripted module."""
    for path, module in owners_of(dict(model.named_modules()), (tensors[name] for name in kept)):
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(
                f"Expected the weights of {path!r} to be those of a plain module, but it is scripted. {_SCRIPTED}"
            )
    for name in kept:
        tensor = tensors[name]
        if type(tensor.data) is not Tensor:
            raise SurgeryError(
                f"Expected {name!r} to be an ordinary dense tensor, but got {type(tensor.data).__name__} (sharded or "
                "quantized). Remove units before sharding and quantization."
            )
        if tensor.is_floating_point() and has_values(tensor) and not bool(torch.isfinite(tensor).all()):
            raise SurgeryError(
                f"Expected finite weights, but {name!r} holds NaN or infinity. Nothing was removed; look for the step "
                "at which training diverged (a lower learning rate, gradient clipping)."
            )


def check_sharing(tensors: Mapping[str, Tensor], kept: Iterable[str]) -> None:
    """Raise SurgeryError where parameters of the plan are views into one storage: cutting one would tear them apart."""
    storages: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            storages.setdefault(storage_key(tensor), []).append((name, tensor))
    for name in kept:
        tensor = tensors[name]
        if not tensor.numel():
            continue
        for other, sharer in storages[storage_key(tensor)]:
            if sharer is not tensor and _overlap(tensor, sharer):
                raise SurgeryError(
                    f"Expected {name!r} to share memory with no other tensor, but {other!r} is another view of the "
                    "same storage. Tie weights by assigning the same Parameter object to both modules."
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        start = int(t.storage_offset())
        return start, start + sum(int((size - 1) * stride) for size, stride in zip(t.shape, t.stride(), strict=True))

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 <= b1 and b0 <= a1
