"""Deciding the fires by a Triton kernel, as an operator that torch.compile sees whole.

Shapes: B batch, T frames, N tokens, F frames of the batch, M tokens of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cif.backends.second_order import refuse_second_derivative
from cif.backends.triton_launch import (
    Scan,
    empty_scan,
    launch_align,
    launch_align_backward,
)
from cif.prefix import Rule, Tail
from cif.spans import Spans


class Aligned(NamedTuple):
    """A batch laid out along its tokens; what is not in `Scan` is in `cif.CIFOutput`."""

    spans: Spans
    counts: Tensor
    lengths: Tensor
    attention_mask: Tensor
    alpha_sum: Tensor
    fire_times: Tensor
    totals: Tensor


def align(
    alphas: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    rule: Rule,
    *,
    num_tokens: int,
) -> Aligned:
    """Decide the fires of a padded batch in one kernel; bitwise those of `cif.alignment`.

    Args:
        alphas: (B, T) float.
        mask: (B, T) bool, True at real frames; None where all are.
        targets: (B,) int64 on the device of `alphas`, or None.
        rule: when a token fires.
        num_tokens: N.
    """
    scan = Scan(*_align(alphas, mask, targets, num_tokens, *rule))
    readable = None if mask is None else mask.flatten()
    return Aligned(
        spans=Spans(
            scan.starts,
            scan.ends,
            scan.limits,
            readable,
            scan.units.detach(),
            scan.levels,
            alphas.shape[0],
        ),
        counts=scan.counts,
        lengths=scan.lengths,
        attention_mask=scan.token_mask,
        alpha_sum=scan.alpha_sum,
        fire_times=scan.fire_times.detach(),
        totals=scan.totals,
    )


_Twelve = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]  # fmt: skip


@torch.library.custom_op("cif::align", mutates_args=())
def _align(
    alphas: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    num_tokens: int,
    threshold: float,
    tail: str,
    tail_threshold: float,
) -> _Twelve:
    rule = Rule(threshold, cast(Tail, tail), tail_threshold)
    return launch_align(alphas, mask, targets, rule, num_tokens)


@_align.register_fake
def _(
    alphas: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    num_tokens: int,
    threshold: float,
    tail: str,
    tail_threshold: float,
) -> _Twelve:
    return empty_scan(alphas, num_tokens)


@torch.library.custom_op("cif::align_backward", mutates_args=())
def _align_backward(
    d_levels: Tensor,
    d_alpha_sum: Tensor,
    alphas: Tensor,
    mask: Tensor | None,
    ends: Tensor,
    totals: Tensor,
    slopes: Tensor,
    num_tokens: int,
    threshold: float,
    scaled: bool,
) -> Tensor:
    return launch_align_backward(
        d_levels,
        d_alpha_sum,
        alphas,
        mask,
        ends,
        totals,
        slopes,
        num_tokens=num_tokens,
        threshold=threshold,
        scaled=scaled,
    )


@_align_backward.register_fake
def _(
    d_levels: Tensor,
    d_alpha_sum: Tensor,
    alphas: Tensor,
    mask: Tensor | None,
    ends: Tensor,
    totals: Tensor,
    slopes: Tensor,
    num_tokens: int,
    threshold: float,
    scaled: bool,
) -> Tensor:
    return torch.empty_like(alphas, memory_format=torch.contiguous_format)


def _setup_align(ctx: Any, inputs: tuple[Any, ...], output: _Twelve) -> None:
    alphas, mask, targets, num_tokens, threshold, tail, _ = inputs
    scan = Scan(*output)
    ctx.save_for_backward(alphas, mask, scan.ends, scan.totals, scan.slopes)
    ctx.options = (num_tokens, threshold, targets is not None or tail == "round")
    ctx.like = (scan.levels.shape, scan.alpha_sum.shape, scan.alpha_sum.dtype)


def _backward_align(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d_levels, d_sum = (grads[Scan._fields.index(name)] for name in ("levels", "alpha_sum"))
    alphas, *saved = ctx.saved_tensors
    levels, rows, dtype = ctx.like
    d_levels = alphas.new_zeros(levels, dtype=dtype) if d_levels is None else d_levels
    d_sum = alphas.new_zeros(rows, dtype=dtype) if d_sum is None else d_sum
    with torch.no_grad():
        d_alphas = _align_backward(d_levels, d_sum, alphas, *saved, *ctx.options)
    return *refuse_second_derivative((d_alphas,), d_levels, d_sum, alphas), *(None,) * 6


_align.register_autograd(_backward_align, setup_context=_setup_align)
