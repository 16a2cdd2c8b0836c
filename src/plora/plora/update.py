"""The low-rank update around a base layer, cut in two at its rank-r tensor.

`shrink` stands before the base layer and takes ``h = A dropout(x)`` from the chosen rows; `expand`
stands behind it and adds ``scaling * B h`` to them. Each knows its own gradient:

- In the backward pass `shrink` adds its part to the base layer's gradient of x, rows only. Autograd
  alone would spread the rows over a matrix of zeros and sum two matrices of all positions.
- `expand` hands the gradient of the output on as it is, and reads its chosen rows.
- Saved for the backward pass are the chosen rows of x, and for dropout one byte for each element.

Letters of shapes: P flattened positions, K input features, N output features, R chosen rows, r the
rank.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from plora.backends import Backend, resolve, torch_backend, triton_launch
from plora.rows import Rows
from plora.taken import Taken


def shrink(
    hidden_states: Tensor,
    rows: Rows,
    lora_a: Tensor,
    *,
    dtype: torch.dtype,
    taken: Taken | None = None,
    source: Tensor | None = None,
    dropout: float = 0.0,
    in_place: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """``h = A dropout(x)`` of the chosen rows, and x for the base layer.

    Equals: ``hidden_states, F.linear(F.dropout(rows.take(hidden_states), dropout), lora_a)``

    Args:
        hidden_states: (..., K), the base layer's input.
        rows: Indices into the P flattened leading positions.
        lora_a: (r, K); it is cast to `dtype`.
        dtype: In which the update is computed.
        taken: Of the pass, whose layers share what they read; None for a layer alone.
        source: What `hidden_states` is an alias of, if another update came before: what `taken`
            knows.
        dropout: Probability of dropping a feature of a chosen row; 0 outside training.
        in_place: Whether the base layer's gradient of its input may be written into: nothing else
            reads it.
        backend: As for `plora.backends.resolve`.

    Returns:
        An alias of `hidden_states`, which the base layer has to be called with, and h, (R, r) of
        `dtype`.
    """
    rank, features = lora_a.shape
    name = _backend(backend, rows, hidden_states.device, dtype, features, rank)
    learns = hidden_states.requires_grad or lora_a.requires_grad
    recorded = torch.is_grad_enabled() and learns
    if name == "triton" and not recorded and dropout == 0.0 and hidden_states.dtype == dtype:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return hidden_states, triton_launch.shrink(flat, rows.index, lora_a.to(dtype))
    read = hidden_states if source is None else source
    chosen = (Taken() if taken is None else taken).take(read, rows, dtype)
    keep = None
    if dropout > 0.0:
        keep = torch.empty_like(chosen, dtype=torch.bool).bernoulli_(1.0 - dropout)
    kept = 1.0 / (1.0 - dropout)
    if not recorded:
        return hidden_states, torch_backend.down(_drop(chosen, keep, kept), lora_a.to(dtype))
    alias, low = _Shrink.apply(  # type: ignore[no-untyped-call]  # torch's
        hidden_states, chosen, lora_a, keep, rows, kept, in_place, name
    )
    return cast(Tensor, alias if hidden_states.requires_grad else hidden_states), cast(Tensor, low)


def expand(
    output: Tensor,
    rows: Rows,
    low: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    in_place: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """`output` with ``scaling * B h`` added to the chosen rows; the others stay to the bit.

    Equals: ``output.flatten(0, -2).index_add(0, rows.index, scaling * F.linear(low, lora_b))``

    Args:
        output: (..., N), the base layer's result.
        rows: Indices into the P flattened leading positions.
        low: (R, r), h of `shrink`.
        lora_b: (N, r); it is cast to the dtype of `low`.
        scaling: Factor of the update.
        in_place: Whether `output` may be written into: nothing else reads it.
        backend: As for `plora.backends.resolve`.

    Returns:
        (..., N), dtype of `output`, which must not be used any more if it was written into.
    """
    begun = Begun.of(rows, low, lora_b, scaling=scaling, in_place=in_place, backend=backend)
    return begun.finish(output)


class Begun(NamedTuple):
    """An update between `shrink` and `expand`, while the base layer runs.

    All that `expand` needs is made ready before: a large product leaves nothing in a CPU's caches,
    and what runs first after it is several times as slow.
    """

    rows: Rows
    low: Tensor
    lora_b: Tensor
    cast_b: Tensor
    scaling: float
    in_place: bool
    backend: Literal["triton", "torch"]

    @classmethod
    def of(
        cls,
        rows: Rows,
        low: Tensor,
        lora_b: Tensor,
        *,
        scaling: float,
        in_place: bool,
        backend: Backend,
    ) -> Begun:
        """With B cast, and the backend chosen; the arguments are those of `expand`."""
        out, rank = lora_b.shape
        name = _backend(backend, rows, low.device, low.dtype, out, rank)
        return cls(rows, low, lora_b, lora_b.detach().to(low.dtype), scaling, in_place, name)

    def finish(self, output: Tensor) -> Tensor:
        """What `expand` returns."""
        rows, low, lora_b, cast_b, *rest = self
        result = _Expand.apply(  # type: ignore[no-untyped-call]  # torch's
            output, low, lora_b, cast_b, rows, *rest
        )
        return cast(Tensor, result)


def _drop(chosen: Tensor, keep: Tensor | None, kept: float) -> Tensor:
    return chosen if keep is None else chosen * keep * kept


def _backend(
    backend: Backend,
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype,
    features: int,
    rank: int,
) -> Literal["triton", "torch"]:
    if backend == "auto" and rows.runs is not None:
        return "torch"  # views of few runs leave nothing to gather
    return resolve(backend, device, dtype, len(rows) * features, rank)


def _scaled(values: Tensor, scaling: float) -> Tensor:
    return values if scaling == 1.0 else values * scaling


def _add_up(
    matrix: Tensor, rows: Rows, low: Tensor, weight: Tensor, scaling: float, name: str
) -> None:
    if name == "triton":
        triton_launch.expand_(matrix, rows.index, low, weight, scaling)
    else:
        torch_backend.add_up_(matrix, rows, low, weight, scaling)


# Neither has a setup_context: torch would look at the signature in every call, for 0.1 ms.
class _Shrink(torch.autograd.Function):
    """(x, chosen, A) -> (x, h). The gradient of `chosen` goes to x directly, never through it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        chosen: Tensor,
        lora_a: Tensor,
        keep: Tensor | None,
        rows: Rows,
        kept: float,
        in_place: bool,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(chosen, lora_a, keep)
        ctx.rest = rows, kept, in_place, name
        ctx.shape, ctx.dtype = hidden_states.shape, hidden_states.dtype
        ctx.set_materialize_grads(False)
        low = torch_backend.down(_drop(chosen, keep, kept), lora_a.to(chosen.dtype))
        # An alias, not a view in autograd's sense: in-place operations on views of custom
        # functions raise.
        return hidden_states.detach(), low

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_alias, d_low = grads
        chosen, lora_a, keep = ctx.saved_tensors
        rows, kept, in_place, name = ctx.rest
        d_hidden, d_a = d_alias, None
        if d_low is not None and ctx.needs_input_grad[2]:
            d_a = torch_backend.outer(d_low, _drop(chosen, keep, kept)).to(lora_a.dtype)
        if d_low is not None and ctx.needs_input_grad[0]:
            weight = lora_a.to(d_low.dtype)
            if d_alias is None:
                d_alias, in_place = d_low.new_zeros(ctx.shape, dtype=ctx.dtype), True
            if keep is not None or torch.is_grad_enabled():
                d_chosen = _drop(d_low @ weight, keep, kept)
                d_hidden = _with_rows(d_alias, rows, d_chosen, in_place)
            else:
                d_hidden = _writable(d_alias, in_place)
                _add_up(d_hidden.view(-1, ctx.shape[-1]), rows, d_low, weight, 1.0, name)
        return d_hidden, None, d_a, None, None, None, None, None


class _Expand(torch.autograd.Function):
    """(output, h, B) -> output. Saves h and B, neither the output nor what is added to it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        low: Tensor,
        lora_b: Tensor,
        cast_b: Tensor,
        rows: Rows,
        scaling: float,
        in_place: bool,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(low, lora_b)
        ctx.rest = rows, scaling, name
        ctx.set_materialize_grads(False)
        result = _writable(output, in_place)
        flat = result.view(-1, result.shape[-1])
        _add_up(flat, rows, low, cast_b.t(), scaling, name)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (d_output,) = grads
        if d_output is None:
            return (None,) * 8
        low, lora_b = ctx.saved_tensors
        rows, scaling, name = ctx.rest
        if name == "triton" and not torch.is_grad_enabled():
            flat = d_output.reshape(-1, d_output.shape[-1]).to(low.dtype)
            weight = lora_b.to(low.dtype).mT
            return (
                d_output,
                triton_launch.shrink(flat, rows.index, weight, scaling),
                triton_launch.outer(low, flat, rows.index, scaling).to(lora_b.dtype).mT,
                *(None,) * 5,
            )
        d_rows = rows.take(d_output.reshape(-1, d_output.shape[-1])).to(low.dtype)
        d_low = d_b = None
        if ctx.needs_input_grad[1]:
            d_low = _scaled(torch_backend.down(d_rows, lora_b.to(low.dtype).t()), scaling)
        if ctx.needs_input_grad[2]:
            d_b = _scaled(torch_backend.outer(low, d_rows), scaling).to(lora_b.dtype).t()
        return d_output, d_low, d_b, None, None, None, None, None


def _writable(tensor: Tensor, in_place: bool) -> Tensor:
    """`tensor` itself, past autograd's records, or a contiguous copy of it."""
    if in_place and tensor.is_contiguous():
        return tensor.detach()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _with_rows(d_hidden: Tensor, rows: Rows, d_chosen: Tensor, in_place: bool) -> Tensor:
    """`d_hidden` plus the gradient of its chosen rows, recorded where gradients are on."""
    values = d_chosen.to(d_hidden.dtype)
    if torch.is_grad_enabled():
        flat = d_hidden.reshape(-1, d_hidden.shape[-1])
        return flat.index_add(0, rows.index, values).view(d_hidden.shape)
    result = _writable(d_hidden, in_place)
    flat = result.view(-1, result.shape[-1])
    if rows.runs is None:
        flat.index_add_(0, rows.index, values)
        return result
    begin = 0
    for start, stop in rows.runs:
        flat[start:stop].add_(values[begin : begin + stop - start])
        begin += stop - start
    return result
