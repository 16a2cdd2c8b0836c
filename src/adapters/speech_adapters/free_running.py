"""Rows of known and of unknown length in one batch: training that meets inference's conditions.

Shapes: B batch, S frames, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cif import CIF, CIFOutput


def fire(
    cif: CIF,
    frames: Tensor,
    attention_mask: Tensor,
    *,
    target_lengths: Tensor | None,
    free_running: Tensor | None,
    max_tokens: int | None,
) -> CIFOutput:
    """Fire each row's target length of tokens, or, where it is free-running, the predicted one.

    Args:
        cif: the layer.
        frames: (B, S, D).
        attention_mask: (B, S) bool.
        target_lengths: (B,) int, or None for predicted lengths in all rows.
        free_running: (B,) bool, True on rows whose target length is not used; None for no such row.
        max_tokens: N, if it is known.

    Returns:
        What ``cif`` returns, each row as it would come out of a batch of its own kind.

    Raises:
        TypeError: ``free_running`` is not bool.
        ValueError: ``free_running`` or ``target_lengths`` has another shape than (B,).
    """
    if free_running is not None and free_running.dtype != torch.bool:
        raise TypeError(f"free_running: expected bool, got {free_running.dtype}; use .bool()")
    if target_lengths is not None and target_lengths.shape != frames.shape[:1]:
        raise ValueError(
            f"target_lengths: expected one for each row, shape {tuple(frames.shape[:1])}, got "
            f"{tuple(target_lengths.shape)}"
        )
    if free_running is not None and free_running.shape != frames.shape[:1]:
        raise ValueError(
            f"free_running: expected one value for each row, shape {tuple(frames.shape[:1])}, got "
            f"{tuple(free_running.shape)}"
        )
    if target_lengths is None or free_running is None or not free_running.any():
        fired: CIFOutput = cif(
            frames, attention_mask, target_lengths=target_lengths, max_tokens=max_tokens
        )
        return fired
    free, given = free_running.nonzero()[:, 0], (~free_running).nonzero()[:, 0]
    alone: CIFOutput = cif(frames[free], attention_mask[free], max_tokens=max_tokens)
    if not len(given):
        return alone
    told: CIFOutput = cif(
        frames[given],
        attention_mask[given],
        target_lengths=target_lengths[given.to(target_lengths.device)],
        max_tokens=max_tokens,
    )
    # where each row of the batch is in the two outputs put one below the other
    order = torch.cat([free, given]).argsort()
    longest = max(alone.attention_mask.shape[1], told.attention_mask.shape[1])

    def joined(first: Tensor, second: Tensor, *, padded: bool) -> Tensor:
        both = [first, second]
        if padded:
            missing = [(0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]) for x in both]
            both = [F.pad(x, pad) for x, pad in zip(both, missing, strict=True)]
        return torch.cat(both)[order]

    assert alone.alphas is not None
    assert told.alphas is not None
    return CIFOutput(
        hidden_states=joined(alone.hidden_states, told.hidden_states, padded=True),
        lengths=joined(alone.lengths, told.lengths, padded=False),
        attention_mask=joined(alone.attention_mask, told.attention_mask, padded=True),
        alpha_sum=joined(alone.alpha_sum, told.alpha_sum, padded=False),
        fire_times=joined(alone.fire_times, told.fire_times, padded=True),
        alphas=joined(alone.alphas, told.alphas, padded=False),
    )
