"""The Triton kernels: the only file of the package that imports triton.

Shapes: B batch, T frames, N tokens, D width, F frames of the batch, M tokens of the batch.

No kernel uses atomics, so that results are the same in every run. All of them are memory-bound: the
integration reads each frame once forward and once backward, as vectors along D.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BITS = tl.constexpr(40)
_ONE = tl.constexpr(1 << 40)


@triton.jit
def integrate_kernel(
    hidden,
    hidden_stride,
    starts,
    ends,
    units,
    out,
    num_frames,
    WIDTH: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Sum the frames of one token, over a block of D. Grid: (M, D / BLOCK_WIDTH).

    Frames in which the token has no share are not read.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = column < WIDTH
    begin = token << _BITS
    end = begin + _ONE
    unit = tl.load(units + token)
    accumulator = units.dtype.element_ty

    # the first frame that ends after the token begins
    low = num_frames * 0
    high = num_frames
    while low < high:
        middle = (low + high) // 2
        beyond = tl.load(ends + middle) > begin
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle + 1)

    # Summed over the frames at the very end: a sum within the loop makes the warps wait each time.
    total = tl.zeros([BLOCK_FRAMES, BLOCK_WIDTH], dtype=accumulator)
    start = tl.load(starts + low, mask=low < num_frames, other=end)
    while start < end:
        frame = low + tl.arange(0, BLOCK_FRAMES)
        exists = frame < num_frames
        frame_start = tl.load(starts + frame, mask=exists, other=end)
        frame_end = tl.load(ends + frame, mask=exists, other=end)
        size = tl.minimum(frame_end, end) - tl.maximum(frame_start, begin)
        used = size > 0
        weight = tl.where(used, size.to(accumulator) * (unit * (1.0 / _ONE)), 0.0)
        values = tl.load(
            hidden + frame.to(tl.int64)[:, None] * hidden_stride + column[None, :],
            mask=used[:, None] & in_width[None, :],
            other=0.0,
        )
        total += weight[:, None] * values.to(accumulator)
        low += BLOCK_FRAMES
        start = tl.load(starts + low, mask=low < num_frames, other=end)
    result = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + column, result, mask=in_width)


@triton.jit
def integrate_backward_kernel(
    grad,
    grad_stride,
    hidden,
    hidden_stride,
    starts,
    ends,
    limits,
    readable,
    units,
    d_hidden,
    d_levels,
    num_frames,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Compute dh and the gradient of both ends for a block of frames. Grid: (F / BLOCK_FRAMES,).

    With g[n, t] = <dout_n, h_t>, the gradient of a frame's end is g at the token it ends in, that of
    its start is minus g at the token it begins in; most frames lie within one token.
    """
    frame = tl.program_id(0) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
    exists = frame < num_frames
    real = exists
    if HAS_MASK:
        real = exists & (tl.load(readable + frame, mask=exists, other=0) != 0)
    start = tl.load(starts + frame, mask=exists, other=0)
    end = tl.load(ends + frame, mask=exists, other=0)
    limit = tl.load(limits + frame, mask=exists, other=0)
    first = start >> _BITS
    last = end >> _BITS
    has_first = real & (first < limit)
    has_last = real & (last < limit)
    several = last > first
    accumulator = units.dtype.element_ty
    unit = tl.load(units + first, mask=has_first, other=0.0)
    first_size = tl.minimum(end, (first + 1) << _BITS) - start
    last_size = end - (last << _BITS)
    first_weight = tl.where(has_first, first_size.to(accumulator) * (unit * (1.0 / _ONE)), 0.0)
    last_weight = last_size.to(accumulator) * (unit * (1.0 / _ONE))
    last_weight = tl.where(has_last & several, last_weight, 0.0)
    # tokens strictly between the first and the last one weigh a whole unit
    most = tl.max(tl.where(has_first, last - first, 0), axis=0)

    first_products = tl.zeros([BLOCK_FRAMES, BLOCK_WIDTH], dtype=accumulator)
    last_products = tl.zeros([BLOCK_FRAMES, BLOCK_WIDTH], dtype=accumulator)
    row = frame.to(tl.int64)[:, None]
    for offset in range(0, WIDTH, BLOCK_WIDTH):
        column = offset + tl.arange(0, BLOCK_WIDTH)
        in_width = (column < WIDTH)[None, :]
        column = column[None, :]
        values = tl.load(
            hidden + row * hidden_stride + column, mask=has_first[:, None] & in_width, other=0.0
        ).to(accumulator)
        first_grad = tl.load(
            grad + first[:, None] * grad_stride + column,
            mask=has_first[:, None] & in_width,
            other=0.0,
        ).to(accumulator)
        last_grad = tl.load(
            grad + last[:, None] * grad_stride + column,
            mask=(has_last & several)[:, None] & in_width,
            other=0.0,
        ).to(accumulator)
        first_products += values * first_grad
        last_products += values * last_grad
        total = first_weight[:, None] * first_grad + last_weight[:, None] * last_grad
        between = most * 0 + 1
        while between < most:
            token = first + between
            whole = has_first & (token < last)
            between_grad = tl.load(
                grad + token[:, None] * grad_stride + column,
                mask=whole[:, None] & in_width,
                other=0.0,
            ).to(accumulator)
            total += tl.where(whole, unit, 0.0)[:, None] * between_grad
            between += 1
        tl.store(
            d_hidden + row * WIDTH + column,
            total.to(d_hidden.dtype.element_ty),
            mask=exists[:, None] & in_width,
        )
    first_dot = tl.sum(first_products, axis=1)
    last_dot = tl.where(several, tl.sum(last_products, axis=1), first_dot)
    tl.store(d_levels + frame, tl.where(has_first, -unit * first_dot, 0.0), mask=exists)
    tl.store(
        d_levels + num_frames + frame, tl.where(has_last, unit * last_dot, 0.0), mask=exists
    )


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
    blocks = _forward_blocks(width, hidden_states.dtype)
    with _device_of(hidden_states):
        integrate_kernel[(tokens, triton.cdiv(width, blocks["BLOCK_WIDTH"]))](
            hidden_states,
            hidden_states.stride(0),
            starts,
            ends,
            units,
            out,
            frames,
            WIDTH=width,
            **blocks,
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
    blocks = _backward_blocks(width, hidden_states.dtype)
    with _device_of(hidden_states):
        integrate_backward_kernel[(triton.cdiv(frames, blocks["BLOCK_FRAMES"]),)](
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
            **blocks,
        )
    return d_hidden, d_levels


def _with_rows(values: Tensor) -> Tensor:
    """Return a tensor whose rows are contiguous, copying only where they are not."""
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch where the tensor lies, which need not be the current GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _forward_blocks(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the forward kernel's tile; fixed, so that the first call costs no search."""
    columns = min(triton.next_power_of_2(width), 1024 // dtype.itemsize)
    return {"BLOCK_FRAMES": 8, "BLOCK_WIDTH": columns, "num_warps": 4 if columns >= 256 else 2}


def _backward_blocks(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the backward kernel's tile."""
    columns = min(triton.next_power_of_2(width), 1024 // dtype.itemsize)
    return {"BLOCK_FRAMES": 8, "BLOCK_WIDTH": columns, "num_warps": 4 if columns >= 256 else 2}
