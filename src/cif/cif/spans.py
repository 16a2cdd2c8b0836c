"""The frames of a whole batch laid out along its tokens.

Shapes: F frames of the batch, M tokens of the batch, L = F + M intervals.

Row after row stands on one axis of tokens. Each frame covers a span of it; the ends of the frames
and the ends of the tokens together cut the axis into F + M intervals. Each lies within one frame
and one token, and the list of them is sorted by frame and by token at once: its length is fixed
before anything is known about the fires.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cif.prefix import FRACTION_BITS, MAX_TOTAL, ONE


class Spans(NamedTuple):
    """Where the frames begin and end, and what a token weighs.

    Attributes:
        starts: (F,) int64, Q.40, where each frame begins on the axis of tokens; increasing.
        ends: (F,) int64, Q.40, where it ends: at or after its start, at or before the next start.
        limits: (F,) int64, the index one past the last token that the frame's row fires; `ends`
            stops there.
        readable: (F,) bool, False at masked frames; None where all are real.
        units: (M,) float32 or float64, the weight of one whole token: the threshold, or NaN to
            poison the tokens of a row. Sums and weights are of this dtype.
        levels: (2, F) float64, the starts and the ends in tokens from the beginning of the row.
            Only their gradients are used.
        rows: how many rows there are, all with as many frames and as many tokens; 1 where they are
            not alike.
    """

    starts: Tensor
    ends: Tensor
    limits: Tensor
    readable: Tensor | None
    units: Tensor
    levels: Tensor
    rows: int


def lay_out(
    starts: Tensor,
    ends: Tensor,
    limits: Tensor,
    *,
    num_tokens: int,
    units: Tensor,
    levels: Tensor,
    frame_mask: Tensor | None = None,
) -> Spans:
    """Put the rows of a padded batch one after the other, N tokens each.

    Args:
        starts: (B, T) int64, Q.40, in tokens from the beginning of the row.
        ends: (B, T) int64.
        limits: (B,) int64, the tokens that each row fires.
        num_tokens: N.
        units: (B,) float.
        levels: (2, B, T) float64.
        frame_mask: (B, T) bool, False at masked frames.
    """
    batch, frames = starts.shape
    check_axis(batch * num_tokens)
    base = torch.arange(batch, device=starts.device)[:, None] * num_tokens
    return Spans(
        starts=(starts + (base << FRACTION_BITS)).flatten(),
        ends=(ends + (base << FRACTION_BITS)).flatten(),
        limits=(base + limits[:, None]).expand(batch, frames).flatten(),
        readable=None if frame_mask is None else frame_mask.flatten(),
        units=units[:, None].expand(batch, num_tokens).flatten(),
        levels=levels.flatten(1),
        rows=batch,
    )


def check_axis(tokens: int) -> None:
    """Raise ValueError where a batch has more tokens than fit on the axis: 2**23 of 2**40 steps."""
    # A size that is traced is no int, and comparing it would narrow what is traced.
    if isinstance(tokens, int) and tokens > 2 * MAX_TOTAL - 1:
        raise ValueError(
            f"hidden_states: expected fewer than {2 * MAX_TOTAL} tokens in a batch, rows times "
            f"max_tokens, got {tokens}; split the batch or lower max_tokens"
        )


class Intervals(NamedTuple):
    """The merged list: F intervals that end with their frame, then M that end with their token.

    Attributes:
        frames: (L,) int64, the frame of each interval; F where a token is never complete.
        tokens: (L,) int64, the token; M where a frame ends with the last one.
        sizes: (L,) int64, the length in Q.40, at least 0.
        order: (L,) int64, the place in the sorted list.
        num_frames: F.
    """

    frames: Tensor
    tokens: Tensor
    sizes: Tensor
    order: Tensor
    num_frames: int


def merge(starts: Tensor, ends: Tensor, num_tokens: int) -> Intervals:
    """Merge the ends of frames and tokens.

    Args:
        starts: (F,) int64, as in `Spans`; F at least 1.
        ends: (F,) int64.
        num_tokens: M.
    """
    frames = starts.shape[0]
    frame = torch.arange(frames, device=starts.device)
    token = torch.arange(num_tokens, device=starts.device)
    token_ends = (token + 1) << FRACTION_BITS
    frame_token = ends >> FRACTION_BITS
    token_frame = torch.searchsorted(ends, token_ends)
    inside = token_frame.clamp(max=frames - 1)
    ends_at_frame = ends - torch.maximum(starts, frame_token << FRACTION_BITS)
    ends_at_token = token_ends - torch.maximum(starts[inside], token_ends - ONE)
    # A token of which a part is missing ends in the gap before the next row, or after the last one.
    ends_at_token = torch.where(token_frame < frames, ends_at_token, 0).clamp_(min=0)
    return Intervals(
        frames=torch.cat([frame, token_frame]),
        tokens=torch.cat([frame_token, token]),
        sizes=torch.cat([ends_at_frame, ends_at_token]),
        order=torch.cat([frame + frame_token, token_frame + token]),
        num_frames=frames,
    )
