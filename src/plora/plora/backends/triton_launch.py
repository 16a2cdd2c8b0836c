"""Launching the Triton kernels: outputs, grids and sizes of tiles.

Shapes: P rows of a matrix, R chosen ones of them, C its columns, r the rank.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

# So many programs keep a large GPU busy; sums over a long side are split until there are as many.
_PROGRAMS = 256


def shrink(matrix: Tensor, index: Tensor, weight: Tensor, scaling: float = 1.0) -> Tensor:
    """``scaling * (matrix[index] @ weight.T)``.

    Args:
        matrix: (P, C).
        index: (R,) int64.
        weight: (r, C), any strides, dtype of `matrix`.
        scaling: Factor of the product.

    Returns:
        (R, r), dtype of `matrix`.
    """
    count, (rank, columns) = index.shape[0], weight.shape
    if count == 0 or columns == 0:
        return matrix.new_zeros(count, rank)
    matrix = _with_rows(matrix)
    blocks = _blocks(rank, columns=64)
    tiles = -(-count // blocks["BLOCK_ROWS"])
    per_part = _per_part(columns, blocks["BLOCK_COLUMNS"], tiles)
    number = -(-columns // per_part)
    parts = torch.empty(number, count, rank, device=matrix.device)
    with _device_of(matrix):
        _kernels().shrink_kernel[(tiles, number)](
            matrix,
            matrix.stride(0),
            index,
            weight,
            *weight.stride(),
            parts,
            count,
            columns,
            COLUMNS_PER_PART=per_part,
            RANK=rank,
            **blocks,
        )
    return _sum(parts, scaling, matrix.dtype)


def expand_(matrix: Tensor, index: Tensor, low: Tensor, weight: Tensor, scaling: float) -> None:
    """Add ``scaling * (low @ weight)`` to ``matrix[index]``, in place.

    Args:
        matrix: (P, C), contiguous.
        index: (R,) int64, distinct.
        low: (R, r).
        weight: (r, C), any strides, dtype of `low`.
        scaling: Factor of the product.
    """
    (count, rank), columns = low.shape, matrix.shape[1]
    if count == 0 or columns == 0:
        return
    blocks = _blocks(rank, columns=128)
    grid = (-(-count // blocks["BLOCK_ROWS"]), -(-columns // blocks["BLOCK_COLUMNS"]))
    with _device_of(matrix):
        _kernels().expand_kernel[grid](
            matrix,
            matrix.stride(0),
            index,
            low.contiguous(),
            weight,
            *weight.stride(),
            scaling,
            count,
            columns,
            RANK=rank,
            **blocks,
        )


def outer(low: Tensor, matrix: Tensor, index: Tensor, scaling: float = 1.0) -> Tensor:
    """``scaling * (low.T @ matrix[index])``, the gradient of a weight.

    Args:
        low: (R, r), dtype of `matrix`.
        matrix: (P, C).
        index: (R,) int64.
        scaling: Factor of the product.

    Returns:
        (r, C) float32.
    """
    (count, rank), columns = low.shape, matrix.shape[1]
    if count == 0 or columns == 0:
        return torch.zeros(rank, columns, device=matrix.device)
    matrix = _with_rows(matrix)
    blocks = _blocks(rank, columns=64)
    tiles = -(-columns // blocks["BLOCK_COLUMNS"])
    per_part = _per_part(count, blocks["BLOCK_ROWS"], tiles)
    number = -(-count // per_part)
    parts = torch.empty(number, rank, columns, device=matrix.device)
    with _device_of(matrix):
        _kernels().outer_kernel[(tiles, number)](
            low.contiguous(),
            matrix,
            matrix.stride(0),
            index,
            parts,
            count,
            columns,
            ROWS_PER_PART=per_part,
            RANK=rank,
            **blocks,
        )
    return _sum(parts, scaling, torch.float32)


def _kernels() -> ModuleType:
    """Import Triton no sooner than something is launched."""
    return import_module("plora.backends.triton_kernels")


def _sum(parts: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    total = parts[0] if parts.shape[0] == 1 else parts.sum(0)
    return (total if scaling == 1.0 else total * scaling).to(dtype)


def _per_part(length: int, block: int, tiles: int) -> int:
    """How much of a sum one program takes: a power of two of blocks, so that few kernels differ."""
    parts = max(1, _PROGRAMS // tiles)
    blocks = -(-length // block)
    return block * (1 << (max(1, blocks // parts) - 1).bit_length())


def _blocks(rank: int, *, columns: int) -> dict[str, int | bool]:
    """Sizes of a tile; a matrix product takes sides of at least 16."""
    return {
        "BLOCK_ROWS": 32,
        "BLOCK_COLUMNS": columns,
        "BLOCK_RANK": max(16, 1 << (rank - 1).bit_length()),
        "WIDEN": os.environ.get("TRITON_INTERPRET") == "1",
    }


def _with_rows(values: Tensor) -> Tensor:
    """Return a tensor whose rows are contiguous, copying only where they are not."""
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch where the tensor lies, which need not be the current GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
