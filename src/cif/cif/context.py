"""Frames of a stream that wait for their neighbours.

Shapes: B batch, T frames of the chunk, D width, C neighbours on either side, K frames kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Ready(NamedTuple):
    """The frames of a stream whose neighbours are known.

    Attributes:
        hidden_states: (B, T', D), the frames.
        frame_mask: (B, T') bool, or None where all are real.
        padded: (B, C + T' + C, D), the same with the C frames on either side, zeros beyond the ends
            of the stream and in padding; of no use where T' is 0.
        context: (B, K, D), for the next chunk; context_mask: (B, K) bool.
    """

    hidden_states: Tensor
    frame_mask: Tensor | None
    padded: Tensor
    context: Tensor | None = None
    context_mask: Tensor | None = None


def with_neighbours(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    *,
    reach: int,
    final: bool,
) -> Ready:
    """Put a chunk behind the frames that were kept and say which of them are ready.

    Args:
        hidden_states: (B, T, D) float.
        attention_mask: (B, T) bool or integer.
        context: (B, K, D), what the last chunk left; None at the start.
        context_mask: (B, K) bool.
        reach: C, the neighbours on either side that a frame needs.
        final: no more will come.
    """
    frame_mask = None if attention_mask is None else attention_mask.bool()
    if reach == 0:
        return Ready(hidden_states, frame_mask, hidden_states)
    if frame_mask is None:
        frame_mask = torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
    frames = torch.where(frame_mask[..., None], hidden_states, 0.0)
    if context is None or context_mask is None:
        frames = F.pad(frames, (0, 0, reach, 0))
        frame_mask = F.pad(frame_mask, (reach, 0))
    else:
        frames = torch.cat([context, frames], dim=1)
        frame_mask = torch.cat([context_mask, frame_mask], dim=1)
    if final:
        frames, frame_mask = F.pad(frames, (0, 0, 0, reach)), F.pad(frame_mask, (0, reach))
    done = max(frames.shape[1] - 2 * reach, 0)
    ready = slice(reach, reach + done)
    return Ready(
        frames[:, ready], frame_mask[:, ready], frames, frames[:, done:], frame_mask[:, done:]
    )
