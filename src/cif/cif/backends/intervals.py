"""Frames and tokens merged into one sorted list of intervals.

Shapes: B batch, T frames, N tokens, L = T + N intervals.

The ends of the frames, c_1 <= ... <= c_T, and the ends of the tokens, 1 < ... < N, cut the axis of
accumulated weight into T + N intervals. Each lies within one frame and one token, and the list is
sorted by frame and by token at once: its length is fixed before anything is known about the fires.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cif.prefix import FRACTION_BITS, ONE


class Intervals(NamedTuple):
    """The merged list, and where each frame and token begins in it.

    Attributes:
        frames: (B, L) int64, the frame to read. An interval without weight that belongs to a frame
            without weight names a neighbour that has some, so that nothing in padding is read.
        tokens: (B, L) int64, the token of the interval, at most N - 1.
        sizes: (B, L) int64, the length in Q.40; 0 outside the row's own tokens.
        token_starts: (B, N) int64, the first interval of each token.
        frame_starts: (B, T) int64, the first interval of each frame.
        frame_ends: (B, T) int64, the last interval of each frame.
    """

    frames: Tensor
    tokens: Tensor
    sizes: Tensor
    token_starts: Tensor
    frame_starts: Tensor
    frame_ends: Tensor


def merge(prefix: Tensor, lengths: Tensor, num_tokens: int) -> Intervals:
    """Merge the ends of frames and tokens.

    Args:
        prefix: (B, T) int64, Q.40, monotone along T; T at least 1.
        lengths: (B,) int64, the tokens of each row, at most `num_tokens`.
        num_tokens: N, at least 1.

    Returns:
        The intervals, in order, per row.
    """
    batch, frames = prefix.shape
    frame = torch.arange(frames, device=prefix.device)
    token = torch.arange(num_tokens, device=prefix.device)
    token_ends = (token + 1) << FRACTION_BITS

    padded = F.pad(prefix, (1, 0))
    frame_token = (prefix >> FRACTION_BITS).clamp(max=num_tokens)
    token_frame = torch.searchsorted(prefix, token_ends.expand(batch, -1).contiguous())
    # The first frame that reaches a level has weight: the level was not reached before it.
    readable = torch.searchsorted(prefix, prefix.clamp(min=1)).clamp_(max=frames - 1)

    ends_at_frame = prefix - torch.maximum(padded[:, :-1], frame_token << FRACTION_BITS)
    ends_at_token = torch.minimum(token_ends, prefix[:, -1:]) - torch.maximum(
        padded.gather(1, token_frame), token_ends - ONE
    )
    lengths = lengths[:, None]
    sizes = torch.cat(
        [
            torch.where(frame_token < lengths, ends_at_frame, 0),
            torch.where(token < lengths, ends_at_token, 0).clamp_(min=0),
        ],
        dim=1,
    )
    frame_ends = frame + frame_token
    order = torch.cat([frame_ends, token_frame + token], dim=1)
    read = torch.cat([readable, readable.gather(1, token_frame.clamp(max=frames - 1))], dim=1)
    owner = torch.cat([frame_token.clamp(max=num_tokens - 1), token.expand(batch, -1)], dim=1)
    return Intervals(
        frames=torch.empty_like(read).scatter_(1, order, read),
        tokens=torch.empty_like(owner).scatter_(1, order, owner),
        sizes=torch.empty_like(sizes).scatter_(1, order, sizes),
        token_starts=F.pad((token_frame + token + 1)[:, :-1], (1, 0)),
        frame_starts=F.pad((frame_ends + 1)[:, :-1], (1, 0)),
        frame_ends=frame_ends,
    )
