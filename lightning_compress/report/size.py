"""How big a model is: parameters, and bytes on disk."""

from __future__ import annotations

import safetensors.torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Number of elements of all parameters; a shared parameter counts once.

    >>> from torch import nn
    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters())


def file_size(model: nn.Module) -> int:
    """Bytes of the model's state as a safetensors file: parameters and persistent buffers, a shared tensor once.

    The file is written in memory. Tensors that share storage are stored once, as whoever saves the model would.

    >>> from torch import nn
    >>> file_size(nn.Linear(3, 2)) > 8 * 4
    True
    """
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state is no tensor
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key in seen:
            continue
        seen.add(key)
        # a copy of its own: the format refuses views of one storage
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return len(safetensors.torch.save(tensors))
