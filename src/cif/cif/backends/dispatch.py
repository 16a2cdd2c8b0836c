"""Integration by the backend that was chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from cif.backends import Backend, torch_backend, triton_integrate
from cif.spans import Spans


def integrate(hidden_states: Tensor, spans: Spans, dtype: torch.dtype, backend: Backend) -> Tensor:
    """Sum the frames of each token by their weights.

    Args:
        hidden_states: (F, D) float.
        spans: where the frames lie among the tokens.
        dtype: of the result.
        backend: "torch" or "triton", as `cif.backends.resolve` returns it.

    Returns:
        (M, D); zeros at tokens that have no frame.
    """
    if backend == "triton":
        return triton_integrate.integrate(hidden_states, spans, dtype)
    return torch_backend.integrate(hidden_states, spans, dtype)
