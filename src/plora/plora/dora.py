"""DoRA on chosen rows: direction by the low-rank update, length by a trained magnitude.

Letters of shapes: P flattened positions, K input features, N output features, R chosen rows,
r the rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> Tensor:
    """(N,) float32 (float64 for float64): lengths of the rows of ``weight + scaling * B A``.

    Args:
        weight: (N, K).
        lora_a: (r, K).
        lora_b: (N, r).
        scaling: Factor of the update.
    """
    update = (lora_b @ lora_a).to(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(weight + scaling * update, dim=1, dtype=wide)
    return norm


def add_dora(
    output: Tensor,
    hidden_states: Tensor,
    rows: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`output` with DoRA's change added on the chosen rows (arXiv 2402.09353, eq. 5).

    On those rows the result is ``g * (W x + scaling * B A x) + b``, with ``g = magnitude / |W +
    scaling * B A|``, whose denominator is taken as a constant by the backward pass (section 4.3).
    While training, dropout acts on x in both terms of the change, as in PEFT. Other rows are
    copied. Where magnitude is still that of W, and B is zero, g is one and the change is zero. g is
    one also where a row of W + scaling * B A is all zeros.

    Args:
        output: (..., N), the base layer's result.
        hidden_states: (..., K), its input.
        rows: (R,) int64, distinct indices into the P flattened leading positions.
        lora_a: (r, K).
        lora_b: (N, r).
        magnitude: (N,).
        weight: (N, K) of the base layer.
        bias: (N,) of the base layer.
        scaling: Factor of the update.
        dropout: Probability of dropping a feature of a chosen row; 0 outside training.

    Returns:
        (..., N), dtype of `output`.
    """
    dtype = hidden_states.dtype
    flat = output.reshape(-1, output.shape[-1])
    chosen = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, rows)
    if dropout > 0.0:
        chosen = F.dropout(chosen, dropout)
        base = F.linear(chosen, weight.to(dtype))
    else:
        base = flat.index_select(0, rows)
        base = base if bias is None else base - bias
    with torch.no_grad():
        # in the dtype of the magnitude, which at the start is this very number
        norm = weight_norm(weight, lora_a, lora_b, scaling=scaling).to(magnitude.dtype)
        flat_row = norm == 0
    # A row of zeros has no direction; masked in both places, or its gradient is NaN
    stretch = (magnitude / norm.masked_fill(flat_row, 1)).masked_fill(flat_row, 1).to(dtype)
    update = F.linear(F.linear(chosen, lora_a.to(dtype)), lora_b.to(dtype)) * scaling
    change = (stretch - 1) * base + stretch * update
    return flat.index_add(0, rows, change.to(output.dtype)).view(output.shape)
