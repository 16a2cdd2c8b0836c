"""Launching the Triton kernels: outputs and grids.

Shapes: B batch, T frames, N tokens, D width, F frames of the batch, M tokens of the batch.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from cif.backends.triton_tiles import backward_tile, forward_tile
from cif.prefix import MAX_TOTAL, ONE, Rule, tail_bias

# Frames and tokens of a row that the scans take at a time.
_SCAN_BLOCK = 1024


class Scan(NamedTuple):
    """What the scan of each row finds out; the first ones are those of `cif.spans.Spans`.

    Attributes:
        levels: (2, F) float32 or float64, like all that are float unless it is said.
        starts: (F,) int64.
        ends: (F,) int64.
        limits: (F,) int64.
        units: (M,).
        counts: (B,) int64, the tokens of each row before any is cut off.
        lengths: (B,) int64.
        token_mask: (B, N) bool, True at tokens.
        alpha_sum: (B,).
        fire_times: (B, N) float32.
        totals: (B,) int64, Q.40, the unscaled sum of each row in tokens.
        slopes: (B,) float64, what the row's sum is multiplied with to end at a whole number; 1
            where it is not scaled, 0 in rows that have no gradient.
    """

    levels: Tensor
    starts: Tensor
    ends: Tensor
    limits: Tensor
    units: Tensor
    counts: Tensor
    lengths: Tensor
    token_mask: Tensor
    alpha_sum: Tensor
    fire_times: Tensor
    totals: Tensor
    slopes: Tensor


def empty_scan(alphas: Tensor, num_tokens: int) -> Scan:
    """Make room for the alignment of alphas, (B, T), with N tokens."""
    batch, frames = alphas.shape
    work = torch.promote_types(alphas.dtype, torch.float32)

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=alphas.device)

    return Scan(
        levels=room(2, batch * frames, dtype=work),
        starts=room(batch * frames, dtype=torch.int64),
        ends=room(batch * frames, dtype=torch.int64),
        limits=room(batch * frames, dtype=torch.int64),
        units=room(batch * num_tokens, dtype=work),
        counts=room(batch, dtype=torch.int64),
        lengths=room(batch, dtype=torch.int64),
        token_mask=room(batch, num_tokens, dtype=torch.bool),
        alpha_sum=room(batch, dtype=work),
        fire_times=torch.zeros(batch, num_tokens, device=alphas.device),
        totals=room(batch, dtype=torch.int64),
        slopes=room(batch, dtype=torch.float64),
    )


def launch_align(
    alphas: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    rule: Rule,
    num_tokens: int,
) -> Scan:
    """Run the scan of each row.

    Args:
        alphas: (B, T) float.
        mask: (B, T) bool, True at real frames; None where all are.
        targets: (B,) int64, or None.
        rule: when a token fires.
        num_tokens: N.
    """
    threshold, tail, tail_threshold = rule
    scan = empty_scan(alphas, num_tokens)
    batch, frames = alphas.shape
    if batch == 0:
        return scan
    work = scan.alpha_sum.dtype
    mask = None if mask is None else mask.contiguous()
    targets = None if targets is None else targets.contiguous()
    # What a frame counts in a row with bad alphas, rounded as `cif.alignment` does.
    alike = torch.tensor(threshold / max(frames, 1), dtype=work).item()
    kernels = _kernels()
    with _device_of(alphas):
        kernels.align_kernel[(batch,)](
            alphas,
            *alphas.stride(),
            mask,
            0 if mask is None else mask.stride(0),
            targets,
            *scan,
            frames,
            num_tokens,
            batch * frames,
            round(alike * (ONE / threshold)),
            math.nan,
            THRESHOLD=threshold,
            SCALE=ONE / threshold,
            CEILING=threshold * MAX_TOTAL,
            TAIL_BIAS=tail_bias(tail, tail_threshold),
            SCALED=targets is not None or tail == "round",
            HAS_MASK=mask is not None,
            HAS_TARGETS=targets is not None,
            BLOCK=_SCAN_BLOCK,
            # A product fused with what follows is not rounded, and the fires would not be those
            # of a CPU.
            enable_fp_fusion=False,
        )
    return scan


def launch_align_backward(
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
    """Run the reverse scan of each row.

    Returns:
        The gradient of alphas, (B, T) in their dtype.
    """
    batch, frames = alphas.shape
    d_alphas = torch.empty_like(alphas, memory_format=torch.contiguous_format)
    if batch == 0 or frames == 0:
        return d_alphas
    d_levels, d_alpha_sum = _packed(d_levels, d_alpha_sum)
    ends, totals, slopes = _packed(ends, totals, slopes)
    mask = None if mask is None else mask.contiguous()
    kernels = _kernels()
    with _device_of(alphas):
        kernels.align_backward_kernel[(batch,)](
            d_levels,
            d_alpha_sum,
            alphas,
            *alphas.stride(),
            mask,
            0 if mask is None else mask.stride(0),
            ends,
            totals,
            slopes,
            d_alphas,
            frames,
            num_tokens,
            batch * frames,
            THRESHOLD=threshold,
            SCALED=scaled,
            HAS_MASK=mask is not None,
            BLOCK=_SCAN_BLOCK,
        )
    return d_alphas


def launch_integrate(
    hidden_states: Tensor, starts: Tensor, ends: Tensor, units: Tensor, dtype: torch.dtype
) -> Tensor:
    """Run the forward kernel; shapes as in `cif.spans.Spans`.

    Returns:
        (M, D) of `dtype`.
    """
    frames, width = hidden_states.shape
    tokens = units.shape[0]
    out = torch.empty(tokens, width, dtype=dtype, device=hidden_states.device)
    if tokens == 0 or width == 0:
        return out
    hidden_states = _with_rows(hidden_states)
    starts, ends, units = _packed(starts, ends, units)
    tile = forward_tile(width, hidden_states.dtype)
    kernels = _kernels()
    with _device_of(hidden_states):
        kernels.integrate_kernel[(tokens, -(-width // tile["BLOCK_WIDTH"]))](
            hidden_states,
            hidden_states.stride(0),
            starts,
            ends,
            units,
            out,
            frames,
            WIDTH=width,
            **tile,
        )
    return out


def launch_integrate_backward(
    grad: Tensor,
    hidden_states: Tensor,
    starts: Tensor,
    ends: Tensor,
    limits: Tensor,
    readable: Tensor | None,
    units: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel.

    Returns:
        The gradient of the frames, (F, D) in their dtype, and of the levels, (2, F) in the dtype of
        `units`.
    """
    frames, width = hidden_states.shape
    d_hidden = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    d_levels = units.new_empty(2, frames)
    if width == 0 or frames == 0:
        return d_hidden, d_levels.zero_()
    grad, hidden_states = _with_rows(grad), _with_rows(hidden_states)
    starts, ends, limits, units = _packed(starts, ends, limits, units)
    readable = None if readable is None else readable.contiguous()
    tile = backward_tile(width, hidden_states.dtype)
    kernels = _kernels()
    with _device_of(hidden_states):
        kernels.integrate_backward_kernel[(-(-frames // tile["BLOCK_FRAMES"]),)](
            grad,
            grad.stride(0),
            hidden_states,
            hidden_states.stride(0),
            starts,
            ends,
            limits,
            readable,
            units,
            d_hidden,
            d_levels,
            frames,
            WIDTH=width,
            HAS_MASK=readable is not None,
            **tile,
        )
    return d_hidden, d_levels


def _kernels() -> ModuleType:
    """Import Triton no sooner than something is launched; the operators exist without it."""
    return import_module("cif.backends.triton_kernels")


def _packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors contiguous, as the kernels read them, copying only those that are not."""
    return tuple(tensor.contiguous() for tensor in tensors)


def _with_rows(values: Tensor) -> Tensor:
    """Return a tensor whose rows are contiguous, copying only where they are not."""
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch where the tensor lies, which need not be the current GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
