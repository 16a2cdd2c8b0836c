"""Which part of which frame goes into which token.

Shapes: B batch, T frames, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cif.backends.torch_backend import integrate
from cif.prefix import FRACTION_BITS, ONE, Rule, fire_times
from cif.rows import build_rows
from cif.spans import Spans, lay_out, merge


class SparseWeights(NamedTuple):
    """The weights that are not zero, as lists sorted by row, token and frame.

    Attributes:
        rows: (K,) int64, the row of the batch.
        tokens: (K,) int64, the token within the row.
        frames: (K,) int64, the frame within the row.
        values: (K,) float, the weight; not differentiable.
    """

    rows: Tensor
    tokens: Tensor
    frames: Tensor
    values: Tensor


@dataclass(frozen=True)
class Alignment:
    """How the frames of a batch are divided among its tokens; what `cif.align` returns.

    Attributes:
        lengths: (B,) int64, the tokens of each row.
        attention_mask: (B, N) bool, True at tokens.
        alpha_sum: (B,) float, the sum of alpha before any scaling, differentiable.
        fire_times: (B, N) float32, the moment each token is complete, in frames from the start of
            the row; 0 where there is no token.
        frame_starts: (B, T) int64, the tokens complete when a frame begins, as a fixed-point number
            with 40 fractional bits.
        frame_ends: (B, T) int64, the same when it ends. Both stop at the row's length.
        frame_mask: (B, T) bool, False at masked frames; None where all are real.
        fired: (B,) int64, `lengths`, but 0 in rows that have nothing to integrate.
        units: (B,) float, the weight of a whole token: the threshold, NaN in rows with bad alphas.
        levels: (2, B, T) float64, `frame_starts` and `frame_ends` up to rounding, differentiable.
        tail_factors: (B, N) float, what makes the token of the rest a whole one, differentiable;
            None unless the tail rule asks for it.
    """

    lengths: Tensor
    attention_mask: Tensor
    alpha_sum: Tensor
    fire_times: Tensor
    frame_starts: Tensor
    frame_ends: Tensor
    frame_mask: Tensor | None
    fired: Tensor
    units: Tensor
    levels: Tensor
    tail_factors: Tensor | None

    @property
    def num_tokens(self) -> int:
        """N, the length of the padded output."""
        return self.attention_mask.shape[1]

    def spans(self) -> Spans:
        """Lay the rows out one after the other, N tokens each."""
        return lay_out(
            self.frame_starts,
            self.frame_ends,
            self.fired,
            num_tokens=self.num_tokens,
            units=self.units,
            levels=self.levels,
            frame_mask=self.frame_mask,
        )

    def weights(self) -> Tensor:
        """Write out the matrix of weights, which `cif.cif` itself never makes.

        Returns:
            (B, N, T) float32 (float64 for float64 alphas), w[n, t] of the definition, zero where
            there is no token; ``weights() @ hidden_states`` are the tokens. Differentiable with
            respect to alphas, any number of times.
        """
        token = torch.arange(self.num_tokens, device=self.fired.device)
        filled_before, filled_after = (
            _filled(points, level, token)
            for points, level in zip((self.frame_starts, self.frame_ends), self.levels, strict=True)
        )
        weights = (filled_after - filled_before).to(self.units.dtype) * self.units[:, None, None]
        weights = torch.where((token < self.fired[:, None])[..., None], weights, 0.0)
        if self.tail_factors is not None:
            weights = weights * self.tail_factors[..., None]
        return weights

    def sparse_weights(self) -> SparseWeights:
        """List the weights that are not zero; their number is read from the device.

        Returns:
            At most T + N entries a row.
        """
        batch, frames = self.frame_starts.shape
        if min(batch, frames, self.num_tokens) == 0:
            nothing = self.lengths.new_zeros(0)
            return SparseWeights(nothing, nothing, nothing, self.units.new_zeros(0))
        spans = self.spans()
        parts = merge(spans.starts, spans.ends, batch * self.num_tokens)
        kept = parts.order.argsort()
        kept = kept[parts.sizes[kept] > 0]
        row, token = parts.frames[kept] // frames, parts.tokens[kept] % self.num_tokens
        values = parts.sizes[kept].to(self.units.dtype) * (self.units[row] / ONE)
        if self.tail_factors is not None:
            values = values * self.tail_factors.detach()[row, token]
        return SparseWeights(row, token, parts.frames[kept] % frames, values)

    def delays(self) -> Tensor:
        """Average the positions of the frames that make a token, as latency losses need it.

        With p[n, t] the weights of token n divided by their sum, the delay is
        ``sum_t p[n, t] * (t + 1)``: 1 if the first frame alone makes the token.

        Returns:
            (B, N) float, in frames, differentiable with respect to alphas; 0 where there is no
            token.
        """
        batch, frames = self.frame_starts.shape
        position = torch.arange(1.0, frames + 1, device=self.units.device, dtype=self.units.dtype)
        values = torch.stack([position, torch.ones_like(position)], dim=1)
        sums = integrate(values.repeat(batch, 1), self.spans(), self.units.dtype)
        moment, mass = sums.view(batch, self.num_tokens, 2).unbind(-1)
        return moment / torch.where(mass == 0, 1.0, mass)


def build_alignment(
    alphas: Tensor,
    attention_mask: Tensor | None,
    target_lengths: Tensor | None,
    rule: Rule,
    max_tokens: int | None,
) -> Alignment:
    """Decide the fires of a padded batch; the arguments are those of `cif.align`, checked."""
    rows = build_rows(alphas, attention_mask, target_lengths, rule)
    if max_tokens is None:
        max_tokens = longest(rows.counts if target_lengths is None else target_lengths)
    lengths = rows.counts.clamp(max=max_tokens)
    fired = lengths.where(rows.totals > 0, 0)
    frame_ends = rows.prefix.minimum((fired << FRACTION_BITS)[:, None])
    token = torch.arange(max_tokens, device=lengths.device)
    factors = None
    if target_lengths is None and rule.tail == "threshold":
        factors = tail_factors(rows.totals, rows.alpha_sum / rule.threshold, lengths, token)
    return Alignment(
        lengths=lengths,
        attention_mask=token < lengths[:, None],
        alpha_sum=rows.alpha_sum,
        fire_times=fire_times(rows.prefix, lengths, max_tokens),
        frame_starts=_before(frame_ends),
        frame_ends=frame_ends,
        frame_mask=rows.frame_mask,
        fired=fired,
        units=rows.units,
        levels=torch.stack([_before(rows.levels), rows.levels]),
        tail_factors=factors,
    )


def longest(lengths: Tensor) -> int:
    """Read the largest length; on a GPU this waits for the device."""
    if lengths.numel() == 0:
        return 0
    low, high = torch.stack(lengths.aminmax()).tolist()
    if low < 0:
        raise ValueError(f"target_lengths: expected at least 0, got {low}")
    return int(high)


def _before(ends: Tensor) -> Tensor:
    """Return where each frame begins: at the end of the one before it, the first one at 0."""
    return torch.cat([ends.new_zeros(ends.shape[0], 1), ends], dim=1)[:, :-1]


def tail_factors(totals: Tensor, tokens: Tensor, lengths: Tensor, token: Tensor) -> Tensor:
    """Return the factor, (B, N), that makes the token of the rest a whole one.

    Args:
        totals: (B,) int64, Q.40; tokens: (B,), the same as a differentiable number of tokens;
        lengths: (B,) int64; token: (N,), the token's index.
    """
    exact = (totals % ONE).double() / ONE
    rest = exact.to(tokens.dtype) + (tokens - tokens.detach())
    # Only where it is fired: what comes back at tokens that do not exist may be anything.
    fired_rest = (exact > 0) & (totals // ONE < lengths)
    is_rest = (token == (totals // ONE)[:, None]) & fired_rest[:, None]
    return torch.where(is_rest, rest[:, None], 1.0).reciprocal()


def _filled(points: Tensor, levels: Tensor, token: Tensor) -> Tensor:
    """Compute how full each token, (N,), is at each point, (B, T) Q.40: (B, N, T) float64.

    The value is exact, the gradient is that of `levels`, (B, T); where a point lies on the edge of
    two tokens it belongs to the later one, so that nothing is counted twice.
    """
    above = points[:, None, :] - (token << FRACTION_BITS)[:, None]
    value = above.clamp(0, ONE).double() / ONE
    slope = (levels - levels.detach())[:, None, :]
    return value + torch.where((above >= 0) & (above < ONE), slope, 0.0)
