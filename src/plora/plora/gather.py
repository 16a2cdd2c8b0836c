"""The low-rank update of chosen rows, and of nothing else.

Letters of shapes: P flattened positions, K input features, N output features, R chosen rows,
r the rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank(
    output: Tensor,
    hidden_states: Tensor,
    rows: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`output` with ``scaling * B A dropout(x)`` added on the chosen rows.

    Other rows are copied, so they stay what they were to the bit. The update is computed in the
    dtype of `hidden_states`, to which A and B are cast: they are small, the activations are not.
    With no row at all the result is still connected to A and B, and their gradients are zeros.

    Equals: ``output + scaling * m[..., None] * (dropout(x) @ A.T @ B.T)``, m being 1 on the rows.

    Args:
        output: (..., N), the base layer's result.
        hidden_states: (..., K), the base layer's input, with the same leading shape.
        rows: (R,) int64, distinct indices into the P flattened leading positions.
        lora_a: (r, K).
        lora_b: (N, r).
        scaling: Factor of the update.
        dropout: Probability of dropping a feature of a chosen row; 0 outside training.

    Returns:
        (..., N), dtype of `output`.
    """
    chosen = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, rows)
    if dropout > 0.0:
        chosen = F.dropout(chosen, dropout)
    dtype = hidden_states.dtype
    update = F.linear(F.linear(chosen, lora_a.to(dtype)), lora_b.to(dtype)) * scaling
    flat = output.reshape(-1, output.shape[-1])
    return torch.index_add(flat, 0, rows, update.to(output.dtype)).view(output.shape)
