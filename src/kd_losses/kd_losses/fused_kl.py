"""Forward KL between two language models, fused with their heads.

Letters: B batch, L positions, n selected rows, H width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from kd_losses.backends import Backend
from kd_losses.fused_divergence import linear_divergence
from kd_losses.reduction import Reduction


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_linear_weight: Tensor | None = None,
    *,
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
    """Forward KL from hidden states, without ever holding the logits of all positions.

    Per selected position KL(p || q), p = softmax(teacher logits / T), q = softmax(student
    logits / T). Only selected rows reach the head, a chunk at a time, and with a frozen head one
    (n, H) tensor is kept for backward.

    If teacher and student share the head (see ``linear_divergence``), the difference of the
    hidden states goes through the head instead of that of two rounded logits: KL is never
    negative, exactly 0 for equal hidden states, and its bfloat16 gradient keeps its precision as
    KL gets small. If the student's head wants a gradient (weight or bias requires_grad), its
    logits are recomputed in backward, and the head gets its gradient too.

    Equals: ``kl_div_with_logits(F.linear(input, W, b), F.linear(teacher_input, Wt, bt), ...)``
    Source: arXiv 2405.19041 (BLSP-KD), which distils a model with a shared frozen head.

    Args:
        input: (B, L, H) or (n, H) the student's hidden states, as the head takes them.
        linear_weight: (V, H) the student's head, of input's dtype.
        teacher_input: (B, L', H') or (n, H') the teacher's hidden states; detached. (n, H') beside
            an input (B, L, H): the selected positions' alone, as a cache has them.
        teacher_linear_weight: (V, H') the teacher's head; detached. None: the student's head.
        linear_bias: (V,) and all that follows: see ``linear_divergence``.
        teacher_linear_bias: (V,).
        softcap: of the student's logits.
        teacher_softcap: of the teacher's.
        mask: (B, L) or (n,) boolean, the student's positions, see ``response_mask``; None: all.
        teacher_mask: (B, L') or (n,) boolean, the teacher's positions; None: ``mask``.
        temperature: divides both logits.
        scale_by_temperature_squared: multiply value and gradient by temperature squared.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions.
        vocab_size: use only the first vocab_size entries of both heads; the rest is padding.
        chunk_size: rows per matrix product; None chooses.
        backend: "auto", "torch" or "triton".

    Returns:
        A scalar, or (n,) in the order of the selected positions for reduction "none"; float32
        for half-precision input. If nothing is selected, a zero connected to the graph.

    Raises:
        TypeError: a mask isn't boolean, or dtypes don't fit.
        ValueError: shapes, counts or vocabularies don't fit, an option is out of range, or, on a
            CPU, a logit is +inf.
    """
    return linear_divergence(
        input,
        linear_weight,
        teacher_input,
        teacher_linear_weight,
        divergence="forward_kl",
        linear_bias=linear_bias,
        teacher_linear_bias=teacher_linear_bias,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        mask=mask,
        teacher_mask=teacher_mask,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        reduction=reduction,
        num_items=num_items,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        backend=backend,
    )
