"""CIF for frames that come in chunks.

Shapes: B batch, T frames of the chunk, N tokens that the chunk completes, D width, K frames kept.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cif.alignment import longest
from cif.backends import Backend, resolve
from cif.backends.dispatch import integrate
from cif.functional import CIFOutput
from cif.prefix import FRACTION_BITS, ONE, Tail, fixed_point_prefix, moment, tail_counts
from cif.rows import UsableAlphas, usable_alphas
from cif.spans import lay_out
from cif.validation import check_alphas, check_hidden_states, check_options

StreamTail = Literal["threshold", "drop", "keep"]


class CIFState(NamedTuple):
    """What a stream remembers of its rows from one chunk to the next.

    The first axis of each tensor is the batch, so that indexing them all chooses rows, or puts them
    in another order.

    Attributes:
        rest: (B,) int64, the begun token, as a fixed-point number with 40 fractional bits; below 1.
        partial: (B, D) float32 (float64 for float64 input), the begun token's weighted sum.
        frames: (B,) int64, the frames seen, padding included.
        last: (B,) int64, those up to and including the last one that had any weight.
        tokens: (B,) float64, the whole tokens so far; NaN once an alpha was not finite.
        context: (B, K, D), the frames whose alphas need more of their neighbours, and those
            neighbours; None from the function, and where the layer's head looks at one frame.
        context_mask: (B, K) bool, False at masked frames.
    """

    rest: Tensor
    partial: Tensor
    frames: Tensor
    last: Tensor
    tokens: Tensor
    context: Tensor | None = None
    context_mask: Tensor | None = None


def cif_stream(
    hidden_states: Tensor,
    alphas: Tensor,
    state: CIFState | None = None,
    *,
    attention_mask: Tensor | None = None,
    threshold: float = 1.0,
    tail: Tail = "threshold",
    tail_threshold: float = 0.5,
    final: bool = False,
    max_tokens: int | None = None,
    backend: Backend = "auto",
) -> tuple[CIFOutput, CIFState]:
    """Integrate the next frames of a batch of streams; for inference, without gradients.

    However a row is cut into chunks, together they give what `cif.cif` gives for the whole row:
    bitwise the same lengths, fire times and sum of alpha, and the same tokens up to the rounding of
    a sum in two parts.

    Args:
        hidden_states: (B, T, D) float, the next T frames of each row; T may be 0.
        alphas: (B, T) float. A row with a bad alpha (see `cif.cif`) gives a token of NaN with this
            chunk and with each that follows.
        state: what the last call returned; None at the start.
        attention_mask: (B, T) bool or integer, nonzero at real frames. A row that has ended, while
            others have not, goes on with masked frames.
        threshold: as for `cif.cif`, and the same in all calls.
        tail: what becomes of the begun token at the end: "threshold", "drop" or "keep".
        tail_threshold: in (0, 1], for `tail="threshold"`.
        final: these are the last frames of all rows: the rest is dealt with by the tail rule, and
            the returned state is that of a start.
        max_tokens: N. Tokens beyond that are lost; a chunk completes at most the sum of its alphas
            in tokens, rounded up, and one more. If None, N is the largest length, which is read
            from the device.
        backend: "auto", "triton" or "torch".

    Returns:
        The tokens that the chunk completes, and the state. `lengths` counts those tokens,
        `fire_times` are in frames from the start of the stream, `alpha_sum` is the sum so far.

    Raises:
        TypeError: a tensor has a dtype of the wrong kind.
        ValueError: as for `cif.cif`; or `tail="round"`, which needs the whole row at once; or the
            state is one of another batch or width.
    """
    check_hidden_states(hidden_states, alphas)
    check_alphas(alphas, attention_mask, None)
    check_options(threshold, tail, tail_threshold, max_tokens, backend)
    check_stream(tail, backend)
    backend = resolve(backend, hidden_states.device)
    if hidden_states.dtype == torch.float64:
        alphas = alphas.double()
    with torch.no_grad():
        usable = usable_alphas(alphas, attention_mask, threshold)
        state = _checked(state, hidden_states, usable.alphas.dtype)
        # A sum that was not finite stays so, whatever comes.
        usable = usable._replace(valid=usable.valid & state.tokens.isfinite())
        chunk = _Chunk.of(usable, state, threshold)
        lengths = chunk.whole
        if final:
            lengths = tail_counts(chunk.totals, tail, tail_threshold).where(usable.valid, 1)
        if max_tokens is None:
            max_tokens = longest(lengths)
        hidden, partial = _integrate(hidden_states, chunk, state, max_tokens, backend)
        token = torch.arange(max_tokens, device=lengths.device)
        times = chunk.fire_times(token, state.frames)
        if final:
            # What is fired of the rest stands behind the whole tokens.
            fired = (token == chunk.whole[:, None]) & (lengths > chunk.whole)[:, None]
            made_whole = ONE / chunk.rest.clamp(min=1).double() if tail == "threshold" else 1.0
            ended = (partial * torch.as_tensor(made_whole).to(partial).view(-1, 1))[:, None]
            hidden = torch.where(fired[..., None], ended, hidden)
            times = torch.where(fired, chunk.last[:, None].double(), times)
        whole = (state.tokens + chunk.whole).where(usable.valid, torch.nan)
        # Rounded once, as the sum of the whole row is.
        tokens = whole + chunk.rest.double() / ONE
        lengths = lengths.clamp(max=max_tokens)
        output = CIFOutput(
            hidden_states=hidden.to(hidden_states.dtype),
            lengths=lengths,
            attention_mask=token < lengths[:, None],
            alpha_sum=tokens.to(chunk.units.dtype) * chunk.units,
            fire_times=times.float(),
        )
        if final:
            return output, _start(hidden_states, partial.dtype)
        frames = state.frames + hidden_states.shape[1]
        return output, CIFState(chunk.rest, partial, frames, chunk.last, whole)


def check_stream(tail: str, backend: str) -> None:
    """Raise ValueError where an option of `cif.cif` cannot be had in a stream."""
    if tail == "round":
        raise ValueError(
            'tail: "round" scales a row as a whole, which a stream never sees; choose "threshold", '
            '"drop" or "keep", for a layer trained with "round" too'
        )
    if backend == "dense":
        raise ValueError(
            'backend: "dense" is for derivatives and export; in a stream choose "auto", "torch" or '
            '"triton"'
        )


class _Chunk(NamedTuple):
    """The fires of a chunk.

    Attributes:
        starts: (B, T) int64, Q.40, where each frame begins, in tokens from the beginning of the
            token that the last chunk left; ends: where it ends.
        totals: (B,) int64, Q.40, the sum of the chunk's alphas and of what was left.
        whole: (B,) int64, the tokens completed; rest: (B,) int64, Q.40, what is left.
        last: (B,) int64, as in `CIFState`.
        units: (B,) float, as in `cif.rows.Rows`.
    """

    starts: Tensor
    ends: Tensor
    totals: Tensor
    whole: Tensor
    rest: Tensor
    last: Tensor
    units: Tensor

    @classmethod
    def of(cls, usable: UsableAlphas, state: CIFState, threshold: float) -> _Chunk:
        batch, frames = usable.alphas.shape
        prefix = fixed_point_prefix(usable.alphas, threshold)
        edges = torch.cat([prefix.new_zeros(batch, 1), prefix], dim=1)
        edges = edges + state.rest[:, None]
        starts, ends = edges[:, :-1], edges[:, 1:]
        frame = torch.arange(frames, device=prefix.device) + state.frames[:, None]
        weighed = torch.where(ends > starts, frame + 1, 0)
        last = torch.cat([state.last[:, None], weighed], dim=1).amax(dim=1)
        totals = edges[:, -1]
        whole = (totals >> FRACTION_BITS).where(usable.valid, 1)
        return cls(
            starts=starts,
            ends=ends,
            totals=totals,
            whole=whole,
            rest=(totals % ONE).where(usable.valid, 0),
            last=last,
            units=torch.full_like(usable.sums, threshold).where(usable.valid, torch.nan),
        )

    def fire_times(self, token: Tensor, frames_before: Tensor) -> Tensor:
        """Locate the end of each whole token, (N,): (B, N) float64, 0 where there is none."""
        batch, frames = self.ends.shape
        if frames == 0:
            return torch.zeros(batch, len(token), dtype=torch.float64, device=token.device)
        edges = ((token + 1) << FRACTION_BITS).expand(batch, -1).contiguous()
        frame = torch.searchsorted(self.ends.contiguous(), edges).clamp(max=frames - 1)
        before, after = self.starts.gather(1, frame), self.ends.gather(1, frame)
        times = moment(frame, before, after, edges) + frames_before[:, None]
        return torch.where(token < self.whole[:, None], times, 0.0)


def _integrate(
    hidden_states: Tensor, chunk: _Chunk, state: CIFState, num_tokens: int, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Sum the frames of each whole token, (B, N, D), and of the one that is begun, (B, D)."""
    batch, frames, width = hidden_states.shape
    flat = hidden_states.reshape(batch * frames, width)
    levels = torch.zeros(2, batch, frames, dtype=torch.float64, device=flat.device)
    edges = chunk.starts, chunk.ends
    done = chunk.whole[:, None] << FRACTION_BITS

    def summed(points: tuple[Tensor, Tensor], limits: Tensor, count: int) -> Tensor:
        spans = lay_out(*points, limits, num_tokens=count, units=chunk.units, levels=levels)
        return integrate(flat, spans, chunk.units.dtype, backend).view(batch, count, width)

    kept = chunk.whole.clamp(max=num_tokens)
    ceiling = kept[:, None] << FRACTION_BITS
    hidden = summed((edges[0].minimum(ceiling), edges[1].minimum(ceiling)), kept, num_tokens)
    begun = summed(
        ((edges[0] - done).clamp(0, ONE), (edges[1] - done).clamp(0, ONE)),
        torch.ones_like(kept),
        1,
    )[:, 0]
    # What was begun belongs to the first token; it stays begun if none is complete.
    if num_tokens > 0:
        hidden[:, 0] += torch.where((kept > 0)[:, None], state.partial, 0.0)
    begun += torch.where((chunk.whole == 0)[:, None], state.partial, 0.0)
    return hidden, begun.where(~chunk.units.isnan()[:, None], torch.nan)


def _start(hidden_states: Tensor, dtype: torch.dtype) -> CIFState:
    batch, _, width = hidden_states.shape
    none = torch.zeros(batch, dtype=torch.int64, device=hidden_states.device)
    return CIFState(
        rest=none,
        partial=torch.zeros(batch, width, dtype=dtype, device=none.device),
        frames=none,
        last=none,
        tokens=none.double(),
    )


def _checked(state: CIFState | None, hidden_states: Tensor, dtype: torch.dtype) -> CIFState:
    if state is None:
        return _start(hidden_states, dtype)
    expected = (hidden_states.shape[0], hidden_states.shape[2])
    if tuple(state.partial.shape) != expected:
        raise ValueError(
            f"state: expected one of shape (B, D) = {expected} of hidden_states, "
            f"got {tuple(state.partial.shape)}; start a new stream with state=None"
        )
    if state.partial.device != hidden_states.device:
        raise ValueError(
            f"state: expected device {hidden_states.device} of hidden_states, "
            f"got {state.partial.device}"
        )
    return state
