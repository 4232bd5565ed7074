"""Calibration data: some batches of a loader, checked, on the device of the model, and how to call it with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.discovery.tracer import evaluation, output_tensors

Call = Callable[[nn.Module, Any], Any]
Loss = Callable[[nn.Module, Any], Tensor]
LABELS = ("labels", "label")
# Criteria that look at inputs, weights and outputs only.
WITHOUT_LABELS = ("outputs", "norm", "low_rank", "obs")


@dataclass(frozen=True)
class Calibration:
    """Batches, and what to do with one.

    Args:
        batches: the batches, as the loader gave them, on the device of the model.
        call: (model, batch) -> the outputs of the model.
        loss: (model, batch) -> the loss, a scalar.
        real: batch -> bool (examples, tokens), False at padding; None where nothing is padded.
        labels: batch -> its labels, or None.
    """

    batches: tuple[Any, ...]
    call: Call
    loss: Loss
    real: Callable[[Any], Tensor | None]
    labels: Callable[[Any], Any] = lambda batch: parted(batch)[2]

    @classmethod
    def of(
        cls, model: nn.Module, loader: Iterable[Any], batches: int | None, call: Call | None, loss: Loss | None
    ) -> Calibration:
        """The first ``batches`` batches of a loader; the rest as in ``compress_after_training``.

        Raises:
            ValueError: for a loader that is empty or endless, or that gives NaN.
        """
        return cls(taken(model, loader, batches), call or default_call, loss or default_loss, real_tokens)

    def with_batches(self, batches: tuple[Any, ...]) -> Calibration:
        """The same for other batches."""
        return replace(self, batches=batches)

    def parts(self) -> tuple[Calibration, Calibration]:
        """Batches to learn from, and an eighth of them (the last, at least one) to judge by what was learned.

        One batch is cut in halves.

        Raises:
            ValueError: if there is one example only.
        """
        batches = self.batches
        if len(batches) < 2:
            size = size_of(batches[0]) or 1
            if size < 2:
                raise ValueError(
                    "Expected at least two calibration examples for a repair, one of which judges it, but got one. "
                    "Give more, or compress with repair=None."
                )
            half = size // 2
            batches = (_rows(batches[0], 0, half, size), _rows(batches[0], half, size, size))
        held = max(1, len(batches) // 8)
        return self.with_batches(batches[:-held]), self.with_batches(batches[-held:])


def taken(model: nn.Module, loader: Iterable[Any], batches: int | None) -> tuple[Any, ...]:
    """The first batches of ``loader``, copied to the device of the model; raises ValueError where there is none."""
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"Expected batches to be an integer of at least 1, or None for all, but got {batches!r}.")
    if batches is None and not isinstance(loader, Sized):
        raise ValueError(
            f"Expected batches=..., how many to take, because {type(loader).__name__} has no length and may be "
            "endless, but got None. Sixty are a good start."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # tensors that a Trainer made in inference mode could not be differentiated
    with torch.inference_mode(False), torch.no_grad():
        found = tuple(
            pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), b) for b in islice(loader, batches)
        )
    check(found)
    return found


def check(batches: tuple[Any, ...]) -> None:
    """Raise ValueError if there are no batches, or one holds NaN or infinity where a model computes with it."""
    if not batches:
        raise ValueError("Expected calibration batches, but the loader is empty. Nothing was changed.")
    for number, batch in enumerate(batches):
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
                raise ValueError(
                    f"Expected calibration data without NaN, but batch {number} holds it in a tensor of shape "
                    f"{tuple(leaf.shape)}. Nothing was changed."
                )


def parted(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword inputs of a batch, and its labels or None.

    A mapping holds keyword inputs and perhaps "labels"; a sequence of two or more ends with labels; a tensor is the
    only input.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if key in batch), None)
        return (), {key: value for key, value in batch.items() if key not in LABELS}, labels
    if isinstance(batch, tuple | list):
        return (tuple(batch[:-1]), {}, batch[-1]) if len(batch) > 1 else (tuple(batch), {}, None)
    return (batch,), {}, None


def default_call(model: nn.Module, batch: Any) -> Any:
    """Call the model with the inputs of a batch, see ``parted``."""
    args, kwargs, _ = parted(batch)
    return model(*args, **kwargs)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy for integer labels, mean squared error for others.

    Raises:
        ValueError: for a batch without labels, or with labels of a shape that neither of them takes.
    """
    args, kwargs, labels = parted(batch)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"Expected calibration batches with labels, (inputs, labels) or a mapping with 'labels', because gradients "
            f"rank the units, but got {type(batch).__name__}"
            f"{f' of {list(batch)}' if isinstance(batch, Mapping) else ''}. Use a criterion that needs none, "
            f"importance={' or '.join(map(repr, WITHOUT_LABELS))}, or say what the loss is: loss=... "
            "Nothing was changed."
        )
    outputs = [t for t in output_tensors(model(*args, **kwargs)) if t.is_floating_point()]
    if outputs and not labels.is_floating_point() and outputs[0].dim() == labels.dim() + 1:
        scores = outputs[0]
        return nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), labels.reshape(-1))
    if outputs and labels.is_floating_point() and outputs[0].shape == labels.shape:
        return nn.functional.mse_loss(outputs[0], labels)
    shape = tuple(outputs[0].shape) if outputs else None
    raise ValueError(
        f"Expected integer labels with a class dim less than the outputs, or floating-point labels of their shape, but "
        f"got {labels.dtype} of shape {tuple(labels.shape)} for outputs of shape {shape}. Say what the loss is: "
        "loss=lambda model, batch: ..."
    )


def real_tokens(batch: Any) -> Tensor | None:
    """The mask of a mapping with "attention_mask" of shape (examples, tokens) as bool; None without one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def size_of(batch: Any) -> int | None:
    """Examples in a batch: the leading size that most of its tensors share; None if it has no tensor."""
    sizes = [t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    return max(sizes, key=sizes.count) if sizes else None


def singles(batch: Any) -> Iterator[Any]:
    """The examples of a batch, each a batch of one."""
    size = size_of(batch)
    for n in range(size or 0):
        yield _rows(batch, n, n + 1, size)


def _rows(batch: Any, start: int, stop: int, size: int | None) -> Any:
    """Some examples of a batch of this size."""
    return pytree.tree_map_only(Tensor, lambda t: t[start:stop] if t.dim() and t.shape[0] == size else t, batch)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no fused encoder layers (they call nothing that could be looked at), random state kept.

    Outside of inference mode; whether gradients are recorded stays.
    """
    gradients = torch.is_grad_enabled()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # leaving inference mode alone would turn gradients on
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(devices=devices),
            evaluation(model),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


__all__ = ["WITHOUT_LABELS", "Calibration", "at_rest", "default_call", "default_loss", "singles", "size_of"]
