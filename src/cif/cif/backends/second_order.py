"""Second derivatives: what has only a first one says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_second_derivative(gradients: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients such that differentiating them raises an error that names a remedy.

    Args:
        gradients: what a backward pass has computed without recording it.
        inputs: the tensors that they depend on.
    """
    if not torch.is_grad_enabled():
        return gradients
    refused: tuple[Tensor, ...] = _Refuse.apply(len(inputs), *inputs, *gradients)  # type: ignore[no-untyped-call]  # torch's
    return refused


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "cif: this backend has no second derivative; "
            'cif(..., backend="dense") can be differentiated any number of times'
        )
