"""Distillation losses, as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logits_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Divergence of softened class distributions.

    .. math:: L = T^2 \, \frac1N \sum_n \mathrm{KL}\bigl(\mathrm{softmax}(t_n / T) \,\Vert\, \mathrm{softmax}(s_n /
    T)\bigr)

    The factor :math:`T^2` keeps the size of the gradients independent of the temperature, so that one weight fits all.

    Args:
        student: logits of shape (..., classes).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T > 0.

    Returns:
        Scalar, in float32 or wider; the mean over all leading dims.

    Raises:
        ValueError: if shapes differ, or there is one class only, whose distribution carries nothing.

    Reference: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network".

    >>> import torch
    >>> logits_kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    tensor(0.)
    """
    _check_shapes(student, teacher)
    if student.dim() == 0 or student.shape[-1] < 2:
        raise ValueError(
            f"Expected logits of two classes or more in the last dim, but got shape {tuple(student.shape)}: a softmax "
            f"over one class "
            "is always 1. Use loss='mse' for regression, and for one logit per label."
        )
    classes = student.shape[-1]
    student, teacher = _widened(student), _widened(teacher.detach())
    # (..., classes) -> (rows, classes)
    log_student = F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def output_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference, :math:`\frac1N \sum_n (s_n - t_n)^2`; no gradient flows into the teacher.

    Raises:
        ValueError: if shapes differ.

    >>> import torch
    >>> output_mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    _check_shapes(student, teacher)
    return F.mse_loss(_widened(student), _widened(teacher.detach()))


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected outputs of the student and of the teacher to have one shape, but got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. The teacher must answer the same question."
        )


def _widened(tensor: Tensor) -> Tensor:
    """Half precision as float32: logarithms and squares of small numbers vanish in it."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
