"""Integration in plain PyTorch: any device, forward and closed-form backward.

Shapes: F frames of the batch, M tokens of the batch, D width, L = F + M intervals.

With s_t and e_t the start and the end of a frame in tokens, k(c) = floor(c), g[n, t] =
<dL/dout_n, h_t> and threshold beta:

    w[n, t] = beta * (clip01(e_t - n) - clip01(s_t - n)),      out_n = sum_t w[n, t] h_t
    dh_t    = sum_n w[n, t] dout_n,     de_t = beta * g[k(e_t), t],     ds_t = -beta * g[k(s_t), t]

The tokens in the middle of a frame that fires several times have the constant weight beta and add
nothing to the gradient of its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cif.backends.second_order import refuse_second_derivative
from cif.prefix import FRACTION_BITS, ONE
from cif.spans import Intervals, Spans, merge


class _Layout(NamedTuple):
    """What of `cif.spans.Spans` has no gradient."""

    starts: Tensor
    ends: Tensor
    limits: Tensor
    readable: Tensor | None
    units: Tensor


def integrate(hidden_states: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
    """Sum the frames of each token by their weights.

    Args:
        hidden_states: (F, D) float.
        spans: where the frames lie among the tokens.
        dtype: of the result.

    Returns:
        (M, D); zeros at tokens that have no frame.
    """
    starts, ends, limits, readable, units, levels, rows = spans
    out: Tensor = _Integrate.apply(  # type: ignore[no-untyped-call]  # torch's
        dtype, rows, hidden_states, levels, starts, ends, limits, readable, units
    )
    return out


class _Integrate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        rows: int,
        hidden_states: Tensor,
        levels: Tensor,
        *arguments: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden_states, levels, *arguments)
        ctx.rows = rows
        layout = _Layout(*arguments)
        width, tokens = hidden_states.shape[1], layout.units.shape[0]
        if _is_empty(hidden_states, layout.units):
            return hidden_states.new_zeros(tokens, width, dtype=dtype)
        if not _row_by_row(hidden_states, layout.units, rows):
            return _sums(hidden_states, layout).to(dtype)
        out = hidden_states.new_empty(tokens, width, dtype=dtype)
        for frames, in_row, row in _rows(layout, rows):
            out[in_row] = _sums(hidden_states[frames], row)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, levels, *arguments = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(grad, hidden_states, levels, _Layout(*arguments), ctx.rows)
        return (
            None,
            None,
            *refuse_second_derivative(gradients, grad, hidden_states, levels),
            *(None,) * 5,
        )


def _is_empty(hidden_states: Tensor, units: Tensor) -> bool:
    # No comparison of one size with another, which tracing would take for a condition on both.
    return hidden_states.numel() == 0 or units.shape[0] == 0


def _row_by_row(hidden_states: Tensor, units: Tensor, rows: int) -> bool:
    """Whether to work on the rows one after the other.

    Frames of low precision are copied to the dtype of `units`: the copy of a row stays in the
    cache, that of the batch would not. A compiler needs no copy.
    """
    return hidden_states.dtype != units.dtype and not torch.compiler.is_compiling() and rows > 1


def _rows(layout: _Layout, count: int) -> Iterator[tuple[slice, slice, _Layout]]:
    """Cut a padded batch into its rows: the frames, the tokens, and the layout from 0 on."""
    frames, tokens = layout.starts.shape[0] // count, layout.units.shape[0] // count
    for row in range(count):
        part = slice(row * frames, (row + 1) * frames)
        in_row = slice(row * tokens, (row + 1) * tokens)
        base = row * tokens
        yield (
            part,
            in_row,
            _Layout(
                layout.starts[part] - (base << FRACTION_BITS),
                layout.ends[part] - (base << FRACTION_BITS),
                layout.limits[part] - base,
                None if layout.readable is None else layout.readable[part],
                layout.units[in_row],
            ),
        )


def _sums(hidden_states: Tensor, layout: _Layout) -> Tensor:
    """Compute the tokens, (M, D), in the dtype of `units`."""
    units = layout.units
    parts = merge(layout.starts, layout.ends, units.shape[0])
    live = parts.sizes > 0
    place, offsets = _compact(parts, live)
    frames = _scattered(parts.frames, place)
    weights = _scattered(_weights(parts, live, units), place)
    # The bag after the last token's holds what is left over of the list.
    return _bags(hidden_states.to(units.dtype), frames, offsets, weights)[:-1]


def _gradients(
    grad: Tensor, hidden_states: Tensor, levels: Tensor, layout: _Layout, rows: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the frames, (F, D), and of the levels, (2, F)."""
    if _is_empty(hidden_states, layout.units):
        return torch.zeros_like(hidden_states), torch.zeros_like(levels)
    if not _row_by_row(hidden_states, layout.units, rows):
        d_hidden, d_levels = _frame_gradients(grad, hidden_states, layout)
        return d_hidden.to(hidden_states.dtype), d_levels.to(levels.dtype)
    d_hidden = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    d_levels = torch.empty_like(levels)
    for frames, in_row, row in _rows(layout, rows):
        d_hidden[frames], d_levels[:, frames] = _frame_gradients(
            grad[in_row], hidden_states[frames], row
        )
    return d_hidden, d_levels


def _frame_gradients(grad: Tensor, hidden_states: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Do what `_gradients` does, in the dtype of `units`."""
    starts, ends, limits, readable, units = layout
    frames = hidden_states.shape[0]
    parts = merge(starts, ends, units.shape[0])
    tokens = _scattered(_gradient_rows(parts, limits), parts.order)
    weights = _scattered(_weights(parts, parts.sizes > 0, units), parts.order)
    last = parts.order[:frames]
    first = torch.arange(frames, device=starts.device) + (starts >> FRACTION_BITS)
    d_hidden, at_end, at_start = _dots(
        hidden_states.to(units.dtype),
        grad.to(units.dtype),
        tokens,
        F.pad(last[:-1] + 1, (1, 0)),
        weights,
        last,
        first,
    )
    _clear(d_hidden, starts == ends)
    # A frame that ends with its row's last token touches no token at its end. Whatever stands in
    # masked frames, NaN included, has been multiplied into their dot products.
    starts_inside, ends_inside = (edge >> FRACTION_BITS < limits for edge in (starts, ends))
    if readable is not None:
        starts_inside, ends_inside = starts_inside & readable, ends_inside & readable
    # A frame without weight was not read: if what stands in it is not finite, what its weight
    # would change is not known, and is taken for nothing.
    known = (starts < ends) | at_end.isfinite()
    starts_inside, ends_inside = starts_inside & known, ends_inside & known
    unit = units[tokens[last]]
    d_levels = torch.stack(
        [
            torch.where(starts_inside, -unit * at_start, 0.0),
            torch.where(ends_inside, unit * at_end, 0.0),
        ]
    )
    return d_hidden, d_levels


def _compact(parts: Intervals, live: Tensor) -> tuple[Tensor, Tensor]:
    """Close the gaps that intervals without length leave in the sorted list.

    Zero times NaN is not zero: what a token has no share of must not be read for it.

    Returns:
        The new place of each interval, (L,), which is L for those left out; the place where the
        intervals of each token begin and, at the end, where those of the last one end, (M + 1,).
    """
    count = live.shape[0]
    before = F.pad(_scattered(live, parts.order).cumsum(0), (1, 0))
    place = torch.where(live, before[parts.order], count)
    token_orders = parts.order[parts.num_frames :]
    return place, before[F.pad(token_orders + 1, (1, 0))]


def _scattered(values: Tensor, place: Tensor) -> Tensor:
    """Put each value at its place; those whose place is the list's own length are dropped."""
    room = values.new_zeros(values.shape[0] + 1)
    return room.scatter_(0, place, values)[:-1]


def _weights(parts: Intervals, live: Tensor, units: Tensor) -> Tensor:
    """Turn lengths into weights, (L,), in the dtype of `units`."""
    unit = units[parts.tokens.clamp(max=units.shape[0] - 1)]
    return torch.where(live, parts.sizes.to(units.dtype) * (unit / ONE), 0.0)


def _gradient_rows(parts: Intervals, limits: Tensor) -> Tensor:
    """Choose the token whose gradient is read for each interval, (L,) int64.

    For intervals of no length that is one which the row fires: what comes back at tokens that do
    not exist may be anything. If the row fires none, nothing is used of what is read.
    """
    frames, live = parts.num_frames, parts.sizes > 0
    own = torch.minimum(parts.tokens[:frames], limits - 1).clamp(min=0)
    beside = own[parts.frames[frames:].clamp(max=frames - 1)]
    return torch.cat([own, torch.where(live[frames:], parts.tokens[frames:], beside)])


def _clear(d_hidden: Tensor, idle: Tensor) -> None:
    """Set the gradient, (F, D), of frames without weight to zero, (F,) bool.

    A weight of zero times a gradient that is not finite is not zero.
    """
    if d_hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        # Passing over all frames would take a quarter of the whole backward pass.
        d_hidden.index_fill_(0, idle.nonzero().squeeze(1), 0.0)
    else:
        d_hidden.masked_fill_(idle[:, None], 0.0)


def _bags(values: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of consecutive entries.

    equals: for each start s up to the next one, sum_j weights[j] * values[rows[j]].

    Args:
        values: (R, D); rows: (L,), indices into R; starts: (S,), increasing from 0; weights: (L,).

    Returns:
        (S, D).
    """
    return F.embedding_bag(rows, values, starts, mode="sum", per_sample_weights=weights)


def _dots(
    values: Tensor,
    grad: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    weights: Tensor,
    last: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dh and the dot products <dout_n, h_t> that each frame's ends ask for.

    Args:
        values: (F, D); grad: (M, D); tokens, weights: (L,), the sorted intervals; offsets: (F,),
            the first interval of each frame; last, first: (F,), the intervals at which a frame ends
            and begins.

    Returns:
        dh, (F, D); the dot products at the end and at the start of each frame, (F,) each.
    """
    if torch.compiler.is_compiling():
        # Dynamo traces no autograd within a backward; the compiler fuses what follows into loops
        # that store only the sums.
        d_hidden = _bags(grad, tokens, offsets, weights)
        at_end, at_start = ((values * grad[tokens[at]]).sum(-1) for at in (last, first))
        return d_hidden, at_end, at_start
    # The gradient of a weight in dh = bags(dout) for the cotangent h is <dout_n, h_t>: the very dot
    # product that the ends of the frames need, so that one pass serves both.
    with torch.enable_grad():
        leaf = weights.detach().requires_grad_()
        bags = _bags(grad, tokens, offsets, leaf)
    (dots,) = torch.autograd.grad(bags, leaf, values)
    return bags.detach(), dots[last], dots[first]
