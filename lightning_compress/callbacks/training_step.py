"""Terms that callbacks add to the loss of a training step which knows nothing of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

Around = Callable[[Callable[[], Any]], Any]


def wrap_training_step(pl_module: pl.LightningModule, owner: str, around: Around) -> Callable[[], None]:
    """Let ``around(call)`` take the place of every ``call()`` of the training step; returns how to undo that.

    Several owners may wrap the step of one module; the order of their names is from the inside out, whatever the order
    of the callbacks.

    Raises:
        ValueError: if the step was replaced by somebody else, or twice by one owner.
    """
    current = vars(pl_module).get("training_step")
    layers: dict[str, Around] | None = getattr(current, "_layers", None)
    if current is not None and (layers is None or owner in layers):
        if hasattr(current, "_torchdynamo_orig_callable"):
            raise ValueError(
                f"Expected training_step to be a method of {type(pl_module).__name__}, which {owner} adds to, but it "
                "was compiled with the whole LightningModule. Compile the model inside: module.model.compile()."
            )
        raise ValueError(
            f"Expected training_step to be a method of {type(pl_module).__name__}, but it has been replaced on "
            f"the instance, for example by another {owner}. Use one {owner} in a Trainer."
        )
    if layers is None:
        original = pl_module.training_step
        layers = {}
        found = layers

        # the Trainer looks at the signature of the step through __wrapped__
        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            call: Callable[[], Any] = functools.partial(original, *args, **kwargs)
            for name in sorted(found):
                call = functools.partial(found[name], call)
            return call()

        training_step._layers = layers  # type: ignore[attr-defined]
        pl_module.training_step = training_step  # type: ignore[method-assign]
    layers[owner] = around
    mine = layers

    def undo() -> None:
        mine.pop(owner, None)
        if not mine and getattr(vars(pl_module).get("training_step"), "_layers", None) is mine:
            del vars(pl_module)["training_step"]

    return undo


def with_loss(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a training step returned, with ``change(loss)`` in place of the loss.

    Raises:
        ValueError: for a mapping without a loss.
    """
    if not isinstance(result, Mapping):
        return change(result)
    if "loss" not in result:
        raise ValueError(f"Expected training_step to return a 'loss', but got the keys {list(result)}.")
    return {**result, "loss": change(result["loss"])}
