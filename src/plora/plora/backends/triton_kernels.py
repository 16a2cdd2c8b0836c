"""The Triton kernels: the only file of the package that imports triton.

Shapes: P rows of a matrix, R chosen ones of them, C its columns, r the rank.

All of them reach the chosen rows by their indices, so that no copy of them is made. The rows are
distinct, so that no kernel needs atomics, and results are the same in every run. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(left, right, total, WIDEN: tl.constexpr):
    """Add ``left @ right`` to `total`. Triton's interpreter takes bfloat16 for integers: WIDEN."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def shrink_kernel(
    matrix,
    matrix_stride,
    rows,
    weight,
    rank_stride,
    column_stride,
    parts,
    num_rows,
    columns,
    COLUMNS_PER_PART: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``matrix[rows] @ weight.T`` over a part of the columns. Grid: (R / BLOCK_ROWS, parts).

    weight is (r, C) by its strides. parts is (parts, R, r) float32, and its sum is the result.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < num_rows
    source = tl.load(rows + row, mask=exists, other=0)
    rank = tl.arange(0, BLOCK_RANK)
    in_rank = rank < RANK
    total = tl.zeros([BLOCK_ROWS, BLOCK_RANK], dtype=tl.float32)
    first = tl.program_id(1) * COLUMNS_PER_PART
    for step in range(0, COLUMNS_PER_PART, BLOCK_COLUMNS):
        column = first + step + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        values = tl.load(
            matrix + source[:, None] * matrix_stride + column[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        factors = tl.load(
            weight + rank[None, :] * rank_stride + column[:, None] * column_stride,
            mask=in_rank[None, :] & inside[:, None],
            other=0.0,
        )
        total = _dot(values, factors, total, WIDEN)
    place = (tl.program_id(1) * num_rows + row[:, None]) * RANK + rank[None, :]
    tl.store(parts + place, total, mask=exists[:, None] & in_rank[None, :])


@triton.jit
def expand_kernel(
    matrix,
    matrix_stride,
    rows,
    low,
    weight,
    rank_stride,
    column_stride,
    scaling,
    num_rows,
    columns,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add ``scaling * (low @ weight)`` to chosen rows. Grid: (R / BLOCK_ROWS, C / BLOCK_COLUMNS).

    low is (R, r), weight (r, C) by its strides. A row belongs to one program for each of its
    columns, and the sum is rounded once.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists, inside = row < num_rows, column < columns
    target = tl.load(rows + row, mask=exists, other=0)
    rank = tl.arange(0, BLOCK_RANK)
    in_rank = rank < RANK
    left = tl.load(
        low + row[:, None] * RANK + rank[None, :],
        mask=exists[:, None] & in_rank[None, :],
        other=0.0,
    )
    right = tl.load(
        weight + rank[:, None] * rank_stride + column[None, :] * column_stride,
        mask=in_rank[:, None] & inside[None, :],
        other=0.0,
    )
    zero = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    update = _dot(left, right, zero, WIDEN) * scaling
    place = matrix + target[:, None] * matrix_stride + column[None, :]
    used = exists[:, None] & inside[None, :]
    old = tl.load(place, mask=used, other=0.0).to(tl.float32)
    tl.store(place, (old + update).to(matrix.dtype.element_ty), mask=used)


@triton.jit
def outer_kernel(
    low,
    matrix,
    matrix_stride,
    rows,
    parts,
    num_rows,
    columns,
    ROWS_PER_PART: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``low.T @ matrix[rows]`` over a part of the rows. Grid: (C / BLOCK_COLUMNS, parts).

    low is (R, r). parts is (parts, r, C) float32, and its sum is the result.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    rank = tl.arange(0, BLOCK_RANK)
    in_rank = rank < RANK
    total = tl.zeros([BLOCK_RANK, BLOCK_COLUMNS], dtype=tl.float32)
    first = tl.program_id(1) * ROWS_PER_PART
    for step in range(0, ROWS_PER_PART, BLOCK_ROWS):
        row = first + step + tl.arange(0, BLOCK_ROWS)
        exists = row < num_rows
        source = tl.load(rows + row, mask=exists, other=0)
        left = tl.load(
            low + row[None, :] * RANK + rank[:, None],
            mask=exists[None, :] & in_rank[:, None],
            other=0.0,
        )
        values = tl.load(
            matrix + source[:, None] * matrix_stride + column[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        total = _dot(left, values, total, WIDEN)
    place = (tl.program_id(1) * RANK + rank[:, None]) * columns + column[None, :]
    tl.store(parts + place, total, mask=in_rank[:, None] & inside[None, :])
