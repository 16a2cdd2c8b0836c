"""Divergences as functions of the log ratio r = log q - log p, and their gradients.

Letters: k rows, V vocabulary. p is the teacher's distribution, q the student's.

A divergence of close distributions is second order in r, while its usual formula is a sum of first
order terms that cancel. Each formula here sums terms of second order instead. For any r:
E_p[expm1(r)] = 0 and E_q[expm1(-r)] = 0; that much may be added.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 50.0


def log_ratio(
    teacher_logits: Tensor, difference: Tensor, student_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and r from the logits' difference, without cancellation where r is small.

    Args:
        teacher_logits: (k, V), divided by the temperature, float32 or float64.
        difference: (k, V) student minus teacher logits, likewise. Overwritten.
        student_logits: (k, V) for rows with large ratios, None: the sum of the other two.

    Returns:
        p, q and r, (k, V) each; r is 0 where neither distribution has any probability.
    """
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    p = log_p.exp()
    centred = difference.sub_((p * difference).sum(-1, keepdim=True))
    # written so that NaN, from infinite logits, counts as unsafe too
    unsafe = ~(centred.abs().amax(-1) <= _LARGEST_LOG_RATIO)
    plain = None
    if bool(unsafe.any()):
        teacher = teacher_logits[unsafe]
        student = teacher + centred[unsafe] if student_logits is None else student_logits[unsafe]
        plain = plain_log_ratio(teacher, student)
    growth = (p * (torch.expm1(centred) - centred)).sum(-1, keepdim=True)
    ratio = centred.sub_(growth.clamp_(min=0).log1p_())
    log_q = log_p + ratio
    if plain is not None:
        _, log_q[unsafe], ratio[unsafe] = plain
    return p, log_q.exp_(), ratio


def plain_log_ratio(
    teacher_logits: Tensor, student_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and r, which is 0 where neither has any probability."""
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    log_q = torch.log_softmax(student_logits, dim=-1)
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
    return log_p, log_q, (log_q - log_p).masked_fill(nowhere, 0.0)


def ratio_loss(
    kind: str, share: float, p: Tensor, q: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """One divergence, m being share * p + (1 - share) * q.

    Args:
        kind: "reverse_kl": KL(q || p). "jsd": share * KL(p || m) + (1 - share) * KL(q || m).
            "skew_kl": KL(p || m). "skew_reverse_kl": KL(q || m). "tvd": sum |p - q| / 2.
        share: of the teacher in the mixture.
        p: (k, V); q: (k, V); ratio: (k, V) log q - log p.

    Returns:
        The losses (k,), and the gradient with respect to the student's logits (k, V).
    """
    if kind == "reverse_kl":
        # sum of q r + p - q
        small = q * (torch.expm1(-ratio.clamp(-1, 1)) + ratio)
        large = p - q + torch.where(q > 0, q * ratio, 0.0)
        loss = _sum(ratio, small, large)
        return loss, q * (torch.where(q > 0, ratio, 0.0) - loss.unsqueeze(-1))
    if kind == "tvd":
        change = torch.where(ratio.abs() < 1, p * torch.expm1(ratio.clamp(-1, 1)), q - p)
        return change.abs().sum(-1) / 2, _through_softmax(q, change.sign() / 2)
    if kind == "skew_kl":
        loss, log_over_p = _from_mixture(p, q, ratio, share)
        return loss, _through_softmax(q, -(1 - share) * torch.expm1(-log_over_p))
    loss, log_over_q = _from_mixture(q, p, -ratio, 1 - share)
    if kind == "skew_reverse_kl":
        slope = -log_over_q - (1 - share) * torch.expm1(-log_over_q)
        return loss, _through_softmax(q, slope)
    # "jsd": how m changes adds nothing
    teacher_loss, _ = _from_mixture(p, q, ratio, share)
    total = share * teacher_loss + (1 - share) * loss
    return total, _through_softmax(q, -(1 - share) * log_over_q)


def _from_mixture(p: Tensor, q: Tensor, ratio: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = share * p + (1 - share) * q, (k,), and log(m / p), (k, V)."""
    rest = 1 - share
    near = torch.log1p(rest * torch.expm1(ratio.clamp(max=1)))
    log_m = torch.where(ratio > 1, ratio + torch.log(rest + share * torch.exp(-ratio)), near)
    small = p * (rest * torch.expm1(ratio.clamp(-1, 1)) - log_m)
    large = rest * (q - p) - torch.where(p > 0, p * log_m, 0.0)
    return _sum(ratio, small, large), log_m


def _sum(ratio: Tensor, small: Tensor, large: Tensor) -> Tensor:
    return torch.where(ratio.abs() < 1, small, large).sum(-1).clamp(min=0)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient of the logits, from that of the probabilities; where q is 0 it is 0."""
    weighted = torch.where(q > 0, q * slope, 0.0)
    return weighted - q * weighted.sum(-1, keepdim=True)
