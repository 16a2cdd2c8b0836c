"""Cross entropy fused with a head.

Letters: B batch, L positions, n rows, H width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kd_losses.frozen_head import frozen_head_losses
from kd_losses.head import (
    LinearHead,
    check_below_infinity,
    check_chunk_size,
    check_in_vocabulary,
    chunk_rows,
    make_head,
    wants_gradient,
)
from kd_losses.reduction import (
    Reduction,
    check_reduction,
    check_temperature,
    reduce_loss,
)
from kd_losses.selection import check_rows, in_front, selected


def _trainable_head_cross_entropy(
    rows: Tensor, target: Tensor, head: LinearHead, temperature: float, chunk_size: int | None
) -> Tensor:
    def chunk_loss(rows: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(rows, temperature), target, reduction="none")

    # the head's gradient needs the logits again: recompute them, a chunk at a time
    size = chunk_rows(chunk_size, len(rows), rows.device)
    chunks = zip(torch.split(rows, size), torch.split(target, size), strict=True)
    return torch.cat(
        [checkpoint(chunk_loss, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy from hidden states, without ever holding the logits of all positions.

    Only rows that have a target reach the head, a chunk at a time; with a frozen head one (n, H)
    tensor is kept for backward. If the head wants a gradient (weight or bias requires_grad), its
    logits are recomputed in backward, and the head gets its gradient too.

    Nothing is shifted here: target[t] is what input[t] shall predict. From labels that stand where
    their tokens stand: ``mask = response_mask(labels)``, then ``input[mask]`` and
    ``labels.roll(-1, dims=-1)[mask]``.

    Equals: ``F.cross_entropy(F.linear(input, W, b) / T, target)`` over flattened positions, but a
    zero connected to the graph, not NaN, if no row has a target.

    Args:
        input: (B, L, H) or (n, H) hidden states, as the head takes them.
        linear_weight: (V, H) the head, of input's dtype.
        target: (B, L) or (n,) int64 indices into the vocabulary, or ignore_index.
        linear_bias: (V,) or None.
        softcap: logits become softcap * tanh(logits / softcap), before the temperature.
        ignore_index: the target of rows that don't count.
        temperature: divides the logits.
        reduction: "mean" over the rows that count, "sum", or "none".
        num_items: with "mean", divides instead of the number of rows that count: that of the
            whole global batch under gradient accumulation or data parallelism.
        vocab_size: use only the first vocab_size entries of the head; the rest is padding.
        chunk_size: rows per matrix product; None: at most 128 on a CPU, 1,024 elsewhere.

    Returns:
        A scalar, or a loss of target's shape, 0 where ignored, for reduction "none"; float32 for
        half-precision input.

    Raises:
        TypeError: dtypes don't fit.
        ValueError: shapes don't fit, an option is out of range, or (checked on a CPU only, where it
            costs no synchronisation) a target isn't in the vocabulary or a logit is +inf.
    """
    check_reduction(reduction, num_items)
    check_temperature(temperature)
    check_chunk_size(chunk_size)
    check_rows("input", input)
    check_target(target, input)
    counts = target != ignore_index
    trainable = wants_gradient(linear_weight, linear_bias)
    valid = None
    if torch.compiler.is_compiling() and not trainable:
        order, valid = in_front(counts)
        rows = input.flatten(0, -2)[order]
        index = torch.where(valid, target.flatten()[order], 0)
    else:
        rows, index = selected(input, counts), selected(target, counts)
    head = make_head("linear_weight", linear_weight, linear_bias, rows, vocab_size, softcap)
    check_in_vocabulary("target", index, len(head.weight), " or ignore_index")
    if trainable:
        losses = _trainable_head_cross_entropy(rows, index, head, temperature, chunk_size)
    else:
        losses = frozen_head_losses(
            rows,
            None,
            head,
            None,
            kind="cross_entropy",
            temperature=temperature,
            chunk_size=chunk_size,
            extras=(index,),
            valid=valid,
        )[0]
    check_below_infinity(losses, ("input", rows, head))
    if reduction == "none":
        # takes as many as there are True, from the front
        return losses.new_zeros(target.shape).masked_scatter(counts, losses)
    return reduce_loss(losses, reduction, num_items, valid)


def check_target(target: Tensor, input: Tensor) -> None:
    """Raise unless ``target`` has an int64 index for each position of ``input`` (..., H)."""
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 indices, got {target.dtype}; pass target.long()")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: expected the leading shape of input {tuple(input.shape[:-1])}, got "
            f"{tuple(target.shape)}; one index per position"
        )
