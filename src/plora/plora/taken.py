"""The chosen rows of a layer's input, taken once for all layers that read it: q, k, v; gate, up."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from plora.rows import Rows
from plora.update import chosen_rows


class Taken:
    """The chosen rows of the input seen last, by a pass of a decoder.

    Nothing is kept of an input that is gone: no layer can ask for its rows any more.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0
        self._chosen: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, hidden_states: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """What `plora.update.chosen_rows` returns, shared between calls with the same tensor.

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
        # Tensor._version, as torch's notes on in-place operations name it, counts changes in place:
        # a tensor that was changed between two layers is another input.
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
