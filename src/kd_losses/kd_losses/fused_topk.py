"""Forward KL from an offline teacher of whom the likeliest entries are known.

Letters: B batch, L positions, n selected rows, H width, V vocabulary, K entries.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_losses.frozen_head import frozen_head_losses
from kd_losses.head import (
    check_below_infinity,
    check_chunk_size,
    check_in_vocabulary,
    chunk_rows,
    make_head,
    wants_gradient,
)
from kd_losses.reduction import Reduction, check_reduction, check_temperature, reduce_loss
from kd_losses.selection import pick, select_pair

Tail = Literal["bucket", "renormalize"]


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    tail: Tail = "bucket",
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """KL(p || q) where only the K likeliest entries of p have been stored.

    It is smaller than the KL of the whole p (data processing inequality) and its gradient is
    biased: a cache of the teacher's hidden states, given to ``linear_kl_div``, is exact.

    Args:
        input: (B, L, H) or (n, H) the student's hidden states, as the head takes them.
        linear_weight: (V, H) the student's head, of input's dtype.
        topk_ids: (B, L, K) or (n, K) int64, different within a position. (n, K) beside an input
            (B, L, H): the selected positions' alone.
        topk_logprobs: likewise, floating point: the teacher's log probabilities, after its own
            softmax over the whole vocabulary and after its temperature.
        tail: "bucket": all other entries count as one, with what is left of the probability. That
            is taken for rounding, and is dropped, where the student can say none of the others.
            "renormalize": the K probabilities are divided by their sum, the others are 0.
        linear_bias: (V,) or None.
        softcap: logits become softcap * tanh(logits / softcap), before the temperature.
        mask: (B, L) or (n,) boolean, the positions that count; None: all.
        temperature: divides the student's logits. The teacher's log probabilities have to be of
            the same temperature: they can't be brought to another.
        scale_by_temperature_squared: multiply value and gradient by temperature squared.
        reduction: "mean" over the selected positions, "sum", or "none".
        num_items: with "mean", divides instead of the number of selected positions.
        vocab_size: use only the first vocab_size entries of the head; the rest is padding.
        chunk_size: rows per matrix product; None: at most 128 on a CPU, 1,024 elsewhere.

    Returns:
        A scalar, or (n,) in the order of the selected positions for reduction "none".

    Raises:
        TypeError: a mask isn't boolean, ids aren't int64, or dtypes don't fit.
        ValueError: shapes don't fit, an option is out of range, or, on a CPU, an id isn't in the
            vocabulary or a logit is +inf.
    """
    check_reduction(reduction, num_items)
    check_temperature(temperature)
    check_chunk_size(chunk_size)
    if tail not in get_args(Tail):
        raise ValueError(f"tail: expected one of {', '.join(get_args(Tail))}, got {tail!r}")
    if topk_ids.dtype != torch.int64:
        raise TypeError(f"topk_ids: expected int64, got {topk_ids.dtype}; pass topk_ids.long()")
    if topk_ids.shape != topk_logprobs.shape:
        raise ValueError(
            f"topk_ids and topk_logprobs: expected the same shape, got {tuple(topk_ids.shape)} and "
            f"{tuple(topk_logprobs.shape)}"
        )
    trainable = wants_gradient(linear_weight, linear_bias)
    in_graph = torch.compiler.is_compiling() and not trainable and reduction != "none"
    names = ("input", "topk_logprobs")
    rows, log_probs, valid = select_pair(
        input, topk_logprobs.detach(), mask, None, names=names, in_graph=in_graph
    )
    flat = topk_ids.ndim == 2 and input.ndim == 3
    ids = topk_ids if flat else pick(topk_ids, mask, in_graph)
    head = make_head("linear_weight", linear_weight, linear_bias, rows, vocab_size, softcap)
    check_in_vocabulary("topk_ids", ids, len(head.weight))
    if trainable:
        whole = tail == "bucket"

        def chunk_losses(rows: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
            return _plain_topk(head.logits(rows, temperature), ids, log_probs, whole)

        size = chunk_rows(chunk_size, len(rows), rows.device)
        parts = zip(rows.split(size), ids.split(size), log_probs.split(size), strict=True)
        losses = torch.cat(
            [
                checkpoint(chunk_losses, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        )
    else:
        losses = frozen_head_losses(
            rows,
            None,
            head,
            None,
            kind=f"topk_{tail}",
            temperature=temperature,
            chunk_size=chunk_size,
            extras=(ids, log_probs),
            valid=valid,
        )[0]
    check_below_infinity(losses, ("input", rows, head))
    if scale_by_temperature_squared:
        losses = losses * temperature**2
    return reduce_loss(losses, reduction, num_items, valid)


def _plain_topk(logits: Tensor, ids: Tensor, log_probs: Tensor, whole: bool) -> Tensor:
    """The same, differentiable: the known entries, and what is left as one entry more."""
    log_q = torch.log_softmax(logits, dim=-1)
    log_p = log_probs.to(log_q)
    known = log_q.gather(-1, ids)
    if not whole:
        log_p = torch.log_softmax(log_p, dim=-1)
    p = log_p.exp()
    losses = torch.where(p > 0, p * (log_p - known), 0.0).sum(-1)
    if not whole:
        return losses
    rest = (1 - p.sum(-1)).clamp(min=0)
    others = log_q.scatter(-1, ids, -torch.inf)
    # where the student can say none of the others, what is left over of the rest is rounding
    has_rest = (rest > 0) & (others > -torch.inf).any(-1)
    # of nothing but -inf logsumexp's gradient is NaN, even times 0
    log_rest_q = others.masked_fill(~has_rest.unsqueeze(-1), 0.0).logsumexp(-1)
    return losses + torch.where(has_rest, rest * (rest.clamp(min=1e-30).log() - log_rest_q), 0.0)
