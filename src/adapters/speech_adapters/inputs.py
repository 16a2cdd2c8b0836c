"""The check that every adapter makes of what it is given.

Shapes: B batch, T input frames, D input width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def checked_mask(hidden_states: Tensor, attention_mask: Tensor | None, input_size: int) -> Tensor:
    """Check the shapes, and return the mask as bool.

    Args:
        hidden_states: (B, T, D).
        attention_mask: (B, T) bool or int, or None for no padding.
        input_size: the D that the adapter was built for.

    Returns:
        (B, T) bool, True on real frames.

    Raises:
        TypeError: the mask is neither bool nor integer.
        ValueError: a shape does not fit, or there is no frame at all.
    """
    if hidden_states.ndim != 3 or hidden_states.shape[-1] != input_size:
        raise ValueError(
            f"hidden_states: expected (B, T, {input_size}), got {tuple(hidden_states.shape)}; "
            "input_size of the adapter's config must be the speech encoder's width"
        )
    if hidden_states.shape[1] == 0:
        raise ValueError(
            f"hidden_states: expected at least one frame, got {tuple(hidden_states.shape)}; "
            "leave empty audio out of the batch"
        )
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            "attention_mask: expected bool or integer, nonzero at real frames, got "
            f"{attention_mask.dtype}; an additive mask becomes one by `mask == 0`"
        )
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask: expected (B, T) = {tuple(hidden_states.shape[:2])}, got "
            f"{tuple(attention_mask.shape)}; it counts encoder frames, not samples or mel frames"
        )
    return attention_mask.bool()
