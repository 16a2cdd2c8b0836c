"""Losses between hidden states, for distilling the layers below the head.

Letters: B batch, L positions, n selected rows, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_losses.reduction import Reduction, accumulation_dtype, check_reduction, reduce_loss
from kd_losses.selection import select_pair

# F.normalize's; dividing by it, as F.normalize does, gives a zero vector a gradient of 1e12
_SHORTEST = 1e-12


def _select(
    input: Tensor, teacher_input: Tensor, mask: Tensor | None, teacher_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    student, teacher, _ = select_pair(
        input, teacher_input.detach(), mask, teacher_mask, names=("input", "teacher_input")
    )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"teacher_input: expected the student's width {student.shape[1]}, got "
            f"{teacher.shape[1]}; project the student to the teacher's width first"
        )
    dtype = accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    return student.to(dtype), teacher.to(dtype)


def hidden_mse_loss(
    input: Tensor,
    teacher_input: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Squared distance of hidden states, averaged over the width.

    Equals: ``F.mse_loss(input, teacher_input)`` over the selected positions; the teacher detached.

    Args:
        input: (B, L, H) or (n, H) the student's.
        teacher_input: (B, L', H) or (n, H) the teacher's.
        mask: (B, L) or (n,) boolean, the student's positions; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions.

    Returns:
        A scalar, or (n,) for reduction "none"; float32 for half-precision input.

    Raises:
        TypeError: a mask isn't boolean, or hidden states aren't floating point.
        ValueError: shapes or counts don't fit, or an option is unknown.
    """
    check_reduction(reduction, num_items)
    student, teacher = _select(input, teacher_input, mask, teacher_mask)
    return reduce_loss((student - teacher).square().mean(-1), reduction, num_items)


def hidden_cosine_loss(
    input: Tensor,
    teacher_input: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """One minus the cosine of hidden states, blind to their lengths.

    Computed as half the squared distance of the unit vectors, which does not cancel when they are
    close. A vector shorter than 1e-12 is no direction: its cosine with one is taken as 1/2, and it
    gets no gradient.

    Equals: ``1 - F.cosine_similarity(input, teacher_input, dim=-1)``, for longer vectors.

    Args:
        input: (B, L, H) or (n, H) the student's.
        teacher_input: (B, L', H) or (n, H) the teacher's; detached.
        mask: (B, L) or (n,) boolean, the student's positions; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions.

    Returns:
        A scalar, or (n,) for reduction "none"; float32 for half-precision input.

    Raises:
        TypeError: a mask isn't boolean, or hidden states aren't floating point.
        ValueError: shapes or counts don't fit, or an option is unknown.
    """
    check_reduction(reduction, num_items)
    student, teacher = _select(input, teacher_input, mask, teacher_mask)
    distance = _directions(student) - _directions(teacher)
    return reduce_loss(distance.square().sum(-1) / 2, reduction, num_items)


def _directions(rows: Tensor) -> Tensor:
    """Unit vectors (n, H) of rows (n, H); zeros without gradient of rows that have no direction."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    none = lengths < _SHORTEST
    return rows.masked_fill(none, 0) / lengths.masked_fill(none, 1)
