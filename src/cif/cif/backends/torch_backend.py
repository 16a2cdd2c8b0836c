"""Integration in plain PyTorch: any device, forward and closed-form backward.

Shapes: B batch, T frames, N tokens, D width, L = T + N intervals.

With c_t the prefix in tokens, k(t) = floor(c_t), g[n, t] = <dL/dout_n, h_t> and threshold beta:

    w[n, t]  = beta * (clip01(c_t - n) - clip01(c_{t-1} - n)),     out_n = sum_t w[n, t] h_t
    dh_t     = sum_n w[n, t] dout_n
    dalpha_i = g[k(i), i] + sum_{t > i} (g[k(t), t] - g[k(t-1), t])

A frame in which nothing fires adds nothing to that last sum; the tokens in the middle of a frame
that fires several times have the constant weight beta and do not appear at all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cif.backends.intervals import merge
from cif.prefix import FRACTION_BITS, ONE


def integrate(
    hidden_states: Tensor,
    alphas: Tensor,
    prefix: Tensor,
    *,
    frame_mask: Tensor | None,
    lengths: Tensor,
    scale: Tensor | None,
    unit: Tensor,
    num_tokens: int,
) -> Tensor:
    """Sum the frames of each token by their weights.

    Args:
        hidden_states: (B, T, D) float.
        alphas: (B, T) float32 or float64. Only its gradient is used: the values act through
            `prefix`.
        prefix: (B, T) int64, Q.40, already scaled.
        frame_mask: (B, T) bool, True at real frames; None where all are.
        lengths: (B,) int64, the tokens of each row, at most `num_tokens`; 0 where nothing fires.
        scale: (B,) float64, d(prefix) / d(alpha / threshold) where the prefix was stretched to end
            at a whole number; None where it was not.
        unit: (B,) float32 or float64, the weight of one whole token: the threshold, or NaN to
            poison the row. Sums and weights are of this dtype.
        num_tokens: N.

    Returns:
        (B, N, D) of the dtype of `unit`; zeros past `lengths`.
    """
    out: Tensor = _Integrate.apply(  # type: ignore[no-untyped-call]  # torch's
        hidden_states, alphas, prefix, frame_mask, lengths, scale, unit, num_tokens
    )
    return out


def _bags(values: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of consecutive entries.

    equals: for each start s up to the next one, sum_j weights[j] * values[rows[j]].

    Args:
        values: (B, R, D); rows: (B, L), indices into R; starts: (B, S), increasing from 0;
        weights: (B, L).

    Returns:
        (B, S, D).
    """
    batch, count, width = values.shape
    base = torch.arange(batch, device=values.device)[:, None]
    out = F.embedding_bag(
        (rows + base * count).flatten(),
        values.reshape(batch * count, width),
        (starts + base * rows.shape[1]).flatten(),
        mode="sum",
        per_sample_weights=weights.flatten(),
    )
    return out.view(batch, -1, width)


class _Integrate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        alphas: Tensor,
        prefix: Tensor,
        frame_mask: Tensor | None,
        lengths: Tensor,
        scale: Tensor | None,
        unit: Tensor,
        num_tokens: int,
    ) -> Tensor:
        batch, frames, width = hidden_states.shape
        ctx.nothing = min(batch, frames, width, num_tokens) == 0
        ctx.alpha_dtype = alphas.dtype
        if ctx.nothing:
            ctx.save_for_backward(hidden_states, alphas)
            return unit.new_zeros(batch, num_tokens, width)
        parts = merge(prefix, lengths, num_tokens)
        weights = parts.sizes.to(unit.dtype) * (unit[:, None] / ONE)
        values = hidden_states.to(unit.dtype)
        out = _bags(values, parts.frames, parts.token_starts, weights)
        token = torch.arange(num_tokens, device=prefix.device)
        out.masked_fill_((token >= lengths[:, None])[..., None], 0.0)
        ctx.save_for_backward(
            hidden_states,
            prefix,
            frame_mask,
            lengths,
            scale,
            weights,
            parts.tokens,
            parts.frame_starts,
            parts.frame_ends,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.nothing:
            hidden_states, alphas = ctx.saved_tensors
            return (torch.zeros_like(hidden_states), torch.zeros_like(alphas), *(None,) * 6)
        hidden_states, prefix, frame_mask, lengths, scale, weights, tokens, starts, ends = (
            ctx.saved_tensors
        )
        token = torch.arange(grad.shape[1], device=grad.device)
        grad = grad.masked_fill((token >= lengths[:, None])[..., None], 0.0)
        d_hidden, last, first = _frame_gradients(hidden_states, grad, weights, tokens, starts, ends)
        d_alphas = _alpha_gradient(last, first, prefix, frame_mask, lengths, scale)
        return (
            d_hidden.to(hidden_states.dtype),
            d_alphas.to(ctx.alpha_dtype),
            *(None,) * 6,
        )


def _frame_gradients(
    hidden_states: Tensor,
    grad: Tensor,
    weights: Tensor,
    tokens: Tensor,
    starts: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dh and the two dot products of each frame.

    Returns:
        dh, (B, T, D); <dout_n, h_t> for the last and for the first token that frame t touches,
        (B, T) each.
    """
    values = hidden_states.to(grad.dtype)
    if torch.compiler.is_compiling():
        # Dynamo traces no autograd within a backward; the compiler fuses what follows into loops
        # that store only the sums.
        d_hidden = _bags(grad, tokens, starts, weights)
        last, first = (
            (values * grad.gather(1, tokens.gather(1, at)[..., None].expand_as(values))).sum(-1)
            for at in (ends, starts)
        )
        return d_hidden, last, first
    # The gradient of a weight in dh = bags(dout) for the cotangent h is <dout_n, h_t>: the very dot
    # product that dalpha is made of, so that one pass serves both.
    with torch.enable_grad():
        leaf = weights.detach().requires_grad_()
        bags = _bags(grad, tokens, starts, leaf)
    (dots,) = torch.autograd.grad(bags, leaf, values)
    return bags.detach(), dots.gather(1, ends), dots.gather(1, starts)


def _alpha_gradient(
    last: Tensor,
    first: Tensor,
    prefix: Tensor,
    frame_mask: Tensor | None,
    lengths: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Turn the dot products of the frames, (B, T), into dL/dalpha, (B, T) float64."""
    before = F.pad(prefix, (1, -1))
    last_token, first_token = prefix >> FRACTION_BITS, before >> FRACTION_BITS
    last = torch.where(last_token < lengths[:, None], last, 0.0).double()
    first = torch.where(first_token < lengths[:, None], first, 0.0).double()
    if frame_mask is not None:
        # Whatever stands in padding, NaN included, has been multiplied into its dot products.
        last = last.masked_fill(~frame_mask, 0.0)
    jumps = torch.where(first_token != last_token, last - first, 0.0).cumsum(dim=1)
    d_alphas = last + (jumps[:, -1:] - jumps)
    if scale is None:
        return d_alphas
    steps = (prefix - before).double()
    mean = (d_alphas * steps).sum(dim=1, keepdim=True) / prefix[:, -1:].clamp(min=1)
    return scale[:, None] * (d_alphas - mean)
