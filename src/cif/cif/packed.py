"""CIF for rows of different lengths that lie one after the other, without padding.

Shapes: S rows, F frames of all rows, M tokens of all rows, D width, T frames of the longest row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cif.alignment import tail_factors
from cif.backends import Backend, resolve
from cif.backends.dispatch import integrate
from cif.prefix import FRACTION_BITS, ONE, Rule, Tail, moment, row_totals
from cif.rows import Rows, build_rows
from cif.spans import Spans, check_axis
from cif.validation import check_options, check_packed


class CIFPackedOutput(NamedTuple):
    """What `cif_packed` returns.

    Attributes:
        hidden_states: (M, D), the tokens of all rows, row after row, in the dtype of the input;
            zeros past the last one.
        cu_seqlens: (S + 1,), where each row's tokens begin and the last one's end, in the dtype of
            the input's.
        lengths: (S,) int64, the tokens of each row.
        alpha_sum: (S,) float32 (float64 for float64 input), as in `cif.CIFOutput`.
        fire_times: (M,) float32, in frames from the start of the token's own row.
    """

    hidden_states: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    alpha_sum: Tensor
    fire_times: Tensor


def cif_packed(
    hidden_states: Tensor,
    alphas: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    target_lengths: Tensor | None = None,
    threshold: float = 1.0,
    tail: Tail = "round",
    tail_threshold: float = 0.5,
    max_tokens: int | None = None,
    backend: Backend = "auto",
) -> CIFPackedOutput:
    """Integrate rows that are packed as for attention kernels with variable lengths.

    The result of each row is bitwise that of `cif.cif` on the row. The frames are neither padded
    nor copied; only the alphas are, to decide the fires.

    Args:
        hidden_states: (F, D) float, the frames of all rows.
        alphas: (F,) float.
        cu_seqlens: (S + 1,) int32 or int64, S at least 1, where each row begins and the last one
            ends: from 0 to F, never decreasing; ``F.pad(lengths.cumsum(0), (1, 0))``.
        max_seqlen: T, at least the length of the longest row, of which frames past T would not be
            read. If None, it is read from the device.
        target_lengths: (S,) integer, as for `cif.cif`, like all that follow unless it is said.
        threshold: the sum of alpha that makes one token.
        tail: the rule for the rest.
        tail_threshold: in (0, 1], for `tail="threshold"`.
        max_tokens: M, the tokens of all rows together. Of a longer result the end is cut off: what
            does not fit of the row in which M is reached, and all rows after it. If None, M is the
            sum of the lengths, which is read from the device.
        backend: "auto", "triton" or "torch".

    Returns:
        The packed tokens. Nothing waits for the device where both `max_seqlen` and `max_tokens` are
        given.

    Raises:
        TypeError: a tensor has a dtype of the wrong kind.
        ValueError: shapes or devices do not fit, or an option is out of range. Values on the
            device are looked at only where one is read anyway: then `cu_seqlens` that do not lead
            from 0 to F are an error. Or the backend cannot run here.
    """
    check_packed(hidden_states, alphas, cu_seqlens, target_lengths, max_seqlen)
    check_options(threshold, tail, tail_threshold, max_tokens, backend)
    if backend == "dense":
        raise ValueError(
            'backend: "dense" writes out a matrix for a padded batch; for packed rows choose '
            '"auto", "torch" or "triton"'
        )
    backend = resolve(backend, hidden_states.device)
    if hidden_states.dtype == torch.float64:
        alphas = alphas.double()
    cu_frames = cu_seqlens.to(torch.int64)
    if max_seqlen is None:
        max_seqlen = _longest_row(cu_frames, hidden_states.shape[0])
    place = _Place.of(cu_frames, hidden_states.shape[0], max_seqlen)
    rows = build_rows(
        place.pad(alphas),
        place.mask,
        target_lengths,
        Rule(threshold, tail, tail_threshold),
    )
    cu_tokens = F.pad(rows.counts.cumsum(0), (1, 0))
    if max_tokens is None:
        max_tokens = _all_tokens(cu_tokens, cu_frames, target_lengths, hidden_states.shape[0])
    spans, row = _spans(rows, place, cu_tokens, max_tokens)
    cut = cu_tokens.clamp(max=max_tokens)
    token = torch.arange(max_tokens, device=row.device) - cu_tokens[row]
    rests = target_lengths is None and tail == "threshold"
    dtype = rows.alpha_sum.dtype if rests else hidden_states.dtype
    hidden = integrate(hidden_states, spans, dtype, backend)
    if rests:
        sums = (rows.alpha_sum / threshold)[row]
        factors = tail_factors(rows.totals[row], sums, rows.counts[row], token[:, None])
        hidden = (hidden * factors).to(hidden_states.dtype)
    return CIFPackedOutput(
        hidden_states=hidden,
        cu_seqlens=cut.to(cu_seqlens.dtype),
        lengths=cut.diff(),
        alpha_sum=rows.alpha_sum,
        fire_times=_fire_times(rows, place, spans, row, token),
    )


class _Place(NamedTuple):
    """Where the frames stand in a padded batch.

    Attributes:
        cu_frames: (S + 1,) int64.
        rows: (F,) int64, the row of each frame; steps: (F,) int64, its place in the row, at most T.
        mask: (S, T) bool, True at frames.
    """

    cu_frames: Tensor
    rows: Tensor
    steps: Tensor
    mask: Tensor

    @classmethod
    def of(cls, cu_frames: Tensor, frames: int, longest: int) -> _Place:
        frame = torch.arange(frames, device=cu_frames.device)
        rows = _owner(cu_frames, frame)
        steps = (frame - cu_frames[rows]).clamp(0, longest)
        step = torch.arange(longest, device=cu_frames.device)
        return cls(cu_frames, rows, steps, step < cu_frames.diff()[:, None])

    def pad(self, values: Tensor) -> Tensor:
        """Turn (F,) into (S, T); what lies past T is left out."""
        batch, longest = self.mask.shape
        room = values.new_zeros(batch, longest + 1)
        index = self.rows * (longest + 1) + self.steps
        return room.flatten().scatter(0, index, values).view(batch, longest + 1)[:, :-1]

    def pack(self, before: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the ends of the frames, (S, T), into starts and ends, (F,) each.

        Args:
            before: (S, 1), where the first frame of each row begins.
            ends: (S, T).
        """
        longest = self.mask.shape[1]
        edges = torch.cat([before, ends], dim=1).flatten()
        start = self.rows * (longest + 1) + self.steps
        return edges[start], edges[start + (self.steps < longest)]


def _owner(cumulative: Tensor, index: Tensor) -> Tensor:
    """Find the row that each index lies in, the last row for those past the end."""
    row = torch.searchsorted(cumulative, index, right=True) - 1
    return row.clamp(0, cumulative.shape[0] - 2)


def _spans(rows: Rows, place: _Place, cu_tokens: Tensor, num_tokens: int) -> tuple[Spans, Tensor]:
    """Put the rows one after the other on the axis of M tokens.

    Returns:
        The spans, and the row of each token, (M,) int64.
    """
    base = cu_tokens[:-1, None] << FRACTION_BITS
    fired = rows.counts.where(rows.totals > 0, 0)
    ends = rows.prefix.minimum((fired << FRACTION_BITS)[:, None])
    # A row with bad alphas has been spread over padding that is not here: its last frame takes
    # what is left, so that every token of it comes out as NaN.
    step = torch.arange(1, ends.shape[1] + 1, device=ends.device)
    spread = rows.units.isnan()[:, None] & (step >= place.cu_frames.diff()[:, None])
    ends = base + torch.where(spread, (fired << FRACTION_BITS)[:, None], ends)
    starts, ends = place.pack(base, ends)
    levels = place.pack(rows.levels.new_zeros(base.shape), rows.levels)
    limits = (cu_tokens[:-1] + fired).clamp(max=num_tokens)
    row = _owner(cu_tokens, torch.arange(num_tokens, device=cu_tokens.device))
    check_axis(num_tokens)
    spans = Spans(
        starts=starts.clamp(max=num_tokens * ONE),
        ends=ends.clamp(max=num_tokens * ONE),
        limits=limits[place.rows],
        readable=None,
        units=rows.units[row],
        levels=torch.stack(levels),
        rows=1,
    )
    return spans, row


def _fire_times(rows: Rows, place: _Place, spans: Spans, row: Tensor, token: Tensor) -> Tensor:
    """Do what `cif.prefix.fire_times` does for tokens of all rows: (M,) float32.

    Args:
        rows: the fires; place: the frames; spans: on the axis of tokens.
        row: (M,) int64, the row of each token; token: (M,) int64, its place in the row.
    """
    if place.rows.shape[0] == 0 or token.shape[0] == 0:
        return torch.zeros(token.shape[0], dtype=torch.float32, device=token.device)
    totals = row_totals(rows.prefix)[row]
    edges = torch.minimum((token + 1) << FRACTION_BITS, totals)
    position = torch.arange(token.shape[0], device=token.device)
    frame = torch.searchsorted(spans.ends, edges + ((position - token) << FRACTION_BITS))
    longest = rows.prefix.shape[1]
    step = (frame - place.cu_frames[row]).clamp(0, longest - 1)
    # What a frame adds past the last token counts here, although the spans leave it out.
    index = row * longest + step
    after = rows.prefix.flatten()[index]
    before = rows.prefix.flatten()[(index - 1).clamp(min=0)] * (step > 0)
    fired = (token < rows.counts[row]) & (totals > 0)
    return torch.where(fired, moment(step, before, after, edges), 0.0).float()


def _longest_row(cu_frames: Tensor, frames: int) -> int:
    """Read the length of the longest row, and with it that all is in order."""
    low, high = cu_frames.diff().aminmax()
    first, last, shortest, longest = torch.stack([cu_frames[0], cu_frames[-1], low, high]).tolist()
    _check_ends(first, last, frames)
    if shortest < 0:
        raise ValueError(
            "cu_seqlens: expected values that never decrease, got a row of length "
            f"{shortest}; use F.pad(lengths.cumsum(0), (1, 0))"
        )
    return int(longest)


def _all_tokens(
    cu_tokens: Tensor, cu_frames: Tensor, target_lengths: Tensor | None, frames: int
) -> int:
    """Read the number of tokens."""
    least = cu_tokens.new_zeros(())
    if target_lengths is not None and target_lengths.numel() > 0:
        least = target_lengths.min().to(cu_tokens)
    first, last, total, low = torch.stack(
        [cu_frames[0], cu_frames[-1], cu_tokens[-1], least]
    ).tolist()
    _check_ends(first, last, frames)
    if low < 0:
        raise ValueError(f"target_lengths: expected at least 0, got {low}")
    return int(total)


def _check_ends(first: int, last: int, frames: int) -> None:
    if (first, last) != (0, frames):
        raise ValueError(
            f"cu_seqlens: expected to lead from 0 to the {frames} frames of hidden_states, got "
            f"{first} to {last}; use F.pad(lengths.cumsum(0), (1, 0))"
        )
