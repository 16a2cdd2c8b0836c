"""Continuous integrate-and-fire as a function.

Shapes: B batch, T frames, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cif.backends import Backend
from cif.backends.torch_backend import integrate
from cif.prefix import (
    MAX_TOTAL,
    ONE,
    Tail,
    fire_times,
    fixed_point_prefix,
    row_totals,
    scale_prefix,
    tail_counts,
)
from cif.validation import check_options, check_tensors


class CIFOutput(NamedTuple):
    """What `cif` and `CIF` return.

    Attributes:
        hidden_states: (B, N, D), one vector per token, in the dtype of the input; zeros past the
            row's length.
        lengths: (B,) int64, the tokens of each row.
        attention_mask: (B, N) bool, True at tokens.
        alpha_sum: (B,) float32 (float64 for float64 input), the sum of alpha before any scaling,
            differentiable: what the quantity loss compares with threshold * N.
        fire_times: (B, N) float32, the moment each token is complete, in frames from the start of
            the row, padding included; frame f lasts from f to f + 1. 0 where there is no token. Not
            differentiable.
        alphas: (B, T) float32, the firing weights the layer predicted, 0 at masked frames; None
            from the function, whose caller has them.
    """

    hidden_states: Tensor
    lengths: Tensor
    attention_mask: Tensor
    alpha_sum: Tensor
    fire_times: Tensor
    alphas: Tensor | None = None


def cif(
    hidden_states: Tensor,
    alphas: Tensor,
    *,
    attention_mask: Tensor | None = None,
    target_lengths: Tensor | None = None,
    threshold: float = 1.0,
    tail: Tail = "round",
    tail_threshold: float = 0.5,
    max_tokens: int | None = None,
    backend: Backend = "auto",
) -> CIFOutput:
    """Integrate frames into tokens by continuous integrate-and-fire (CIF).

    alpha is accumulated along the frames; each time the sum passes a multiple of the threshold a
    token fires, and a frame in which that happens is divided between the tokens (arXiv 1905.11235,
    section 2; a frame may complete several tokens). With c_t the accumulated sum,

        w[n, t] = relu(min(c_t, (n + 1) * threshold) - max(c_{t-1}, n * threshold))
        out[n]  = sum_t w[n, t] h_t

    equals, for `tail="keep"` without mask and up to rounding:
        c = alphas.cumsum(1)[:, None]; n = threshold * torch.arange(N)[:, None]
        w = (c.clamp(max=n + threshold) - (c - alphas[:, None]).clamp(min=n)).clamp(min=0)
        out = w @ hidden_states

    Fires are decided in fixed point, bitwise the same for a row alone, in a batch or padded on
    either side. Weights and sums are float32 (float64 if either input is float64), under autocast
    too. Masked frames, and frames whose alpha is 0, are not read.

    Args:
        hidden_states: (B, T, D) float.
        alphas: (B, T) float, at least 0 (negative values count as 0). A row with a non-finite value
            at a real frame, or with a sum of 2**22 tokens or more, comes out as NaN (one token of
            it without `target_lengths`).
        attention_mask: (B, T) bool or integer, nonzero at real frames; padding may stand on either
            side or in between.
        target_lengths: (B,) integer, at least 0: alpha is scaled so that row b fires exactly
            target_lengths[b] tokens (arXiv 1905.11235, section 2; the training mode). A row with
            nothing to integrate gives that many zeros. May lie on the CPU while the rest is on a
            GPU, and then reading its maximum waits for nothing.
        threshold: the sum of alpha that makes one token; also the sum of a token's weights.
        tail: without `target_lengths`, what becomes of the rest after the last whole token.
            "round": scale alpha so that max(1, round(sum / threshold)) tokens fire, none if the
            sum is 0 (half a token rounds up); "threshold": fire it if it is at least
            `tail_threshold` of a token, its weights scaled to a whole one; "drop": leave it;
            "keep": fire it as it is.
        tail_threshold: in (0, 1], for `tail="threshold"`.
        max_tokens: N, the length of the output. Rows with more tokens are cut off (`lengths` too),
            not scaled to fit. If None, N is the largest length, which is read from the device.
        backend: "auto" or "torch".

    Returns:
        The tokens, with lengths, mask, sum of alpha and fire times.

    Raises:
        TypeError: a tensor has a dtype of the wrong kind.
        ValueError: shapes or devices do not fit, or an option is out of range. Values on the
            device are not looked at, except a negative target length where N is read anyway.
    """
    check_tensors(hidden_states, alphas, attention_mask, target_lengths)
    check_options(threshold, tail, tail_threshold, max_tokens, backend)

    double = torch.float64 in (hidden_states.dtype, alphas.dtype)
    work = torch.float64 if double else torch.float32
    frame_mask = None if attention_mask is None else attention_mask.bool()
    alphas = alphas.to(work).clamp(min=0.0)
    if frame_mask is not None:
        alphas = torch.where(frame_mask, alphas, 0.0)

    summed = alphas.sum(dim=1)

    with torch.no_grad():
        # A row that is not finite would make indices run wild: it is integrated as zeros and its
        # unit of weight made NaN, so that the fault shows in the result.
        valid = summed < threshold * MAX_TOTAL
        prefix = fixed_point_prefix(alphas.where(valid[:, None], 0.0), threshold)
        totals = row_totals(prefix)
        if target_lengths is not None:
            num_tokens = _longest(target_lengths) if max_tokens is None else max_tokens
            counts = target_lengths.to(prefix.device, torch.int64).clamp(min=0)
        else:
            counts = tail_counts(totals, tail, tail_threshold).where(valid, 1)
            num_tokens = _longest(counts) if max_tokens is None else max_tokens
        scale = None
        if target_lengths is not None or tail == "round":
            prefix = scale_prefix(prefix, counts)
            scale = counts.double() * ONE / totals.clamp(min=1)
        lengths = counts.clamp(max=num_tokens)
        unit = torch.full_like(summed, threshold).where(valid, math.nan)
        integrated = (totals.double() / ONE).to(work) * unit

    # The value comes from the integers, the same for every batching; the gradient from the sum.
    alpha_sum = integrated + (summed - summed.detach())
    hidden = integrate(
        hidden_states,
        alphas,
        prefix,
        frame_mask=frame_mask,
        lengths=lengths.where((totals > 0) | ~valid, 0),
        scale=scale,
        unit=unit,
        num_tokens=num_tokens,
    )
    token = torch.arange(num_tokens, device=prefix.device)
    if target_lengths is None and tail == "threshold":
        hidden = hidden * _tail_factors(totals, alpha_sum / threshold, token)[..., None]
    return CIFOutput(
        hidden_states=hidden.to(hidden_states.dtype),
        lengths=lengths,
        attention_mask=token < lengths[:, None],
        alpha_sum=alpha_sum,
        fire_times=fire_times(prefix, lengths, num_tokens),
    )


def _longest(lengths: Tensor) -> int:
    """Read the largest length; on a GPU this waits for the device."""
    if lengths.numel() == 0:
        return 0
    low, high = torch.stack(lengths.aminmax()).tolist()
    if low < 0:
        raise ValueError(f"target_lengths: expected at least 0, got {low}")
    return int(high)


def _tail_factors(totals: Tensor, tokens: Tensor, token: Tensor) -> Tensor:
    """Return the factor, (B, N), that makes the token of the rest a whole one.

    Args:
        totals: (B,) int64, Q.40; tokens: (B,), the same as a differentiable number of tokens;
        token: (N,), the token's index.
    """
    exact = (totals % ONE).double() / ONE
    rest = exact.to(tokens.dtype) + (tokens - tokens.detach())
    is_rest = (token == (totals // ONE)[:, None]) & (exact > 0)[:, None]
    return torch.where(is_rest, rest[:, None], 1.0).reciprocal()
