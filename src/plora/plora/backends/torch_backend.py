"""The three products of a low-rank update, in plain torch.

Letters of shapes: P rows of a matrix, R chosen ones of them, C its columns, r the rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plora.rows import Rows

_HALVES = (torch.bfloat16, torch.float16)
# Rows of a run from which on a product of its own costs less than one for all and a sum.
_LONG_RUN = 128
# index_copy_ moves one element at a time: of 16 bytes, not of 2.
_WIDE = torch.complex128


def down(inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs @ weight.T``: (R, C) and (r, C) -> (R, r)."""
    if inputs.dtype in _HALVES and inputs.device.type == "cpu":
        # On a CPU the product with the long side last takes about half the time of the other one.
        return torch.mm(weight, inputs.t()).t()
    # As LoRA computes it elsewhere: where all rows are chosen, float32 results agree to the bit.
    return F.linear(inputs, weight)


def add_up_(matrix: Tensor, rows: Rows, low: Tensor, weight: Tensor, scaling: float = 1.0) -> None:
    """Add ``scaling * (low @ weight)`` to the chosen rows of `matrix`, in place.

    Args:
        matrix: (P, C).
        rows: R of its rows.
        low: (R, r).
        weight: (r, C), dtype of `low`.
        scaling: Factor of the product.
    """
    runs = rows.runs or ()
    fused = len(runs) == 1 or len(rows) >= _LONG_RUN * len(runs) > 0
    if fused and matrix.dtype == low.dtype and matrix.dtype in _HALVES:
        if len(runs) == 1:
            rows.take(matrix).addmm_(low, weight, alpha=scaling)
            return
        begin = 0
        for start, stop in runs:  # the product is rounded once, after the sum
            part = low[begin : begin + stop - start]
            matrix[start:stop].addmm_(part, weight, alpha=scaling)
            begin += stop - start
        return
    if rows.runs is None and _moves_whole(matrix) and low.dtype == matrix.dtype:
        # Rounded once here as well; and rows are moved faster than sums of rows are formed.
        updated = matrix.index_select(0, rows.index).addmm_(low, weight, alpha=scaling)
        matrix.view(_WIDE).index_copy_(0, rows.index, updated.view(_WIDE))
        return
    product = low @ weight
    if scaling != 1.0:
        product *= scaling
    product = product.to(matrix.dtype)
    if rows.runs is None:
        matrix.index_add_(0, rows.index, product)
        return
    begin = 0
    for start, stop in rows.runs:
        matrix[start:stop].add_(product[begin : begin + stop - start])
        begin += stop - start


def _moves_whole(matrix: Tensor) -> bool:
    """Whether the rows of a 16-bit matrix on a CPU can be moved as elements of `_WIDE`."""
    return (
        matrix.dtype in _HALVES
        and matrix.device.type == "cpu"  # others may have no complex128
        and matrix.is_contiguous()
        and matrix.shape[-1] % 8 == 0
        and matrix.storage_offset() % 8 == 0
    )


def outer(low: Tensor, inputs: Tensor) -> Tensor:
    """``low.T @ inputs``: (R, r) and (R, C) -> (r, C), the gradient of a weight."""
    return torch.mm(low.t(), inputs)
