"""Divergences between two language models, fused with their heads.

Letters: B batch, L positions, n selected rows, H width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_losses.backends import Backend, resolve
from kd_losses.divergences import Divergence, check_divergence, check_same_vocabulary, plain
from kd_losses.frozen_head import frozen_head_losses
from kd_losses.head import (
    LinearHead,
    check_below_infinity,
    check_bias,
    check_chunk_size,
    check_softcap,
    chunk_rows,
    gathered,
    make_head,
    wants_gradient,
)
from kd_losses.reduction import Reduction, check_reduction, check_temperature, reduce_loss
from kd_losses.selection import select_pair
from kd_losses.triton_rows import why_not_dtype


def _trainable_head_losses(
    student: Tensor,
    teacher: Tensor,
    head: LinearHead,
    teacher_head: LinearHead,
    *,
    kind: str,
    share: float,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    def chunk_losses(student: Tensor, teacher: Tensor) -> Tensor:
        student_logits = head.logits(student, temperature)
        teacher_logits = teacher_head.logits(teacher, temperature)
        return plain(kind, share, student_logits, teacher_logits.to(student_logits.dtype))

    # the head's gradient needs the logits again: recompute them, a chunk at a time
    rows = chunk_rows(chunk_size, len(student), student.device)
    chunks = zip(torch.split(student, rows), torch.split(teacher, rows), strict=True)
    return torch.cat(
        [
            checkpoint(chunk_losses, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    )


def linear_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor | None = None,
    *,
    divergence: Divergence,
    mixture: float | None = None,
    linear_bias: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """A divergence from hidden states, without ever holding the logits of all positions.

    Per selected position the divergence of p = softmax(teacher logits / T) and q = softmax(student
    logits / T). Only selected rows reach the head, a chunk at a time, and with a frozen head one
    (n, H) tensor is kept for backward.

    If teacher and student share the head (``teacher_linear_weight`` None or the very tensor
    ``linear_weight``, the same bias, no soft cap), the difference of the hidden states goes through
    the head instead of that of two rounded logits: the divergence is never negative, exactly 0 for
    equal hidden states, and its bfloat16 gradient keeps its precision as it gets small. If the
    student's head wants a gradient (weight or bias requires_grad), its logits are recomputed in
    backward, and the head gets its gradient too.

    Equals: ``divergence_with_logits(F.linear(input, W, b), F.linear(teacher_input, Wt, bt), ...)``

    Args:
        input: (B, L, H) or (n, H) the student's hidden states, as the head takes them.
        linear_weight: (V, H) the student's head, of input's dtype. A sharded one is gathered once.
        teacher_input: (B, L', H') or (n, H') the teacher's hidden states; detached. (n, H') beside
            an input (B, L, H): the selected positions' alone, in their order, as a cache has them.
            Cast to the head's dtype if stored in another.
        teacher_linear_weight: (V, H') the teacher's head; detached. None: the student's head,
            with ``linear_bias`` unless ``teacher_linear_bias`` is given.
        divergence: "forward_kl": KL(p || q). "reverse_kl": KL(q || p). With the mixture
            m = w p + (1 - w) q, "jsd": w KL(p || m) + (1 - w) KL(q || m), "skew_kl": KL(p || m),
            "skew_reverse_kl": KL(q || m). "tvd": sum |p - q| / 2.
        mixture: w, the teacher's share of m; None: 0.5, 0.1 and 0.9 in this order.
        linear_bias: (V,) the student's.
        teacher_linear_bias: (V,) the teacher's; detached.
        softcap: the student's logits become softcap * tanh(logits / softcap) before T divides them.
        teacher_softcap: the teacher's; None: ``softcap`` where the head is shared, else none.
        mask: (B, L) or (n,) boolean, the student's positions, see ``response_mask``; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``. Each
            sequence needs as many as in ``mask``; they're paired in order.
        temperature: T, divides both logits.
        scale_by_temperature_squared: multiply value and gradient by temperature squared.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions: the count of
            the whole global batch under gradient accumulation or data parallelism. Less than 1
            counts as 1.
        vocab_size: use only the first vocab_size entries of both heads; the rest is padding.
        chunk_size: rows per matrix product; None: at most 128 on a CPU, 1,024 elsewhere.
        backend: for the passes over the logits. "triton" works on forward KL with a frozen head
            without soft cap on a GPU; "auto" takes it where it works.

    Returns:
        A scalar, or (n,) in the order of the selected positions for reduction "none"; float32
        for half-precision input. If nothing is selected, a zero connected to the graph.

    Raises:
        TypeError: a mask isn't boolean, or dtypes don't fit.
        ValueError: shapes, counts or vocabularies don't fit, an option is out of range, or the
            backend can't run. On a CPU: a logit is +inf, of which there is no softmax; elsewhere
            and under torch.compile the loss is NaN then.
    """
    check_reduction(reduction, num_items)
    check_temperature(temperature)
    check_chunk_size(chunk_size)
    share = check_divergence(divergence, mixture)
    trainable = wants_gradient(linear_weight, linear_bias)
    student, teacher, valid = select_pair(
        input, teacher_input.detach(), mask, teacher_mask, names=("input", "teacher_input"),
        in_graph=torch.compiler.is_compiling() and not trainable and reduction != "none",
    )  # fmt: skip
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
    chosen = resolve(backend, student.device, _why_not_kernels(divergence, head, trainable))
    if trainable:
        losses = _trainable_head_losses(
            student,
            teacher,
            head,
            teacher_head,
            kind=divergence,
            share=share,
            temperature=temperature,
            chunk_size=chunk_size,
        )
    else:
        losses = frozen_head_losses(
            student,
            teacher,
            head,
            None if shared else teacher_head,
            kind=divergence,
            parameter=share,
            temperature=temperature,
            chunk_size=chunk_size,
            backend=chosen,
            valid=valid,
        )[0]
    check_below_infinity(losses, ("input", student, head), ("teacher_input", teacher, teacher_head))
    if scale_by_temperature_squared:
        losses = losses * temperature**2
    return reduce_loss(losses, reduction, num_items, valid)


def _why_not_kernels(divergence: str, head: LinearHead, trainable: bool) -> str | None:
    if divergence != "forward_kl":
        return f"the kernels know forward_kl, not {divergence}"
    if trainable:
        return "the head wants a gradient, and the kernels compute none for it"
    if head.softcap is not None:
        return "the kernels know no soft cap"
    return why_not_dtype(head.weight.dtype)


def pair_heads(
    head: LinearHead,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    teacher: Tensor,
    vocab_size: int | None,
) -> tuple[bool, LinearHead]:
    """The teacher's head beside the student's.

    Args:
        head: the student's, made from ``weight`` and ``bias``.
        weight: (V, H).
        bias: (V,) or None.
        teacher_weight: (V, H') or None: the student's.
        teacher_bias: (V,) or None: the student's if ``teacher_weight`` is None.
        teacher_softcap: None: the student's if ``teacher_weight`` is None.
        teacher: (n, H').
        vocab_size: keep the first vocab_size entries.

    Returns:
        Whether teacher and student differ by their hidden states alone, such that the difference
        may go through the head; and the teacher's head, detached.
    """
    if teacher_weight is None:
        teacher_weight = weight
        teacher_bias = bias if teacher_bias is None else teacher_bias
        teacher_softcap = head.softcap if teacher_softcap is None else teacher_softcap
    one_weight, one_bias = teacher_weight is weight, teacher_bias is bias
    if one_weight and head.weight.shape[1] == teacher.shape[1]:
        # gathered, trimmed and cast already
        own_bias = head.bias if one_bias else teacher_bias
        if own_bias is not None and not one_bias:
            check_bias("teacher_linear_bias", own_bias, weight)
            own_bias = gathered(own_bias)[: len(head.weight)]
        check_softcap("teacher_softcap", teacher_softcap)
        teacher_head = LinearHead(head.weight, own_bias, teacher_softcap).detach()
    else:
        teacher_head = make_head(
            "teacher_linear_weight",
            teacher_weight,
            teacher_bias,
            teacher.to(teacher_weight.dtype),
            vocab_size,
            teacher_softcap,
        ).detach()
    check_same_vocabulary("teacher_linear_weight", len(head.weight), len(teacher_head.weight))
    no_softcap = head.softcap is None and teacher_softcap is None
    return one_weight and one_bias and no_softcap, teacher_head
