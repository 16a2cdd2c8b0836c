"""The Triton kernels: the only file of the package that imports triton.

Shapes: B batch, T frames, N tokens, D width, F frames of the batch, M tokens of the batch.

No kernel uses atomics, so that results are the same in every run. All of them are memory-bound: the
integration reads each frame once forward and once backward, as vectors along D.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

    With g[n, t] = <dout_n, h_t>, the gradient of a frame's end is g at the token it ends in, that
    of its start is minus g at the token it begins in; most frames lie within one token.
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
    # What stands in a frame without weight was not read forward: if it is not finite, what its
    # weight would change is not known, and is taken for nothing.
    unread = (start == end) & ((tl.abs(first_dot) < float("inf")) == 0)
    first_dot = tl.where(unread, 0.0, first_dot)
    last_dot = tl.where(several, tl.sum(last_products, axis=1), first_dot)
    tl.store(d_levels + frame, tl.where(has_first, -unit * first_dot, 0.0), mask=exists)
    tl.store(d_levels + num_frames + frame, tl.where(has_last, unit * last_dot, 0.0), mask=exists)


@triton.jit
def _round(value):
    """Round float64 to the nearest int64, halves to even, as torch.round does."""
    down = tl.floor(value)
    rest = value - down
    whole = down.to(tl.int64)
    up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return whole + up.to(tl.int64)


@triton.jit
def _quanta(
    alphas, row_stride, column_stride, mask, mask_stride, row, frame, exists, uniform, valid,
    SCALE: tl.constexpr, CEILING: tl.constexpr, HAS_MASK: tl.constexpr, ACCUMULATOR: tl.constexpr
):  # fmt: skip
    """Load alphas of a row and round them to Q.40: the value, and the int64."""
    value = tl.load(alphas + row * row_stride + frame * column_stride, mask=exists, other=0.0)
    value = value.to(ACCUMULATOR)
    value = tl.where(value < 0, 0.0, value)
    if HAS_MASK:
        real = tl.load(mask + row * mask_stride + frame, mask=exists, other=0) != 0
        value = tl.where(real, value, 0.0)
    # what is not finite has no integer
    quantum = _round(tl.where(value < CEILING, value, 0.0).to(tl.float64) * SCALE)
    return value, tl.where(exists, tl.where(valid, quantum, uniform), 0)


@triton.jit
def align_kernel(
    alphas, row_stride, column_stride, mask, mask_stride, targets,
    levels, starts, ends, limits, units, counts, lengths, token_mask, alpha_sum, fire_times, totals,
    slopes,
    num_frames, num_tokens, all_frames, uniform, nan,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, CEILING: tl.constexpr,
    TAIL_BIAS: tl.constexpr, SCALED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide the fires of one row, and lay it out along the tokens of the batch. Grid: (B,).

    Args, where the name does not say it:
        uniform: Q.40, what a frame of a row with bad alphas counts.
        SCALE: 2**40 / THRESHOLD; CEILING: the sum of alpha from which a row is bad.
        TAIL_BIAS: Q.40, what is added to the sum before it is cut to whole tokens.
        SCALED: whether the prefix is stretched to end at a whole number.
    """
    row = tl.program_id(0).to(tl.int64)
    accumulator: tl.constexpr = alpha_sum.dtype.element_ty

    mass = tl.zeros([BLOCK], dtype=tl.float64)
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    offset = row * 0
    while offset < num_frames:
        frame = offset + tl.arange(0, BLOCK)
        exists = frame < num_frames
        value, _ = _quanta(
            alphas, row_stride, column_stride, mask, mask_stride, row, frame, exists, uniform, True,
            SCALE, CEILING, HAS_MASK, accumulator
        )  # fmt: skip
        is_bad = exists & ((value < CEILING) == 0)
        bad += is_bad.to(tl.int32)
        mass += tl.where(is_bad, 0.0, value.to(tl.float64))
        offset += BLOCK
    valid = (tl.sum(bad, axis=0) == 0) & (tl.sum(mass, axis=0) < CEILING)

    total = row * 0
    offset = row * 0
    while offset < num_frames:
        frame = offset + tl.arange(0, BLOCK)
        _, quantum = _quanta(
            alphas, row_stride, column_stride, mask, mask_stride, row, frame, frame < num_frames,
            uniform, valid, SCALE, CEILING, HAS_MASK, accumulator
        )  # fmt: skip
        total += tl.sum(quantum, axis=0)
        offset += BLOCK

    if HAS_TARGETS:
        count = tl.maximum(tl.load(targets + row).to(tl.int64), 0)
    else:
        count = (total + TAIL_BIAS) >> _BITS
        if SCALED:
            count = tl.where(total > 0, tl.maximum(count, 1), count)
        count = tl.where(valid, count, 1)
    length = tl.minimum(count, num_tokens)
    fired = tl.where(total > 0, length, 0)
    unit = tl.where(valid, THRESHOLD, nan).to(accumulator)
    tl.store(counts + row, count)
    tl.store(lengths + row, length)
    tl.store(totals + row, total)
    tl.store(alpha_sum + row, (total.to(tl.float64) / _ONE).to(accumulator) * unit)
    divisor = tl.maximum(total, 1).to(tl.float64)
    factor = count.to(tl.float64) * _ONE
    if SCALED:
        tl.store(slopes + row, tl.where(valid, factor / divisor, 0.0))
    else:
        tl.store(slopes + row, tl.where(valid, 1.0, 0.0).to(tl.float64))

    base = row * num_tokens
    prefix = row * 0
    last_weighted = row * 0
    offset = row * 0
    while offset < num_frames:
        frame = offset + tl.arange(0, BLOCK)
        exists = frame < num_frames
        _, quantum = _quanta(
            alphas, row_stride, column_stride, mask, mask_stride, row, frame, exists, uniform,
            valid, SCALE, CEILING, HAS_MASK, accumulator
        )  # fmt: skip
        end = prefix + tl.cumsum(quantum, axis=0)
        start = end - quantum
        prefix += tl.sum(quantum, axis=0)
        if SCALED:
            end = _round((end.to(tl.float64) / divisor) * factor)
            start = _round((start.to(tl.float64) / divisor) * factor)
        last_weighted = tl.maximum(last_weighted, tl.max(tl.where(end > start, frame, 0), axis=0))

        edge = fired << _BITS
        place = row * num_frames + frame
        tl.store(starts + place, tl.minimum(start, edge) + (base << _BITS), mask=exists)
        tl.store(ends + place, tl.minimum(end, edge) + (base << _BITS), mask=exists)
        tl.store(limits + place, base + fired, mask=exists)
        low, high = tl.minimum(start, edge), tl.minimum(end, edge)
        tl.store(levels + place, (low.to(tl.float64) / _ONE).to(accumulator), mask=exists)
        high = (high.to(tl.float64) / _ONE).to(accumulator)
        tl.store(levels + all_frames + place, high, mask=exists)

        token = start >> _BITS
        completes = exists & ((token + 1) << _BITS <= end) & (token < length)
        while tl.max(completes.to(tl.int32), axis=0) > 0:
            part = (((token + 1) << _BITS) - start).to(tl.float64)
            moment = frame.to(tl.float64) + part / tl.maximum(end - start, 1).to(tl.float64)
            tl.store(fire_times + base + token, moment.to(tl.float32), mask=completes)
            token += 1
            completes = exists & ((token + 1) << _BITS <= end) & (token < length)
        offset += BLOCK
    if not SCALED:
        # a rest that is fired as a token ends with the last frame that has any weight
        rest = total >> _BITS
        moment = (last_weighted + 1).to(tl.float32)
        tl.store(fire_times + base + rest, moment, mask=(rest < length) & (total > 0))

    offset = row * 0
    while offset < num_tokens:
        token = offset + tl.arange(0, BLOCK)
        tl.store(units + base + token, unit, mask=token < num_tokens)
        tl.store(token_mask + base + token, token < length, mask=token < num_tokens)
        offset += BLOCK


@triton.jit
def align_backward_kernel(
    d_levels, d_alpha_sum, alphas, row_stride, column_stride, mask, mask_stride,
    ends, totals, slopes, d_alphas, num_frames, num_tokens, all_frames,
    THRESHOLD: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the gradients of the ends of one row's frames into that of its alphas. Grid: (B,).

    The end of frame t is r * sum_{i <= t} alpha_i / THRESHOLD, and where it is scaled r is the
    count over the whole sum; the start of a frame is the end of the one before.
    """
    row = tl.program_id(0).to(tl.int64)
    first_frame = row * num_frames
    base = (row * num_tokens) << _BITS
    slope = tl.load(slopes + row)

    all_sum = tl.zeros([BLOCK], dtype=tl.float64)
    all_moment = tl.zeros([BLOCK], dtype=tl.float64)
    offset = row * 0
    while offset < num_frames:
        frame = offset + tl.arange(0, BLOCK)
        exists = frame < num_frames
        place = first_frame + frame
        slope_here = tl.load(d_levels + all_frames + place, mask=exists, other=0.0).to(tl.float64)
        after = tl.load(d_levels + place + 1, mask=frame + 1 < num_frames, other=0.0)
        slope_here += after.to(tl.float64)
        level = (tl.load(ends + place, mask=exists, other=0) - base).to(tl.float64) / _ONE
        all_sum += slope_here
        all_moment += tl.where(exists, slope_here * level, 0.0)
        offset += BLOCK
    remaining = tl.sum(all_sum, axis=0)
    shift = slope * 0.0
    if SCALED:
        total = tl.maximum(tl.load(totals + row), 1).to(tl.float64) / _ONE
        shift = tl.sum(all_moment, axis=0) / total

    extra = tl.load(d_alpha_sum + row).to(tl.float64)
    offset = row * 0
    while offset < num_frames:
        frame = offset + tl.arange(0, BLOCK)
        exists = frame < num_frames
        place = first_frame + frame
        slope_here = tl.load(d_levels + all_frames + place, mask=exists, other=0.0).to(tl.float64)
        after = tl.load(d_levels + place + 1, mask=frame + 1 < num_frames, other=0.0)
        slope_here += after.to(tl.float64)
        from_here = remaining - tl.cumsum(slope_here, axis=0) + slope_here
        remaining -= tl.sum(slope_here, axis=0)
        through_levels = (slope * from_here - shift) / THRESHOLD
        result = extra + tl.where(slope == 0, 0.0, through_levels)
        value = tl.load(alphas + row * row_stride + frame * column_stride, mask=exists, other=0.0)
        kept = value >= 0
        if HAS_MASK:
            kept = kept & (tl.load(mask + row * mask_stride + frame, mask=exists, other=0) != 0)
        result = tl.where(kept, result, 0.0).to(d_alphas.dtype.element_ty)
        tl.store(d_alphas + place, result, mask=exists)
        offset += BLOCK
