"""Norms of groups: the only part that reads whole weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.regularizers._checks import accumulation_dtype, require_floating


def group_norms(weight: Tensor, axis: int) -> Tensor:
    r"""Euclidean norm of each group of ``weight`` along ``axis``.

    .. math:: s_g = \lVert w_g \rVert_2

    Where :math:`w_g` is everything that has index g on ``axis``. The gradient of a group that is exactly zero is 0, the
    subgradient of least norm, never NaN. Half-precision weights are squared and summed in float32.

    Args:
        weight: floating-point tensor with at least one dim.
        axis: the dim whose indices are the groups; 0 for the output units and 1 for the input units of a
            ``torch.nn.Linear`` weight.

    Returns:
        Tensor of shape ``(weight.shape[axis],)``; float32 for half-precision weights, otherwise the dtype of
        ``weight``.

    Raises:
        TypeError: if ``weight`` is not a floating-point tensor.
        ValueError: if ``axis`` is not a dim of ``weight``.

    >>> import torch
    >>> group_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), axis=0)
    tensor([5., 0.])
    """
    require_floating(weight, "weight")
    if not -weight.ndim <= axis < weight.ndim:
        raise ValueError(
            f"Expected axis to be a dim of weight, which has shape {tuple(weight.shape)}, but got axis {axis}. "
            "Use 0 for output units and 1 for input units of a linear weight."
        )
    axis %= weight.ndim
    return norm_over(weight, tuple(dim for dim in range(weight.ndim) if dim != axis))


def norm_over(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over ``dims`` in one pass, with gradient 0 where the norm is 0."""
    dtype = accumulation_dtype(tensor)
    if not dims:  # vector_norm reads an empty tuple as "over every dim"
        return tensor.to(dtype).abs()
    if tensor.device.type == "cpu" and not any(tensor.stride(dim) == 1 for dim in dims):
        # On the CPU vector_norm over an outer dim is not vectorised: 4.1 ms against 0.4 ms for a (3072, 768) weight.
        squares = tensor.to(dtype).square().sum(dims)
        zero = squares == 0  # sqrt has an infinite slope there, and inf * 0 would be NaN
        return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
    return torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype)
