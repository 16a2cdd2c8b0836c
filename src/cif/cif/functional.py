"""Continuous integrate-and-fire as a function.

Shapes: B batch, T frames, N tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cif.alignment import Alignment, build_alignment, longest, tail_factors
from cif.backends import Backend, resolve, triton_align
from cif.backends.dispatch import integrate
from cif.prefix import Rule, Tail
from cif.rows import counts_on
from cif.spans import check_axis
from cif.validation import check_alphas, check_hidden_states, check_options


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
        alphas: (B, T) float, at least 0 (negative values count as 0). A row with NaN or infinity
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
        backend: "torch" runs where there is float64. "triton" runs on GPUs, and needs triton.
            "auto" is "triton" where that can run, else "torch". "dense" writes out the (B, N, T)
            matrix of weights: for derivatives of any order and for export to ONNX.

    Returns:
        The tokens, with lengths, mask, sum of alpha and fire times.

    Raises:
        TypeError: a tensor has a dtype of the wrong kind.
        ValueError: shapes or devices do not fit, or an option is out of range. Values on the
            device are not looked at, except a negative target length where N is read anyway. Or the
            backend cannot run here.
    """
    check_hidden_states(hidden_states, alphas)
    check_alphas(alphas, attention_mask, target_lengths)
    check_options(threshold, tail, tail_threshold, max_tokens, backend)
    rule = Rule(threshold, tail, tail_threshold)
    backend = resolve(backend, hidden_states.device)
    if hidden_states.dtype == torch.float64:
        alphas = alphas.double()
    if backend == "triton":
        return _cif_triton(hidden_states, alphas, attention_mask, target_lengths, rule, max_tokens)
    alignment = build_alignment(alphas, attention_mask, target_lengths, rule, max_tokens)
    return CIFOutput(
        hidden_states=_integrate(alignment, hidden_states, backend),
        lengths=alignment.lengths,
        attention_mask=alignment.attention_mask,
        alpha_sum=alignment.alpha_sum,
        fire_times=alignment.fire_times,
    )


def _cif_triton(
    hidden_states: Tensor,
    alphas: Tensor,
    attention_mask: Tensor | None,
    target_lengths: Tensor | None,
    rule: Rule,
    max_tokens: int | None,
) -> CIFOutput:
    """Do what `cif` does in two kernels, one that decides the fires and one that integrates."""
    mask = None if attention_mask is None else attention_mask.bool()
    targets = None if target_lengths is None else counts_on(alphas.device, target_lengths)
    decide = partial(triton_align.align, alphas, mask, targets, rule)
    if max_tokens is not None:
        num_tokens = max_tokens
    elif target_lengths is not None:
        num_tokens = longest(target_lengths)
    else:
        num_tokens = longest(decide(num_tokens=0).counts)
    check_axis(alphas.shape[0] * num_tokens)
    aligned = decide(num_tokens=num_tokens)
    factors = None
    if target_lengths is None and rule.tail == "threshold":
        token = torch.arange(num_tokens, device=alphas.device)
        tokens = aligned.alpha_sum / rule.threshold
        factors = tail_factors(aligned.totals, tokens, aligned.lengths, token)
    batch, frames, width = hidden_states.shape
    flat = hidden_states.reshape(batch * frames, width)
    dtype = hidden_states.dtype if factors is None else aligned.alpha_sum.dtype
    hidden = integrate(flat, aligned.spans, dtype, "triton").view(batch, num_tokens, width)
    if factors is not None:
        hidden = (hidden * factors[..., None]).to(hidden_states.dtype)
    return CIFOutput(
        hidden_states=hidden,
        lengths=aligned.lengths,
        attention_mask=aligned.attention_mask,
        alpha_sum=aligned.alpha_sum,
        fire_times=aligned.fire_times,
    )


def align(
    alphas: Tensor,
    *,
    attention_mask: Tensor | None = None,
    target_lengths: Tensor | None = None,
    threshold: float = 1.0,
    tail: Tail = "round",
    tail_threshold: float = 0.5,
    max_tokens: int | None = None,
) -> Alignment:
    """Decide which part of which frame goes into which token, without integrating anything.

    For what `cif` does not return: the weights as a matrix or as a list, and delays.

    Args:
        alphas: (B, T) float, as for `cif`, like all that follow.
        attention_mask: (B, T) bool or integer.
        target_lengths: (B,) integer.
        threshold: the sum of alpha that makes one token.
        tail: the rule for the rest.
        tail_threshold: in (0, 1], for `tail="threshold"`.
        max_tokens: N.

    Returns:
        The alignment that `cif` integrates with under the same arguments.

    Raises:
        TypeError: a tensor has a dtype of the wrong kind.
        ValueError: shapes or devices do not fit, or an option is out of range.
    """
    check_alphas(alphas, attention_mask, target_lengths)
    check_options(threshold, tail, tail_threshold, max_tokens, "torch")
    rule = Rule(threshold, tail, tail_threshold)
    return build_alignment(alphas, attention_mask, target_lengths, rule, max_tokens)


def _integrate(alignment: Alignment, hidden_states: Tensor, backend: Backend) -> Tensor:
    """Sum the frames of each token: (B, T, D) to (B, N, D) in the same dtype."""
    batch, frames, width = hidden_states.shape
    if backend == "dense":
        return _multiply(alignment, hidden_states)
    factors = alignment.tail_factors
    dtype = hidden_states.dtype if factors is None else alignment.units.dtype
    flat = hidden_states.reshape(batch * frames, width)
    hidden = integrate(flat, alignment.spans(), dtype, backend)
    hidden = hidden.view(batch, alignment.num_tokens, width)
    return hidden if factors is None else (hidden * factors[..., None]).to(hidden_states.dtype)


def _multiply(alignment: Alignment, hidden_states: Tensor) -> Tensor:
    """Multiply the frames, (B, T, D), by the matrix of weights: (B, N, D) in the same dtype."""
    weights = alignment.weights()
    # A matrix product multiplies what it does not use by zero, NaN included. A frame whose alpha is
    # zero must stay where it can: it is what the gradient of that alpha depends on.
    used = (alignment.frame_ends > alignment.frame_starts)[..., None] | hidden_states.isfinite()
    if alignment.frame_mask is not None:
        used = used & alignment.frame_mask[..., None]
    values = torch.where(used, hidden_states, 0.0).to(weights.dtype)
    # What comes back at tokens that do not exist may be anything.
    tokens = torch.where(alignment.attention_mask[..., None], _product(weights, values), 0.0)
    return tokens.to(hidden_states.dtype)


def _product(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply in the dtype that was computed; autocast would make a half-precision product."""
    kind = values.device.type
    if not torch.is_autocast_enabled(kind):
        return weights @ values
    with torch.autocast(kind, enabled=False):
        return weights @ values
