"""Weights under which every layer has a say: a comparison is worth something if signals neither die nor explode.

In a deep network with weights of any small size the signal of an early layer fades before it reaches the outputs, or
saturates what comes after it; then a wrong removal would change nothing either. Perturbed weights may be any weights,
so each linear layer y = W x + b is scaled once, in the order of execution, to a gain of about one:

    W  <-  W / s        s = root mean square of W x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.surgery.verify import Rehearsal

# Gains within these sizes are left alone: a model that is fine is not touched.
SMALL, LARGE = 0.5, 2.0
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


def calibrate(rehearsal: Rehearsal, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Scale the weights of the linear layers and convolutions of ``model`` in place, in one run of the example call.

    Args:
        rehearsal: of the model.
        model: the model; its weights are copies that the caller throws away (``DoubleWeights``).
        args: positional arguments of the example call.
        kwargs: its keyword arguments.

    A call that fails leaves off where it fails: whoever needs its outputs will say why.
    """
    done: set[int] = set()

    def scale(module: nn.Module, _: Any, output: Any) -> Any:
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or id(weight) in done or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        done.add(id(weight))
        channel = -1 if isinstance(module, nn.Linear) else output.dim() - weight.dim() + 1
        offset: Tensor | float = 0.0
        if bias is not None:
            offset = bias.reshape([-1 if i == channel % output.dim() else 1 for i in range(output.dim())])
        signal = output - offset
        size = float(signal.square().mean().sqrt()) if signal.numel() else 1.0
        if not 1e-12 < size < 1e12 or SMALL <= size <= LARGE:
            return None
        weight.data.div_(size)
        return signal / size + offset

    handles = [module.register_forward_hook(scale) for module in model.modules() if isinstance(module, _LINEAR)]
    try:
        with torch.no_grad():
            rehearsal.run(model, args, kwargs)
    except Exception:  # foreign code may raise anything
        return
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["calibrate"]
