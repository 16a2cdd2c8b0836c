"""The chosen rows of a layer's input, taken once for all layers that read it: q, k, v; gate, up."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from plora.rows import Rows


class Taken:
    """The chosen rows of the input seen last, by a pass of a decoder.

    Nothing is kept of an input that is gone: no layer can ask for its rows any more.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0
        self._chosen: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, hidden_states: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """What `chosen_rows` returns, shared between calls with the same tensor.

        Args:
            hidden_states: (..., K).
            rows: R of its flattened leading positions; the same object for all layers.
            dtype: Of the result.

        Returns:
            (R, K).
        """
        # Without gradients one run is a view, and the rest is not kept for long. Inference tensors
        # do not count their changes.
        if not torch.is_grad_enabled() or hidden_states.is_inference():
            return chosen_rows(hidden_states, rows, dtype)
        # Tensor._version counts changes in place: a tensor that was changed between two layers is
        # another input. There is no other way to ask that: grad_fn stays what it was after changes
        # under no_grad or through detach(), and what autograd checks by itself, a tensor that was
        # saved, would keep all positions in memory. Should a version of torch drop the attribute,
        # this line raises.
        version = hidden_states._version
        known = self._input is not None and self._input() is hidden_states
        if not known or self._version != version:
            self._chosen = {}
            self._input, self._version = weakref.ref(hidden_states, self._forget), version
        key = id(rows), dtype
        if key not in self._chosen:
            self._chosen[key] = chosen_rows(hidden_states, rows, dtype)
        return self._chosen[key]

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._input is gone:
            self._chosen = {}


def chosen_rows(hidden_states: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The chosen rows as (R, K) of `dtype`, connected to `hidden_states` for second derivatives.

    One run of rows is a view while no gradient is wanted; with one a copy, lest the view keep all
    positions in memory until the backward pass.
    """
    taken = rows.take(hidden_states.reshape(-1, hidden_states.shape[-1]))
    part = rows.runs is not None and len(rows) * taken.shape[-1] < hidden_states.numel()
    if part and len(rows.runs or ()) == 1 and torch.is_grad_enabled():
        taken = taken.clone()
    return taken.to(dtype)


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of the update: that of the layer's input, or what autocast makes of it."""
    kind, dtype = hidden_states.device.type, hidden_states.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype
