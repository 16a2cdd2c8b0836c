"""Every loss on a block of logits: values and gradient.

Letters: k rows, V vocabulary, K entries of an offline teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_losses.ratio_losses import log_ratio, ratio_loss
from kd_losses.row_losses import (
    Scratch,
    cross_entropy_rows,
    forward_kl_rows,
    topk_rows,
)

BOTH = "forward_kl+cross_entropy"


class Block(NamedTuple):
    """Some rows of a chunk; the logits are divided by the temperature and may be overwritten.

    Attributes:
        teacher: (k, V) logits or None.
        student: (k, V) logits or None.
        difference: (k, V) student minus teacher logits, known where both share a head, or None.
        extras: what else the loss needs: target, and in BOTH which rows have one and the factors;
            ids and log probabilities of an offline teacher.
        rounded: whether the logits have been rounded to half precision.
    """

    teacher: Tensor | None
    student: Tensor | None
    difference: Tensor | None
    extras: list[Tensor]
    rounded: bool


def losses_per_row(kind: str) -> int:
    """How many values ``block_losses`` gives for a row."""
    return 3 if kind == BOTH else 1


def block_losses(
    kind: str, parameter: float, block: Block, scratch: Scratch, with_gradient: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Losses of each row, and the gradient of the first with respect to the student's logits.

    Args:
        kind: a divergence, "cross_entropy", "topk_bucket", "topk_renormalize", or BOTH: the sum of
            KL and cross entropy times the factors of each row, then KL, then cross entropy.
        parameter: the teacher's share of the mixture in divergences that have one; of BOTH the
            temperature, which the cross entropy does without.
        block: the rows.
        scratch: gives (k, V) tensors to write to.
        with_gradient: False: the gradient is None.
    """
    if kind == "cross_entropy":
        assert block.student is not None
        value, gradient = cross_entropy_rows(
            block.student, block.extras[0], scratch, with_gradient=with_gradient
        )
        return [value], gradient
    if kind.startswith("topk"):
        assert block.student is not None
        value, gradient = topk_rows(
            block.student, *block.extras, tail=kind == "topk_bucket", with_gradient=with_gradient
        )
        return [value], gradient
    assert block.teacher is not None
    difference, student = block.difference, block.student
    if difference is None:
        assert student is not None
        difference = torch.sub(student, block.teacher, out=scratch(2))
    if kind == BOTH:
        return _both(parameter, block, difference, scratch, with_gradient)
    if kind == "forward_kl":
        value, gradient = forward_kl_rows(
            block.teacher, difference, scratch, student_logits=student,
            with_gradient=with_gradient, rounded=block.rounded,
        )  # fmt: skip
        return [value], gradient
    value, gradient = ratio_loss(kind, parameter, *log_ratio(block.teacher, difference, student))
    return [value], gradient if with_gradient else None


def _both(
    temperature: float, block: Block, difference: Tensor, scratch: Scratch, with_gradient: bool
) -> tuple[list[Tensor], Tensor | None]:
    teacher, student = block.teacher, block.student
    assert teacher is not None
    target, counts, factors = block.extras
    # a softmax more, but no product more: the student's logits are known already
    if student is None:
        logits = torch.add(teacher, difference, out=scratch(3))
    else:
        logits = scratch(3).copy_(student)
    # the cross entropy is that of the model as it speaks, at temperature 1
    if temperature != 1:
        logits.mul_(temperature)
    kl, gradient = forward_kl_rows(
        teacher, difference, scratch, student_logits=student, with_gradient=with_gradient,
        rounded=block.rounded,
    )  # fmt: skip
    ce, ce_gradient = cross_entropy_rows(logits, target, scratch, with_gradient=with_gradient)
    # where there is no target a word stands in, which may be forbidden, and 0 * inf is NaN
    ce = ce.masked_fill(~counts, 0)
    factors = factors.to(kl)
    total = torch.addcmul(factors[:, 0] * kl, factors[:, 1], ce)
    if gradient is not None and ce_gradient is not None:
        # of the logits over the temperature, as all gradients here
        gradient.mul_(factors[:, :1]).addcmul_(ce_gradient, factors[:, 1:], value=temperature)
    return [total, kl, ce], gradient
