"""The fixed-point prefix: when tokens fire, decided in integers.

Shapes: B batch, T frames, N tokens.

alpha / threshold is rounded once to 40 fractional bits and summed in int64. Integer addition is
associative, so the fires are bitwise the same under any batching, padding, chunking or scan order;
the token index of a frame is its prefix shifted right by 40 bits, and no epsilon is needed.
A row may sum to less than 2**22 tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

FRACTION_BITS = 40
ONE = 1 << FRACTION_BITS
MAX_TOTAL = 1 << 22

Tail = Literal["round", "threshold", "drop", "keep"]
TAILS: tuple[Tail, ...] = ("round", "threshold", "drop", "keep")


class Rule(NamedTuple):
    """When a token fires; the options of `cif.cif` by these names, checked.

    Attributes:
        threshold: the sum of alpha that makes one token.
        tail: what becomes of the rest after the last whole token.
        tail_threshold: the smallest rest, as a part of a token, that `tail="threshold"` fires.
    """

    threshold: float
    tail: Tail
    tail_threshold: float


def fixed_point_prefix(alphas: Tensor, threshold: float) -> Tensor:
    """Sum the firing weights along the frames, in units of the threshold.

    Args:
        alphas: (B, T) float, finite, at least 0, and 0 at masked frames; rows sum to less than
            threshold * MAX_TOTAL.
        threshold: the amount that makes one token.

    Returns:
        (B, T) int64, round(alphas / threshold * 2**40) summed along T.
    """
    scale: float | Tensor = ONE / threshold
    if torch.onnx.is_in_onnx_export():
        # The exporter would round a Python number to float32.
        scale = torch.tensor(scale, dtype=torch.float64)
    quanta = (alphas.double() * scale).round_()
    return quanta.to(torch.int64).cumsum(dim=1)


def row_totals(prefix: Tensor) -> Tensor:
    """Return the last prefix of each row, (B,) int64; 0 where there are no frames."""
    if prefix.shape[1] == 0:
        return prefix.new_zeros(prefix.shape[0])
    return prefix[:, -1]


def tail_bias(tail: Tail, tail_threshold: float) -> int:
    """Return what is added to a row's sum, in Q.40, before it is cut to whole tokens.

    Args:
        tail: what becomes of the rest after the last whole token, see `cif.cif`.
        tail_threshold: the smallest rest, as a part of a token, that `tail="threshold"` fires.
    """
    if tail == "round":
        return ONE // 2
    if tail == "threshold":
        # No rest at all fires nothing, however low the bar.
        return ONE - max(1, round(tail_threshold * ONE))
    return ONE - 1 if tail == "keep" else 0


def tail_counts(totals: Tensor, tail: Tail, tail_threshold: float) -> Tensor:
    """Decide how many tokens each row fires when no target length is known.

    Args:
        totals: (B,) int64, the last prefix of each row.
        tail: as for `tail_bias`.
        tail_threshold: as for `tail_bias`.

    Returns:
        (B,) int64. Rows that sum to zero fire nothing under every rule.
    """
    counts = (totals + tail_bias(tail, tail_threshold)) >> FRACTION_BITS
    return torch.where(totals > 0, counts.clamp(min=1), counts) if tail == "round" else counts


def scale_prefix(prefix: Tensor, counts: Tensor) -> Tensor:
    """Stretch each row so that it ends at exactly `counts` tokens.

    It is the prefix that is scaled, c = C / C_T * N, not alpha: alpha * (N / sum) summed again ends
    below N in nearly half of all rows, even in float64. C_T / C_T is 1, so this ends at N.

    Args:
        prefix: (B, T) int64 from `fixed_point_prefix`.
        counts: (B,) int64, the tokens each row is to fire.

    Returns:
        (B, T) int64, monotone; rows that sum to zero stay zero.
    """
    totals = row_totals(prefix).clamp(min=1).double()
    # Every step is a correctly rounded float64 operation on one element, hence as reproducible as
    # the integers themselves.
    scaled = (prefix.double() / totals[:, None]) * (counts.double() * ONE)[:, None]
    return scaled.round_().to(torch.int64)


def fire_times(prefix: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """Locate the moment within a frame at which each token is complete.

    Frame f lasts from f to f + 1, and alpha is spread evenly over it. A rest that is fired as a
    token ends with the last frame that has any weight.

    Args:
        prefix: (B, T) int64, already scaled.
        lengths: (B,) int64, the tokens of each row.
        num_tokens: N, the length of the output.

    Returns:
        (B, N) float32 in frames; 0 at positions that hold no token.
    """
    batch, frames = prefix.shape
    if frames == 0 or num_tokens == 0:
        return torch.zeros(batch, num_tokens, dtype=torch.float32, device=prefix.device)
    token = torch.arange(num_tokens, device=prefix.device)
    totals = row_totals(prefix)[:, None]
    edges = torch.minimum((token + 1) << FRACTION_BITS, totals)
    frame = _first_to_reach(prefix, edges)
    after = prefix.gather(1, frame)
    before = prefix.gather(1, (frame - 1).clamp(min=0)) * (frame > 0)
    fired = (token < lengths[:, None]) & (totals > 0)
    return torch.where(fired, moment(frame, before, after, edges), 0.0).float()


def _first_to_reach(prefix: Tensor, edges: Tensor) -> Tensor:
    """Find the first frame whose prefix, (B, T), is at least each edge, (B, N): (B, N) int64."""
    if torch.onnx.is_in_onnx_export():
        # ONNX has no binary search.
        return (prefix[:, None, :] < edges[:, :, None]).sum(dim=-1)
    return torch.searchsorted(prefix, edges)


def moment(frame: Tensor, before: Tensor, after: Tensor, edges: Tensor) -> Tensor:
    """Interpolate: where within its frame a token ends, int64 each, of one shape.

    Args:
        frame: the frame in which it ends; before, after: the prefix on either side of that frame;
        edges: the prefix at which the token is complete.

    Returns:
        float64, in frames.
    """
    return frame + (edges - before).double() / (after - before).clamp(min=1).double()
