"""Forward KL between two language models, fused with their heads.

Letters: B batch, L positions, n selected rows, H width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_losses.divergences import check_same_vocabulary, forward_kl, forward_kl_from_difference
from kd_losses.head import LinearHead, chunk_rows, make_head, scale_row_gradients
from kd_losses.reduction import (
    Reduction,
    accumulation_dtype,
    check_reduction,
    check_temperature,
    reduce_loss,
)
from kd_losses.selection import select_pair


class _FrozenHeadKL(torch.autograd.Function):
    """KL per row; the gradient of each row's KL is computed at once and alone is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        head: LinearHead,
        teacher_head: LinearHead | None,
        temperature: float,
        chunk_size: int,
        with_gradient: bool,
    ) -> Tensor:
        losses = student.new_empty(len(student), dtype=accumulation_dtype(head.weight.dtype))
        gradient = torch.empty_like(student) if with_gradient else None
        # the head is in autocast's dtype already; sums over the vocabulary must stay as they are
        with torch.autocast(student.device.type, enabled=False):
            for start in range(0, len(student), chunk_size):
                rows = slice(start, start + chunk_size)
                kl, logits_gradient = _chunk_kl(
                    student[rows], teacher[rows], head, teacher_head, temperature, with_gradient
                )
                losses[rows] = kl
                if gradient is not None and logits_gradient is not None:
                    gradient[rows] = head.pull_back(logits_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.temperature = temperature
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        grad_student = scale_row_gradients(gradient, grad_losses / ctx.temperature, "linear_kl_div")
        return grad_student, None, None, None, None, None, None


def _chunk_kl(
    student: Tensor,
    teacher: Tensor,
    head: LinearHead,
    teacher_head: LinearHead | None,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    if teacher_head is None:
        return forward_kl_from_difference(
            head.logits(teacher, temperature),
            # the bias cancels; subtracting before the product is what saves the small differences
            head.logits(student - teacher, temperature, with_bias=False),
            with_gradient=with_gradient,
        )
    student_logits = head.logits(student, temperature)
    teacher_logits = teacher_head.logits(teacher, temperature).to(student_logits.dtype)
    return forward_kl_from_difference(
        teacher_logits,
        student_logits - teacher_logits,
        student_logits=student_logits,
        with_gradient=with_gradient,
    )


def _trainable_head_kl(
    student: Tensor,
    teacher: Tensor,
    head: LinearHead,
    teacher_head: LinearHead,
    temperature: float,
    chunk_size: int,
) -> Tensor:
    def chunk_kl(student: Tensor, teacher: Tensor) -> Tensor:
        student_logits = head.logits(student, temperature)
        teacher_logits = teacher_head.logits(teacher, temperature)
        return forward_kl(student_logits, teacher_logits.to(student_logits.dtype))

    # the head's gradient needs the logits again: recompute them, a chunk at a time
    chunks = zip(torch.split(student, chunk_size), torch.split(teacher, chunk_size), strict=True)
    return torch.cat(
        [checkpoint(chunk_kl, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    )


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Forward KL from hidden states, without ever holding the logits of all positions.

    Per selected position KL(p || q), p = softmax(teacher logits / T), q = softmax(student
    logits / T). Only selected rows reach the head, a chunk at a time, and with a frozen head one
    (n, H) tensor is kept for backward.

    If teacher and student share the head (``teacher_linear_weight`` None), the difference of the
    hidden states goes through the head instead of that of two rounded logits: KL is never
    negative, exactly 0 for equal hidden states, and its bfloat16 gradient keeps its precision as
    KL gets small. If the student's head wants a gradient (weight or bias requires_grad), its
    logits are recomputed in backward, and the head gets its gradient too.

    Equals: ``kl_div_with_logits(F.linear(input, W, b), F.linear(teacher_input, Wt, bt), ...)``
    Source: arXiv 2405.19041 (BLSP-KD), which distils a model with a shared frozen head.

    Args:
        input: (B, L, H) or (n, H) the student's hidden states, as the head takes them.
        linear_weight: (V, H) the student's head, of input's dtype.
        teacher_input: (B, L', H') or (n, H') the teacher's hidden states; detached.
        teacher_linear_weight: (V, H') the teacher's head; detached. None: the student's head,
            with ``linear_bias`` unless ``teacher_linear_bias`` is given.
        linear_bias: (V,) the student's.
        teacher_linear_bias: (V,) the teacher's; detached.
        mask: (B, L) or (n,) boolean, the student's positions, see ``response_mask``; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``. Each
            sequence needs as many as in ``mask``; they're paired in order.
        temperature: divides both logits.
        scale_by_temperature_squared: multiply value and gradient by temperature squared.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions: the count of
            the whole global batch under gradient accumulation or data parallelism.
        vocab_size: use only the first vocab_size entries of both heads; the rest is padding.
        chunk_size: rows per chunk; None: 64 on a CPU, 1,024 elsewhere.

    Returns:
        A scalar, or (n,) in the order of the selected positions for reduction "none"; float32
        for half-precision input. If nothing is selected, a zero connected to the graph.

    Raises:
        TypeError: a mask isn't boolean, or dtypes don't fit.
        ValueError: shapes, counts or vocabularies don't fit, or an option is out of range.
    """
    check_reduction(reduction, num_items)
    check_temperature(temperature)
    student, teacher = select_pair(
        input, teacher_input.detach(), mask, teacher_mask, names=("input", "teacher_input")
    )
    head = make_head("linear_weight", linear_weight, linear_bias, student, vocab_size)
    shared = teacher_linear_weight is None and teacher_linear_bias is None
    # the student's head is checked against the teacher's rows too where it's shared
    teacher_head = make_head(
        "teacher_linear_weight",
        linear_weight if teacher_linear_weight is None else teacher_linear_weight,
        linear_bias if shared else teacher_linear_bias,
        teacher,
        vocab_size,
    ).detach()
    check_same_vocabulary(
        "teacher_linear_weight", head.weight.shape[0], teacher_head.weight.shape[0]
    )
    rows_per_chunk = chunk_rows(chunk_size, student.device)
    if torch.is_grad_enabled() and not head.frozen:
        losses = _trainable_head_kl(
            student, teacher, head, teacher_head, temperature, rows_per_chunk
        )
    else:
        losses = _FrozenHeadKL.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
            student,
            teacher,
            head,
            None if shared else teacher_head,
            temperature,
            rows_per_chunk,
            torch.is_grad_enabled() and student.requires_grad,
        )
    if scale_by_temperature_squared:
        losses = losses * temperature**2
    return reduce_loss(losses, reduction, num_items)
