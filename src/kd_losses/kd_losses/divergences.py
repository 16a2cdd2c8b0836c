"""Divergences between rows of logits, without any head.

Letters: B batch, L positions, n selected rows, V vocabulary.
"""

import torch
from torch import Tensor

from kd_losses.reduction import (
    Reduction,
    accumulation_dtype,
    check_reduction,
    check_temperature,
    reduce_loss,
)
from kd_losses.selection import select_pair

# exp(50) is far inside float32's range, and a p lost to underflow (below 1e-38) that is multiplied
# by it is still far below rounding; and where a ratio is larger there is no cancellation to avoid.
_LARGEST_LOG_RATIO = 50.0


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) per row, in plain differentiable torch.

    Args:
        student_logits: (n, V), divided by the temperature, float32 or float64.
        teacher_logits: (n, V), likewise. An entry of -inf has no probability and adds nothing.

    Returns:
        (n,) sum_v p_v (log p_v - log q_v). Rounding can take it below zero by about 1e-7.
    """
    log_q = torch.log_softmax(student_logits, dim=-1)
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    p = log_p.exp()
    # 0 * (-inf - anything) would be NaN where the teacher gives no probability
    log_ratio = torch.where(p > 0, log_p - log_q, 0.0)
    return (p * log_ratio).sum(-1)


def forward_kl_from_difference(
    teacher_logits: Tensor,
    difference: Tensor,
    *,
    student_logits: Tensor | None = None,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) per row and its gradient, from the logits' difference.

    With D = z_student - z_teacher and D' = D - E_p[D]::

        KL    = log1p(E_p[expm1(D') - D'])      every term >= 0; exactly 0 for D = 0
        q - p = p * expm1(D' - KL)

    Neither cancels when the two distributions are close, as sum p (log p - log q) and q - p do.
    Rows where a log ratio is large (or not finite) use the plain formulas instead.
    Not differentiable; the gradient is what it returns.

    Args:
        teacher_logits: (n, V), divided by the temperature, float32 or float64.
        difference: (n, V) student minus teacher logits, likewise. Overwritten.
        student_logits: (n, V) for the rows that need the plain formulas; None: teacher_logits
            plus difference, which is right where the difference is finite.
        with_gradient: False: skip the gradient.

    Returns:
        KL (n,), and its gradient with respect to the student's logits (n, V) or None.
    """
    p = torch.softmax(teacher_logits, dim=-1)
    centred = difference.sub_(_row_dot(p, difference))
    # written so that NaN, from infinite logits, counts as unsafe too
    unsafe = ~(centred.amax(-1) <= _LARGEST_LOG_RATIO)
    plain: tuple[Tensor, Tensor] | None = None
    if bool(unsafe.any()):
        teacher_rows = teacher_logits[unsafe]
        plain = _plain_forward_kl(
            teacher_rows + centred[unsafe] if student_logits is None else student_logits[unsafe],
            teacher_rows,
        )
    excess = torch.expm1(centred).sub_(centred)
    # no term is negative, unless a device's expm1(x) rounds to below x
    kl = _row_dot(p, excess).clamp_(min=0).log1p_()
    gradient = centred.sub_(kl).expm1_().mul_(p) if with_gradient else None
    kl = kl.squeeze(-1)
    if plain is not None:
        kl[unsafe] = plain[0]
        if gradient is not None:
            gradient[unsafe] = plain[1]
    return kl, gradient


def _plain_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(student_logits, dim=-1)
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    p = log_p.exp()
    log_ratio = log_q - log_p
    kl = -(p * torch.where(p > 0, log_ratio, 0.0)).sum(-1)
    near = log_ratio.abs() < 1
    return kl.clamp(min=0), torch.where(near, p * torch.expm1(log_ratio), log_q.exp() - p)


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    # bmm needs no (n, V) product in between
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).squeeze(1)


def trim_vocabulary(name: str, size: int, vocab_size: int | None) -> int:
    """The vocabulary to use out of ``size`` entries of ``name``; raise if it has too few."""
    if vocab_size is None:
        return size
    if not 1 <= vocab_size <= size:
        raise ValueError(
            f"vocab_size: expected 1 to {size} (the vocabulary of {name}), got {vocab_size}; give "
            "the number of real tokens, without the padding"
        )
    return vocab_size


def kl_div_with_logits(
    input: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Forward KL between two sets of logits: the reference for the fused losses.

    KL(p || q) with p = softmax(teacher_logits / T), q = softmax(input / T), in float32 for
    half-precision input. Plain torch: autograd differentiates it, any number of times.

    Equals: ``F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)``, reduced; but
    right where both logits are -inf.

    Args:
        input: (B, L, V) or (n, V) the student's logits.
        teacher_logits: (B, L', V) or (n, V) the teacher's; detached.
        mask: (B, L) or (n,) boolean, the student's positions; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``. Each
            sequence needs as many as in ``mask``; they're paired in order.
        temperature: divides both logits.
        scale_by_temperature_squared: multiply value and gradient by temperature squared.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions.
        vocab_size: use only the first vocab_size entries of both; the rest is padding.

    Returns:
        A scalar, or (n,) in the order of the selected positions for reduction "none".

    Raises:
        TypeError: a mask isn't boolean, or logits aren't floating point.
        ValueError: shapes, counts or vocabularies don't fit, or an option is out of range.
    """
    check_reduction(reduction, num_items)
    check_temperature(temperature)
    student, teacher = select_pair(
        input, teacher_logits.detach(), mask, teacher_mask, names=("input", "teacher_logits")
    )
    student = student[:, : trim_vocabulary("input", student.shape[1], vocab_size)]
    teacher = teacher[:, : trim_vocabulary("teacher_logits", teacher.shape[1], vocab_size)]
    check_same_vocabulary("teacher_logits", student.shape[1], teacher.shape[1])
    dtype = accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    losses = forward_kl(student.to(dtype) / temperature, teacher.to(dtype) / temperature)
    if scale_by_temperature_squared:
        losses = losses * temperature**2
    return reduce_loss(losses, reduction, num_items)


def check_same_vocabulary(name: str, size: int, teacher_size: int) -> None:
    """Raise unless student and teacher have the same number of vocabulary entries."""
    if size != teacher_size:
        raise ValueError(
            f"{name}: expected the student's vocabulary of {size} entries, got {teacher_size}; "
            "pass vocab_size, the number of real tokens, if the rest is padding"
        )
