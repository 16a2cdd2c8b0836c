"""Forward KL and cross entropy together, from one product of the student with its head.

Letters: B batch, L positions, n selected rows, H width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_losses.block_losses import BOTH
from kd_losses.frozen_head import frozen_head_losses
from kd_losses.fused_cross_entropy import check_target, linear_cross_entropy
from kd_losses.fused_divergence import linear_divergence, pair_heads
from kd_losses.head import (
    check_below_infinity,
    check_chunk_size,
    check_in_vocabulary,
    make_head,
    wants_gradient,
)
from kd_losses.reduction import accumulation_dtype, check_reduction, check_temperature, divisor
from kd_losses.selection import pick, select_pair


class KLAndCrossEntropy(NamedTuple):
    """What ``linear_kl_div_cross_entropy`` returns, scalars all.

    Attributes:
        loss: kl_weight * kl + cross_entropy_weight * cross_entropy; the one to differentiate.
        kl: the mean KL, detached.
        cross_entropy: the mean cross entropy, detached.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor


def linear_kl_div_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    target: Tensor,
    teacher_linear_weight: Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    num_items: float | Tensor | None = None,
    target_num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> KLAndCrossEntropy:
    """KL from a teacher and cross entropy of targets on the same positions.

    With a frozen head both come from the same logits: a softmax more than ``linear_kl_div``, no
    matrix product more, and still one (n, H) tensor for backward. A head that wants a gradient
    takes the way of the two single functions.

    Equals: ``kl_weight * linear_kl_div(...) + cross_entropy_weight * linear_cross_entropy(...)``

    Args:
        input: (B, L, H) or (n, H) the student's hidden states, as the head takes them.
        linear_weight: (V, H) the student's head, of input's dtype.
        teacher_input: (B, L', H') or (n, H') the teacher's hidden states; detached.
        target: (B, L) or (n,) int64, what input[t] shall predict, or ignore_index. Targets outside
            of the mask don't count.
        teacher_linear_weight: (V, H') the teacher's head; detached. None: the student's.
        kl_weight: factor of the KL.
        cross_entropy_weight: factor of the cross entropy.
        linear_bias: (V,) and all that is not named here: see ``linear_divergence``.
        teacher_linear_bias: (V,).
        softcap: of the student's logits.
        teacher_softcap: of the teacher's.
        mask: (B, L) or (n,) boolean, the student's positions; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``.
        ignore_index: the target of positions that only the KL counts.
        temperature: divides both logits in the KL; the cross entropy has none.
        scale_by_temperature_squared: multiply the KL by temperature squared.
        num_items: divides the KL instead of the number of selected positions.
        target_num_items: divides the cross entropy instead of the number of selected targets.
        vocab_size: use only the first vocab_size entries of both heads; the rest is padding.
        chunk_size: rows per matrix product; None chooses.

    Raises:
        TypeError: dtypes don't fit.
        ValueError: shapes, counts or vocabularies don't fit, an option is out of range, or, on a
            CPU, a logit is +inf.
    """
    for count in (num_items, target_num_items):
        check_reduction("mean", count)
    check_temperature(temperature)
    check_chunk_size(chunk_size)
    trainable = wants_gradient(linear_weight, linear_bias)
    in_graph = torch.compiler.is_compiling() and not trainable
    student, teacher, valid = select_pair(
        input, teacher_input.detach(), mask, teacher_mask, names=("input", "teacher_input"),
        in_graph=in_graph,
    )  # fmt: skip
    check_target(target, input)
    index = pick(target.unsqueeze(-1), mask, in_graph and valid is not None).squeeze(-1)
    counts = index != ignore_index
    if valid is not None:
        index, counts = index[: len(valid)], counts[: len(valid)] & valid
    head = make_head("linear_weight", linear_weight, linear_bias, student, vocab_size, softcap)
    shared, teacher_head = pair_heads(
        head,
        linear_weight,
        linear_bias,
        teacher_linear_weight,
        teacher_linear_bias,
        teacher_softcap,
        teacher,
        vocab_size,
    )
    index = torch.where(counts, index, 0)
    check_in_vocabulary("target", index, len(head.weight), " or ignore_index")
    squared = temperature**2 if scale_by_temperature_squared else 1.0
    # factors of the sums that make means of them
    one = student.new_ones((), dtype=accumulation_dtype(student.dtype))
    rows = len(student) if valid is None else valid.sum()
    kl_share = squared * one / divisor(num_items, rows, one)
    ce_share = one / divisor(target_num_items, counts.sum(), one)
    if trainable:
        kl = linear_divergence(
            student,
            linear_weight,
            teacher,
            teacher_linear_weight,
            divergence="forward_kl",
            linear_bias=linear_bias,
            teacher_linear_bias=teacher_linear_bias,
            softcap=softcap,
            teacher_softcap=teacher_softcap,
            temperature=temperature,
            reduction="none",
            vocab_size=vocab_size,
            chunk_size=chunk_size,
        )
        ce = linear_cross_entropy(
            student,
            linear_weight,
            torch.where(counts, index, ignore_index),
            linear_bias=linear_bias,
            softcap=softcap,
            ignore_index=ignore_index,
            reduction="none",
            vocab_size=vocab_size,
            chunk_size=chunk_size,
        )
        total = kl_weight * kl_share * kl + cross_entropy_weight * ce_share * ce
    else:
        kl_factors = (kl_weight * kl_share).expand(len(student))
        factors = torch.stack([kl_factors, cross_entropy_weight * ce_share * counts], dim=-1)
        total, kl, ce = frozen_head_losses(
            student,
            teacher,
            head,
            None if shared else teacher_head,
            kind=BOTH,
            parameter=temperature,
            temperature=temperature,
            chunk_size=chunk_size,
            extras=(index, counts, factors),
            valid=valid,
        )
    check_below_infinity(total, ("input", student, head), ("teacher_input", teacher, teacher_head))
    return KLAndCrossEntropy(
        total.sum(), kl.detach().sum() * kl_share, ce.detach().sum() * ce_share
    )
