"""Batches of Whisper log-mel features with the augmentation of the encoder's pretraining.

Everything is done on the features, so that they are extracted once: Whisper's value x stands for
the mel power 10 ** (4 x - 4), so noise can be added to the power itself.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def pad(features: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Right-pads (M, F) arrays: (B, M, F) float32 and the number of frames (B,) int64."""
    lengths = torch.tensor([f.shape[1] for f in features])
    out = torch.zeros(len(features), features[0].shape[0], int(lengths.max()))
    for row, f in zip(out, features, strict=True):
        row[:, : f.shape[1]] = torch.from_numpy(f.astype(np.float32))
    return out, lengths


def frame_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) bool, True on real frames."""
    return torch.arange(width) < lengths[:, None]


def augment(
    x: Tensor, lengths: Tensor, generator: torch.Generator, *, pace: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Another speed, throat, room and loudness for each clip of the batch, and SpecAugment.

    Args:
        x: (B, M, F) Whisper log-mel features.
        lengths: (B,) real frames.
        generator: where the randomness comes from.
        pace: least and largest factor on the duration, one drawn for the batch.

    Returns:
        Features of the same layout and their lengths.
    """
    x, lengths = _warp(x, lengths, generator, pace)
    x = _noise(x, generator)
    mask = frame_mask(lengths, x.shape[-1])
    return _spec_augment(x, lengths, generator) * mask[:, None], lengths


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _warp(
    x: Tensor, lengths: Tensor, generator: torch.Generator, pace: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """One speed factor for the batch, one shift and stretch of the mel axis for each clip."""
    batch, bins, frames = x.shape
    width = max(1, int(frames * float(_uniform(*pace, (1,), generator))))
    lengths = (lengths * width).div(frames, rounding_mode="floor").clamp(min=1)
    scale = _uniform(0.93, 1.07, (batch, 1, 1), generator)
    shift = _uniform(-0.05, 0.05, (batch, 1, 1), generator)
    rows = torch.linspace(-1, 1, bins)[None, :, None] * scale + shift
    columns = torch.linspace(-1, 1, width)[None, None, :]
    grid = torch.stack([columns.expand(batch, bins, -1), rows.expand(-1, -1, width)], dim=-1)
    warped = F.grid_sample(x[:, None], grid, padding_mode="border", align_corners=True)
    return warped[:, 0], lengths


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Coloured noise at 8 to 45 dB below the speech, a channel's tilt, and a gain."""
    batch, bins, frames = x.shape
    power = 10.0 ** (4.0 * x - 4.0)
    knots = torch.randn(batch, 1, 6, generator=generator)
    colour = 10.0 ** (0.5 * F.interpolate(knots, bins, mode="linear", align_corners=True))
    level = 10.0 ** (-_uniform(0.8, 4.5, (batch, 1, 1), generator))
    grain = -torch.log(torch.rand(batch, bins, frames, generator=generator).clamp(min=1e-6))
    colour = colour.transpose(1, 2) / colour.mean(dim=2, keepdim=True)
    power = power + power.mean(dim=(1, 2), keepdim=True) * level * colour * (0.5 + 0.5 * grain)
    knots = torch.randn(batch, 1, 4, generator=generator)
    tilt = 0.25 * F.interpolate(knots, bins, mode="linear", align_corners=True).transpose(1, 2)
    log = power.clamp(min=1e-10).log10() + tilt + _uniform(-1.5, 0.7, (batch, 1, 1), generator)
    log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log + 4.0) / 4.0


def _spec_augment(x: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Two bands of up to 8 mels and two gaps of up to 8 frames become the clip's mean."""
    batch, bins, frames = x.shape
    mean = x.mean(dim=(1, 2), keepdim=True)
    hidden = torch.zeros(batch, bins, frames, dtype=torch.bool)
    mel, time = torch.arange(bins)[None, :, None], torch.arange(frames)[None, None, :]
    for _ in range(2):
        size = _uniform(0, 8, (batch, 1, 1), generator)
        first = _uniform(0, 1, (batch, 1, 1), generator) * (bins - size)
        hidden |= (mel >= first) & (mel < first + size)
        size = _uniform(0, 8, (batch, 1, 1), generator)
        first = _uniform(0, 1, (batch, 1, 1), generator) * (lengths[:, None, None] - size)
        hidden |= (time >= first) & (time < first + size)
    return torch.where(hidden, mean, x)
