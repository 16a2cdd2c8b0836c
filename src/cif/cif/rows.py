"""The fires of each row, before it is known how long the output is.

Shapes: B batch, T frames.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cif.prefix import (
    MAX_TOTAL,
    ONE,
    Rule,
    fixed_point_prefix,
    row_totals,
    scale_prefix,
    tail_counts,
)


class UsableAlphas(NamedTuple):
    """Weights that can be summed.

    Attributes:
        alphas: (B, T) float32 or float64, 0 at masked frames, finite and at least 0.
        sums: (B,) of the same dtype, their sums as they came, differentiable.
        valid: (B,) bool, False in rows that are not finite or sum to 2**22 tokens or more. Those
            would make indices run wild; here all of their alphas are equal and sum to one token.
        frame_mask: (B, T) bool, False at masked frames; None where all are real.
    """

    alphas: Tensor
    sums: Tensor
    valid: Tensor
    frame_mask: Tensor | None


class Rows(NamedTuple):
    """When each row fires.

    Attributes:
        counts: (B,) int64, the tokens of each row.
        totals: (B,) int64, Q.40, the unscaled sum of each row in tokens.
        prefix: (B, T) int64, Q.40, the tokens complete when a frame ends, scaled if the row is.
        levels: (B, T) float64, `prefix` up to rounding, differentiable.
        alpha_sum: (B,) float32 or float64, before any scaling, differentiable; NaN in bad rows.
        units: (B,) of the same dtype, the weight of a whole token: the threshold, NaN in bad rows.
        frame_mask: as in `UsableAlphas`.
    """

    counts: Tensor
    totals: Tensor
    prefix: Tensor
    levels: Tensor
    alpha_sum: Tensor
    units: Tensor
    frame_mask: Tensor | None


def usable_alphas(alphas: Tensor, attention_mask: Tensor | None, threshold: float) -> UsableAlphas:
    """Clear masked frames and negative weights, and set rows aside that are not finite."""
    alphas = alphas.to(torch.promote_types(alphas.dtype, torch.float32)).clamp(min=0.0)
    frame_mask = None if attention_mask is None else attention_mask.bool()
    if frame_mask is not None:
        alphas = torch.where(frame_mask, alphas, 0.0)
    sums = alphas.sum(dim=1)
    valid = sums < threshold * MAX_TOTAL
    alphas = torch.where(valid[:, None], alphas, threshold / max(alphas.shape[1], 1))
    return UsableAlphas(alphas, sums, valid, frame_mask)


def counts_on(device: torch.device, target_lengths: Tensor) -> Tensor:
    """Bring target lengths, (B,), to the device as int64.

    A copy from the CPU need not wait for what the GPU still has to do; one to the CPU must.
    """
    waits_for_nothing = target_lengths.device.type == "cpu"
    return target_lengths.to(device, torch.int64, non_blocking=waits_for_nothing)


def build_rows(
    alphas: Tensor,
    attention_mask: Tensor | None,
    target_lengths: Tensor | None,
    rule: Rule,
) -> Rows:
    """Decide the fires of a padded batch; the arguments are those of `cif.align`, checked."""
    threshold, tail, tail_threshold = rule
    usable, summed, valid, frame_mask = usable_alphas(alphas, attention_mask, threshold)
    levels = usable.double().cumsum(dim=1) / threshold
    with torch.no_grad():
        prefix = fixed_point_prefix(usable, threshold)
        totals = row_totals(prefix)
        if target_lengths is not None:
            counts = counts_on(prefix.device, target_lengths).clamp(min=0)
        else:
            counts = tail_counts(totals, tail, tail_threshold).where(valid, 1)
        scaled = target_lengths is not None or tail == "round"
        if scaled:
            prefix = scale_prefix(prefix, counts)
        units = torch.full_like(summed, threshold).where(valid, math.nan)
        integrated = (totals.double() / ONE).to(summed.dtype) * units
    if scaled and levels.shape[1] > 0:
        levels = levels * (counts[:, None] / torch.where(totals > 0, levels[:, -1], 1.0)[:, None])
    return Rows(
        counts=counts,
        totals=totals,
        prefix=prefix,
        levels=levels,
        # The value comes from the integers, the same for every batching; the gradient from the sum.
        alpha_sum=integrated + (summed - summed.detach()),
        units=units,
        frame_mask=frame_mask,
    )
