"""Divergences between rows of logits, without any head, in plain differentiable torch.

Letters: B batch, L positions, n selected rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

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

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
# the teacher's share of the mixture; DistiLLM (arXiv 2402.03898) skews by 0.1
_SHARES = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.9}


def check_divergence(divergence: str, mixture: float | None) -> float:
    """The teacher's share of the mixture, 0 without one; raise if the two don't fit."""
    if divergence not in get_args(Divergence):
        raise ValueError(
            f"divergence: expected one of {', '.join(get_args(Divergence))}, got {divergence!r}"
        )
    if mixture is None:
        return _SHARES.get(divergence, 0.0)
    if divergence not in _SHARES:
        raise ValueError(
            f"mixture: it is for {', '.join(_SHARES)}, got divergence={divergence!r}; drop it"
        )
    if not 0 < mixture < 1:
        raise ValueError(
            f"mixture: expected a number between 0 and 1, got {mixture}; it is the teacher's share"
        )
    return mixture


def plain(kind: str, share: float, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """A divergence per row, as its formula reads.

    Args:
        kind: a ``Divergence``.
        share: the teacher's, of the mixture.
        student_logits: (n, V), divided by the temperature, float32 or float64.
        teacher_logits: (n, V), likewise. Where both are -inf nothing is added.

    Returns:
        (n,). Rounding can take it below zero by about 1e-7.
    """
    log_q = torch.log_softmax(student_logits, dim=-1)
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    # logaddexp(-inf, -inf) has no gradient
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
    least = torch.finfo(log_q.dtype).min / 4
    log_p, log_q = log_p.masked_fill(nowhere, least), log_q.masked_fill(nowhere, least)
    log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    if kind == "skew_kl":
        return _kl(log_p, log_m)
    if kind == "skew_reverse_kl":
        return _kl(log_q, log_m)
    return share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # 0 * (-inf - anything) would be NaN where there is no probability
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


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


def divergence_with_logits(
    input: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: Divergence,
    mixture: float | None = None,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """A divergence between two sets of logits: the reference for the fused losses.

    Of p = softmax(teacher_logits / T) and q = softmax(input / T), in float32 for half-precision
    input. Plain torch: autograd differentiates it, any number of times.

    Args:
        input: (B, L, V) or (n, V) the student's logits.
        teacher_logits: (B, L', V) or (n, V) the teacher's; detached.
        divergence: see ``linear_divergence``.
        mixture: likewise.
        mask: (B, L) or (n,) boolean, the student's positions; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``. Each
            sequence needs as many as in ``mask``; they're paired in order.
        temperature: divides both logits.
        scale_by_temperature_squared: multiply value and gradient by temperature squared.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions.
        vocab_size: use only the first vocab_size entries of both; the rest is padding.

    Returns:
        A scalar, or (n,) in the order of the selected positions for reduction "none". NaN where a
        logit is +inf, of which there is no softmax; -inf forbids a word.

    Raises:
        TypeError: a mask isn't boolean, or logits aren't floating point.
        ValueError: shapes, counts or vocabularies don't fit, or an option is out of range.
    """
    check_reduction(reduction, num_items)
    check_temperature(temperature)
    share = check_divergence(divergence, mixture)
    student, teacher, _ = select_pair(
        input, teacher_logits.detach(), mask, teacher_mask, names=("input", "teacher_logits")
    )
    student = student[:, : trim_vocabulary("input", student.shape[1], vocab_size)]
    teacher = teacher[:, : trim_vocabulary("teacher_logits", teacher.shape[1], vocab_size)]
    check_same_vocabulary("teacher_logits", student.shape[1], teacher.shape[1])
    dtype = accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    losses = plain(
        divergence, share, student.to(dtype) / temperature, teacher.to(dtype) / temperature
    )
    if scale_by_temperature_squared:
        losses = losses * temperature**2
    return reduce_loss(losses, reduction, num_items)


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
        mask: (B, L) or (n,) boolean and all that follows: see ``divergence_with_logits``, as for
            what is returned and raised.
        teacher_mask: (B, L') or (n,) boolean.
    """
    return divergence_with_logits(
        input,
        teacher_logits,
        divergence="forward_kl",
        mask=mask,
        teacher_mask=teacher_mask,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        reduction=reduction,
        num_items=num_items,
        vocab_size=vocab_size,
    )


def check_same_vocabulary(name: str, size: int, teacher_size: int) -> None:
    """Raise unless student and teacher have the same number of vocabulary entries."""
    if size != teacher_size:
        raise ValueError(
            f"{name}: expected the student's vocabulary of {size} entries, got {teacher_size}; "
            "pass vocab_size, the number of real tokens, if the rest is padding"
        )
