"""Losses of rows of logits together with their gradients, in as few passes as it takes.

Letters: k rows, V vocabulary. p is the teacher's distribution, q the student's, r = log q - log p.

What is called `difference` holds student minus teacher logits. Where both share a head it comes
out of one matrix product and is exact although it is small; everything here then stays exact too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kd_losses.ratio_losses import plain_log_ratio

# exp(50) is far inside float32's range, and a p lost to underflow (below 1e-38) that is multiplied
# by it is still far below rounding; and where a ratio is larger there is no cancellation to avoid.
_LARGEST_LOG_RATIO = 50.0
_LOG2_E = math.log2(math.e)

Scratch = Callable[[int], Tensor]


def forward_kl_rows(
    teacher_logits: Tensor,
    difference: Tensor,
    scratch: Scratch,
    *,
    student_logits: Tensor | None = None,
    with_gradient: bool = True,
    rounded: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """KL(p || q) per row and its gradient, from the logits' difference.

    With D = difference and D' = D - E_p[D]::

        KL    = log1p(E_p[expm1(D') - D'])      every term >= 0; exactly 0 for D = 0
        q - p = p * expm1(D' - KL) = p * (expm1(D') exp(-KL) + expm1(-KL))

    Neither cancels when the two distributions are close, as sum p (log p - log q) and q - p do.
    Rows where a log ratio is large (or not finite) use the plain formulas instead.

    Args:
        teacher_logits: (k, V), divided by the temperature, float32 or float64. Overwritten.
        difference: (k, V), likewise. Overwritten.
        scratch: gives tensors like these two to write to; the same for the same number.
        student_logits: (k, V) for the rows that need the plain formulas; None: teacher_logits
            plus difference, which is right where the difference is finite.
        with_gradient: False: skip the gradient.
        rounded: True: the logits have been rounded to half precision. expm1 is then taken from
            exp2, in a third of the time, which leaves an error of at most 1e-7 in KL.

    Returns:
        KL (k,), and its gradient with respect to the student's logits (k, V) or None.
    """
    p = torch.softmax(teacher_logits, -1, out=scratch(0))
    products = torch.mul(p, difference, out=scratch(1))
    centred = difference.sub_(products.sum(-1, keepdim=True))
    # written so that NaN, from infinite logits, counts as unsafe too
    unsafe = ~(centred.amax(-1) <= _LARGEST_LOG_RATIO)
    plain: tuple[Tensor, Tensor] | None = None
    if bool(unsafe.any()):
        teacher_rows = teacher_logits[unsafe]
        log_p, log_q, ratio = plain_log_ratio(
            teacher_rows,
            teacher_rows + centred[unsafe] if student_logits is None else student_logits[unsafe],
        )
        plain = _plain_forward_kl(log_p, log_q, ratio)
    if rounded:
        grown = torch.exp2(centred.mul_(_LOG2_E), out=centred).sub_(1)
        excess = torch.mul(grown, p, out=products)
    else:
        grown = torch.expm1(centred, out=teacher_logits)
        excess = torch.sub(grown, centred, out=products).mul_(p)
    # no exact sum is negative
    kl = excess.sum(-1, keepdim=True).clamp_(min=0).log1p_()
    gradient = None
    if with_gradient:
        grown.mul_(kl.neg().exp_()).add_(kl.neg().expm1_())
        gradient = torch.mul(grown, p, out=centred)
    kl = kl.squeeze(-1)
    if plain is not None:
        kl[unsafe] = plain[0]
        if gradient is not None:
            gradient[unsafe] = plain[1]
    return kl, gradient


def _plain_forward_kl(log_p: Tensor, log_q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    kl = -(p * torch.where(p > 0, ratio, 0.0)).sum(-1)
    near = ratio.abs() < 1
    return kl.clamp(min=0), torch.where(near, p * torch.expm1(ratio), log_q.exp() - p)


def cross_entropy_rows(
    student_logits: Tensor, target: Tensor, scratch: Scratch, *, with_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy per row and its gradient.

    Args:
        student_logits: (k, V), divided by the temperature, float32 or float64. Overwritten.
        target: (k,) int64.
        scratch: as for ``forward_kl_rows``.
        with_gradient: False: skip the gradient.

    Returns:
        The losses (k,), and the gradient (k, V) or None.
    """
    index = target.unsqueeze(-1)
    log_q = torch.log_softmax(student_logits, -1, out=scratch(0))
    log_target = log_q.gather(-1, index)
    losses = log_target.squeeze(-1).neg()
    if not with_gradient:
        return losses, None
    gradient = torch.exp(log_q, out=student_logits)
    # q - 1 where the model is sure would cancel
    return losses, gradient.scatter_(-1, index, log_target.expm1())


def topk_rows(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    *,
    tail: bool,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """KL of a teacher of whom only the likeliest entries are known, and its gradient.

    Args:
        student_logits: (k, V), divided by the temperature, float32 or float64.
        ids: (k, K) int64, different within a row.
        log_probs: (k, K) the teacher's.
        tail: True: all other entries together are one more entry, whose probability is the rest.
            False: the known ones are divided by their sum, the others have no probability.
        with_gradient: False: skip the gradient.

    Returns:
        KL (k,), and its gradient (k, V) or None.
    """
    log_q = torch.log_softmax(student_logits, dim=-1)
    log_p = log_probs.to(log_q)
    if not tail:
        log_p = torch.log_softmax(log_p, dim=-1)
    p = log_p.exp()
    known = log_q.gather(-1, ids)
    losses = torch.where(p > 0, p * (log_p - known), 0.0).sum(-1)
    rest = (1 - p.sum(-1)).clamp(min=0)
    # log q of all that is not known; summed afresh, as 1 - sum q would cancel
    log_rest_q = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    # where the student can say none of the others, what is left over of the rest is rounding
    has_rest = (rest > 0) & (log_rest_q > -torch.inf) if tail else torch.zeros_like(rest).bool()
    log_ratio = torch.where(has_rest, rest.clamp(min=1e-30).log() - log_rest_q, 0.0)
    losses = losses + rest * log_ratio
    if not with_gradient:
        return losses, None
    gradient = log_q.exp()
    at_known = torch.where(p > 0, -torch.expm1(log_p - known), 1.0) * known.exp()
    if tail:
        gradient.mul_(torch.where(has_rest, -torch.expm1(log_ratio), 1.0).unsqueeze(-1))
    return losses, gradient.scatter_(-1, ids, at_known)
