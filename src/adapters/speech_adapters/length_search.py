"""How many tokens? The number under which the outputs look most like tokens.

Shapes: B batch, T input frames, K lengths tried, N output positions, D input width, H output width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .cformer import CFormer
from .output import AdapterOutput

Confidence = Callable[[Tensor], Tensor]
"""Outputs (B, N, H) to (B, N): how surely each is a token, as a log-probability."""


@torch.no_grad()
def search_length(
    adapter: CFormer,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    confidence: Confidence,
    weight: float,
    radius: int = 2,
) -> AdapterOutput:
    """Cut frames into tokens at inference, and look at more lengths than the predicted one.

    A rounded sum of weights may miss the number of tokens by one, and then no output fits a token.
    Of the lengths n around it, this takes the one with the largest

        weight * mean_i confidence_i(n) - (n - alpha_sum)^2

    The Transformer before CIF, which reads the frames, runs once. A clip's result does not depend
    on its batch.

    Args:
        adapter: in eval mode.
        hidden_states: (B, T, D), right-padded.
        attention_mask: (B, T) bool or int, True on real frames; None means all are real.
        confidence: of outputs (B, N, H); what it says of padding is not looked at.
        weight: how much an average confidence of 1 counts against a squared distance of 1 from the
            sum of the weights. 0 gives the sum, rounded.
        radius: how far from the rounded sum lengths may lie; none is below 1, unless the sum is 0.

    Returns:
        As the adapter would with the found lengths as its target lengths.

    Raises:
        ValueError: ``weight`` or ``radius`` is negative.

    Example:
        >>> from speech_adapters import CFormerConfig
        >>> adapter = CFormer(CFormerConfig(input_size=512, output_size=576)).eval()
        >>> embeddings = F.normalize(torch.randn(1000, 576), dim=-1)
        >>> def confidence(outputs):
        ...     cosines = F.normalize(outputs, dim=-1) @ embeddings.T
        ...     return (30 * cosines).log_softmax(-1).amax(-1)
        >>> frames = torch.randn(2, 100, 512)
        >>> out = search_length(adapter, frames, confidence=confidence, weight=3.0)
    """
    if weight < 0 or radius < 0:
        raise ValueError(
            f"weight and radius must not be negative, got weight={weight}, radius={radius}"
        )
    # The predicted length first: of equal scores the first one is taken.
    offsets = sorted(range(-radius, radius + 1), key=abs)
    tried = adapter.at_lengths(hidden_states, attention_mask, offsets)
    scores = torch.stack([_score(out, confidence, weight) for out in tried])
    return _rows(tried, scores.argmax(dim=0))


def _score(out: AdapterOutput, confidence: Confidence, weight: float) -> Tensor:
    """What one length for each clip is worth, (B,)."""
    assert out.alpha_sum is not None
    lengths = out.attention_mask.sum(dim=1)
    sure = confidence(out.hidden_states).float().masked_fill(~out.attention_mask, 0.0)
    mean = sure.sum(dim=1) / lengths.clamp(min=1)
    return weight * mean - (lengths - out.alpha_sum).square()


def _rows(tried: list[AdapterOutput], chosen: Tensor) -> AdapterOutput:
    """Of K outputs for the same B clips, each clip's chosen (B,) one."""
    clips = torch.arange(len(chosen), device=chosen.device)
    lengths = torch.stack([out.attention_mask.sum(dim=1) for out in tried])[chosen, clips]
    longest = int(lengths.max()) if len(lengths) else 0

    def pick(tensors: list[Tensor | None]) -> Tensor:
        fitted = []
        for tensor in tensors:
            assert tensor is not None
            missing = longest - tensor.shape[1]  # negative where only others' lengths were longer
            fitted.append(F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)))
        return torch.stack(fitted)[chosen, clips]

    first = tried[0]
    return AdapterOutput(
        hidden_states=pick([out.hidden_states for out in tried]),
        attention_mask=pick([out.attention_mask for out in tried]),
        alpha_sum=first.alpha_sum,
        fire_times=pick([out.fire_times for out in tried]),
        alphas=first.alphas,
        frames_per_alpha=first.frames_per_alpha,
        threshold=first.threshold,
    )
