"""A first, rough alignment of units to frames, to start CTC from.

CTC alone spends its first thousand steps on blanks. As in the flat start of older recognisers, the
first steps train on an alignment that merely spreads the letters evenly over the spoken part.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def spoken_part(features: np.ndarray) -> tuple[float, float]:
    """Where speech begins and ends, as shares of the clip, by the loudness of (M, F) features."""
    loudness = features.astype(np.float32).mean(axis=0)
    low, high = np.percentile(loudness, (2, 98))
    loud = np.flatnonzero(loudness > low + 0.3 * (high - low))
    return float(loud[0] / len(loudness)), float((loud[-1] + 1) / len(loudness))


def spread(units: list[int], sizes: list[int], part: tuple[float, float], frames: int) -> Tensor:
    """(frames,) int64: each unit over its share of the spoken part, 0 (blank) elsewhere.

    Args:
        units: the targets.
        sizes: how many letters each of them has.
        part: the spoken part, as shares of the clip.
        frames: of the encoder.
    """
    ends = np.cumsum(sizes) / sum(sizes)
    place = (np.arange(frames) + 0.5) / frames
    inside = (place - part[0]) / max(1e-6, part[1] - part[0])
    which = np.searchsorted(ends, inside).clip(0, len(units) - 1)
    silent = (inside < 0) | (inside > 1)
    return torch.from_numpy(np.where(silent, 0, np.array(units)[which]))


def alignment_loss(logits: Tensor, targets: list[Tensor]) -> Tensor:
    """Mean cross entropy of (B, T, units) logits against one (frames,) alignment a clip."""
    padded = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    return F.cross_entropy(logits.float().transpose(1, 2), padded)
