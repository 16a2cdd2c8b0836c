"""Alpha heads: from frames to the logits of the firing weights, and on to the weights.

Shapes: B batch, T frames, D width, K kernel size, H inner width.

Functions without state, on parameters that `cif.CIF` owns: each sees its frames and nothing else,
so that it gives the same on a whole row and on one chunk of it.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AlphaHead = Literal["last_channel", "conv", "mlp"]


def last_channel_logits(frames: Tensor) -> Tensor:
    """Take the last channel as it is (the layout of arXiv 2405.19041).

    Args:
        frames: (B, T, D) float.

    Returns:
        (B, T).
    """
    return frames[..., -1]


def conv_logits(frames: Tensor, conv: nn.Conv1d, linear: nn.Linear) -> Tensor:
    """Let a window of K frames decide: convolution, ReLU, one unit (after arXiv 1905.11235).

    Args:
        frames: (B, T + K - 1, D) float: the T frames with K // 2 more on either side, neighbours
            where there are any and zeros elsewhere.
        conv: from D channels, K wide. Its own padding is not applied.
        linear: to one unit.

    Returns:
        (B, T).
    """
    window = F.conv1d(frames.transpose(1, 2), conv.weight, conv.bias)
    return cast(Tensor, linear(window.relu().transpose(1, 2))).squeeze(-1)


def mlp_logits(frames: Tensor, hidden: nn.Linear, linear: nn.Linear) -> Tensor:
    """Let each frame decide by itself: linear layer, GELU, one unit.

    Args:
        frames: (B, T, D) float.
        hidden: D to H.
        linear: H to one unit.

    Returns:
        (B, T).
    """
    return cast(Tensor, linear(F.gelu(hidden(frames)))).squeeze(-1)


def alphas_from_logits(
    logits: Tensor, frame_mask: Tensor | None = None, *, noise: float = 0.0
) -> Tensor:
    """Turn logits into firing weights.

    Args:
        logits: (B, T) float.
        frame_mask: (B, T) bool, True at real frames.
        noise: standard deviation of the Gaussian noise that is added before the sigmoid. Training
            with it favours logits far from 0, hence weights near 0 or 1 (arXiv 1704.00784,
            section 2.5, "Encouraging discreteness", where it is 1, for monotonic attention).

    Returns:
        (B, T) float32 in [0, 1] (float64 for float64 logits), 0 at masked frames.
    """
    # A sum over many frames needs more than the 8 bits of a bfloat16 sigmoid.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if noise > 0:
        logits = logits + noise * torch.randn_like(logits)
    if frame_mask is not None:
        # Before the sigmoid, whose gradient would turn NaN in padding into NaN times zero.
        logits = logits.masked_fill(~frame_mask, -torch.inf)
    return logits.sigmoid()
