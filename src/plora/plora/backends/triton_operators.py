"""The Triton path as operators that torch.compile and torch.export see whole.

Without a compiler the kernels are launched directly: an operator of Python costs more than a small
kernel. The compiler plans memory itself, so nothing is written in place here.

Shapes: P flattened positions, K input features, N output features, R chosen rows, r the rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from plora.backends.triton_launch import expand_, outer, shrink


def add_low_rank(
    output: Tensor,
    hidden_states: Tensor,
    index: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """What `plora.gather.add_low_rank` computes, by the kernels."""
    chosen = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, index)
    if dropout > 0.0:
        chosen = torch.nn.functional.dropout(chosen, dropout)
    a, b = lora_a.to(chosen.dtype), lora_b.to(chosen.dtype)
    flat = output.reshape(-1, output.shape[-1])
    result, _ = _add_low_rank(flat, chosen, index, a, b, scaling)
    return cast(Tensor, result).view(output.shape)


@torch.library.custom_op("plora::add_low_rank", mutates_args=())
def _add_low_rank(
    output: Tensor, chosen: Tensor, index: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    low = shrink(chosen, _every(chosen), lora_a)
    result = output.clone(memory_format=torch.contiguous_format)
    expand_(result, index, low, lora_b.mT, scaling)
    return result, low


@_add_low_rank.register_fake
def _(
    output: Tensor, chosen: Tensor, index: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(output, memory_format=torch.contiguous_format)
    return result, chosen.new_empty(chosen.shape[0], lora_a.shape[0])


@torch.library.custom_op("plora::add_low_rank_backward", mutates_args=())
def _add_low_rank_backward(
    d_output: Tensor,
    chosen: Tensor,
    index: Tensor,
    low: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_rows = d_output.to(low.dtype)
    d_low = shrink(d_rows, index, lora_b.mT, scaling)
    d_a = outer(d_low, chosen, _every(chosen)).to(lora_a.dtype)
    d_b = outer(low, d_rows, index, scaling).mT.to(lora_b.dtype).contiguous()
    return d_low @ lora_a, d_a, d_b


@_add_low_rank_backward.register_fake
def _(
    d_output: Tensor,
    chosen: Tensor,
    index: Tensor,
    low: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        chosen.new_empty(chosen.shape),
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, chosen, index, lora_a, lora_b, ctx.scaling = inputs
    ctx.save_for_backward(chosen, index, output[1], lora_a, lora_b)


def _backward(ctx: Any, d_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_chosen, d_a, d_b = _add_low_rank_backward(d_output, *ctx.saved_tensors, ctx.scaling)
    return d_output, d_chosen, None, d_a, d_b, None


_add_low_rank.register_autograd(_backward, setup_context=_setup)


def _every(chosen: Tensor) -> Tensor:
    return torch.arange(chosen.shape[0], device=chosen.device)
