"""The one output type of every adapter.

Shapes: B batch, T input frames, S stacked frames, N output positions, H output width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdapterOutput:
    """What an adapter hands to the language model.

    Attributes:
        hidden_states: (B, N, H), zero where ``attention_mask`` is False.
        attention_mask: (B, N) bool, True on real positions, which come first in each row.
        alpha_sum: (B,) float32, the unscaled sum of the CIF weights divided by the threshold, hence
            in tokens; differentiable; None where the adapter has no CIF.
        fire_times: (B, N) float32, where each token ends, in frames of the adapter's *input*;
            None where the adapter has no CIF.
        alphas: (B, S) float32, the unscaled CIF weight of each (stacked) frame; None likewise.
        frames_per_alpha: how many input frames are stacked into one of ``alphas``.
        threshold: CIF's: how much weight makes a token.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    alpha_sum: Tensor | None = None
    fire_times: Tensor | None = None
    alphas: Tensor | None = None
    frames_per_alpha: int = 1
    threshold: float = 1.0
