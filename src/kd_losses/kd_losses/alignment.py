"""The CIF alignment loss: each token's stretch of the clip should weigh one token.

Letters: B batch, S frames, N tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_losses.reduction import Reduction, accumulation_dtype, check_reduction, reduce_loss


def cif_alignment_loss(
    alphas: Tensor,
    token_ends: Tensor,
    target_length: Tensor,
    *,
    threshold: float = 1.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Distance of the CIF weight that lies in each token's stretch of the clip from one threshold.

    The quantity loss asks only for the right sum; this one says where in the clip it should come
    from. Token k owns the frames from where token k - 1 ends to where it ends itself, by an
    alignment made beforehand (a CTC or an attention model's); the first token's stretch begins
    with the clip, the last one's reaches to the clip's end.

    Source: ours; a per-token form of the quantity loss of arXiv 1905.11235, section 3.2.
    Equals: ``(alphas[b, ends[k - 1]:ends[k]].sum() / threshold - 1).abs()`` for whole-numbered
    ends; a frame that an end divides counts to both sides in proportion.

    Args:
        alphas: (B, S) floating point: the weights before any scaling, zero on padding.
        token_ends: (B, N) floating point: where each token ends, in frames of ``alphas``, never
            decreasing along a row; what stands at and after the last token is not read.
        target_length: (B,) integer, at most N: how many of the columns are real tokens.
        threshold: CIF's firing threshold.
        reduction: "mean" over the tokens, "sum" or "none".
        num_items: with "mean", divides instead of the tokens' number: those of the whole global
            batch.

    Returns:
        A scalar, or (n,) for reduction "none", n the batch's tokens, row by row; float32 for
        half-precision input.

    Raises:
        TypeError: alphas isn't floating point.
        ValueError: the shapes do not fit each other, an option is unknown, or, on a CPU, where
            looking costs no synchronisation, a target_length exceeds N.
    """
    check_reduction(reduction, num_items)
    if not alphas.is_floating_point():
        raise TypeError(f"alphas: expected a floating-point tensor, got {alphas.dtype}")
    if threshold <= 0:
        raise ValueError(f"threshold: expected a positive number, got {threshold}")
    rows = alphas.shape[0]
    if alphas.ndim != 2 or token_ends.ndim != 2 or token_ends.shape[0] != rows:
        raise ValueError(
            "alphas and token_ends: expected (B, S) and (B, N), got "
            f"{tuple(alphas.shape)} and {tuple(token_ends.shape)}"
        )
    if target_length.shape != (rows,):
        raise ValueError(
            f"target_length: expected shape ({rows},), got {tuple(target_length.shape)}; one "
            "number per sequence"
        )
    frames, columns = alphas.shape[1], token_ends.shape[1]
    on_cpu = target_length.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and bool((target_length > columns).any()):
        raise ValueError(
            f"target_length: expected at most {columns}, the columns of token_ends, got "
            f"{target_length.max().item()}; give every token an end, or count those that have one"
        )
    weights = alphas.to(accumulation_dtype(alphas.dtype))
    before = F.pad(weights.cumsum(dim=1), (1, 1))  # before[b, t]: weight of the first t frames
    position = torch.arange(columns, device=alphas.device)
    real = position < target_length[:, None]
    inner = position < target_length[:, None] - 1
    ends = token_ends.to(weights).where(inner, weights.new_tensor(frames)).clamp(0, frames)
    whole = ends.detach().floor()
    index = whole.long()
    up_to_end = torch.lerp(
        before.gather(1, index),
        before.gather(1, (index + 1).clamp(max=frames)),
        ends - whole,
    )
    stretches = up_to_end.diff(dim=1, prepend=up_to_end.new_zeros(rows, 1))
    losses = (stretches / threshold - 1).abs()
    return reduce_loss(losses[real], reduction, num_items)
