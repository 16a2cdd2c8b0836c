"""From per-token losses to the value that is returned.

Letters: n tokens that count.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    """Raise unless ``reduction`` is known and ``num_items`` fits to it."""
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction: expected one of {', '.join(get_args(Reduction))}, got {reduction!r}"
        )
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items: it is the divisor of reduction='mean', got reduction={reduction!r}; "
            "drop it or use 'mean'"
        )
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(
            f"num_items: expected one number, got a tensor of shape {tuple(num_items.shape)}; "
            "sum the counts first"
        )


def reduce_loss(
    losses: Tensor,
    reduction: Reduction,
    num_items: float | Tensor | None,
    valid: Tensor | None = None,
) -> Tensor:
    """Reduce per-token losses.

    Args:
        losses: (n,) floating point.
        reduction: "none", "sum", or "mean": the sum divided by max(1, n).
        num_items: divides instead of n; 1 if it is less. Under gradient accumulation or data
            parallelism give the count of the whole global batch; the micro-batches' losses then add
            up to its mean.
        valid: (n,) boolean, where False the loss is 0 and doesn't count; None: all count.

    Returns:
        (n,) for "none", else a scalar. For n = 0 the scalar is a zero that is still connected to
        the graph, so that backward works and gives zero gradients.
    """
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / divisor(num_items, losses.numel() if valid is None else valid.sum(), total)


def divisor(num_items: float | Tensor | None, count: int | Tensor, like: Tensor) -> float | Tensor:
    """What a sum is divided by to be a mean: num_items, else the count; at least 1."""
    number = count if num_items is None else num_items
    if isinstance(number, Tensor):
        return number.detach().reshape(()).to(like).clamp(min=1)
    return max(1, number)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, sums and losses: float32 for half precision, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def check_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is a positive finite number."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature: expected a positive finite number, got {temperature}; 1.0 is neutral"
        )
