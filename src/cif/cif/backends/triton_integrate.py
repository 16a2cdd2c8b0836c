"""Integration by Triton kernels, as an operator that torch.compile and torch.export see whole.

Shapes: F frames of the batch, M tokens of the batch, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from cif.backends.second_order import refuse_second_derivative
from cif.backends.triton_launch import launch_integrate, launch_integrate_backward
from cif.spans import Spans


def integrate(hidden_states: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
    """Sum the frames of each token by their weights; see `cif.backends.torch_backend.integrate`."""
    starts, ends, limits, readable, units, levels, _ = spans
    out = _integrate(hidden_states, levels, starts, ends, limits, readable, units, dtype)
    return cast(Tensor, out)


@torch.library.custom_op("cif::integrate", mutates_args=())
def _integrate(
    hidden_states: Tensor,
    levels: Tensor,
    starts: Tensor,
    ends: Tensor,
    limits: Tensor,
    readable: Tensor | None,
    units: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return launch_integrate(hidden_states, starts, ends, units, dtype)


@_integrate.register_fake
def _(
    hidden_states: Tensor,
    levels: Tensor,
    starts: Tensor,
    ends: Tensor,
    limits: Tensor,
    readable: Tensor | None,
    units: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return hidden_states.new_empty((units.shape[0], hidden_states.shape[1]), dtype=dtype)


@torch.library.custom_op("cif::integrate_backward", mutates_args=())
def _integrate_backward(
    grad: Tensor,
    hidden_states: Tensor,
    starts: Tensor,
    ends: Tensor,
    limits: Tensor,
    readable: Tensor | None,
    units: Tensor,
) -> tuple[Tensor, Tensor]:
    return launch_integrate_backward(grad, hidden_states, starts, ends, limits, readable, units)


@_integrate_backward.register_fake
def _(
    grad: Tensor,
    hidden_states: Tensor,
    starts: Tensor,
    ends: Tensor,
    limits: Tensor,
    readable: Tensor | None,
    units: Tensor,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        units.new_empty((2, hidden_states.shape[0])),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_states, levels, starts, ends, limits, readable, units, _ = inputs
    ctx.save_for_backward(hidden_states, starts, ends, limits, readable, units)
    ctx.level_dtype = levels.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden_states, *layout = ctx.saved_tensors
    with torch.no_grad():
        d_hidden, d_levels = _integrate_backward(grad, hidden_states, *layout)
    gradients = (d_hidden, d_levels.to(ctx.level_dtype))
    return *refuse_second_derivative(gradients, grad, hidden_states), *(None,) * 6


_integrate.register_autograd(_backward, setup_context=_setup)
