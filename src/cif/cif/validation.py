"""Checks of what callers pass in; none looks at values on the device.

Shapes: B batch, T frames, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cif.backends import BACKENDS
from cif.prefix import TAILS


def check_hidden_states(hidden_states: Tensor, alphas: Tensor) -> None:
    """Raise TypeError or ValueError where the frames given to `cif.cif` do not fit its alphas."""
    if hidden_states.dim() != 3:
        raise ValueError(
            f"hidden_states: expected shape (B, T, D), got {tuple(hidden_states.shape)}; "
            "unsqueeze(0) makes a batch of one"
        )
    _check_floating("hidden_states", hidden_states)
    frames = tuple(hidden_states.shape[:2])
    if tuple(alphas.shape) != frames:
        hint = "; squeeze(-1) drops the last axis" if alphas.dim() == 3 else ""
        raise ValueError(
            f"alphas: expected shape (B, T) = {frames} of hidden_states, "
            f"got {tuple(alphas.shape)}{hint}"
        )
    if alphas.device != hidden_states.device:
        raise ValueError(
            f"alphas: expected device {hidden_states.device} of hidden_states, "
            f"got {alphas.device}; use .to(hidden_states.device)"
        )


def check_alphas(
    alphas: Tensor, attention_mask: Tensor | None, target_lengths: Tensor | None
) -> None:
    """Raise TypeError or ValueError where alphas, mask and lengths do not fit together."""
    _check_floating("alphas", alphas)
    if alphas.dim() != 2:
        raise ValueError(f"alphas: expected shape (B, T), got {tuple(alphas.shape)}")
    if attention_mask is not None:
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(
                f"attention_mask: expected bool or integer, nonzero at real frames, "
                f"got {attention_mask.dtype}; an additive mask becomes one by `mask == 0`"
            )
        if attention_mask.shape != alphas.shape:
            raise ValueError(
                f"attention_mask: expected shape (B, T) = {tuple(alphas.shape)} of alphas, "
                f"got {tuple(attention_mask.shape)}"
            )
        if attention_mask.device != alphas.device:
            raise ValueError(
                f"attention_mask: expected device {alphas.device} of alphas, "
                f"got {attention_mask.device}; use .to(alphas.device)"
            )
    if target_lengths is not None:
        _check_target_lengths(target_lengths, tuple(alphas.shape[:1]))


def check_packed(
    hidden_states: Tensor,
    alphas: Tensor,
    cu_seqlens: Tensor,
    target_lengths: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Raise TypeError or ValueError where the arguments of `cif.cif_packed` do not fit together."""
    if hidden_states.dim() != 2:
        raise ValueError(
            f"hidden_states: expected shape (F, D), got {tuple(hidden_states.shape)}; "
            "for a padded batch use cif.cif"
        )
    _check_floating("hidden_states", hidden_states)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: expected shape (S + 1,) with at least one row, "
            f"got {tuple(cu_seqlens.shape)}"
        )
    _check_floating("alphas", alphas)
    if alphas.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"alphas: expected shape (F,) = {tuple(hidden_states.shape[:1])} of hidden_states, "
            f"got {tuple(alphas.shape)}"
        )
    for name, tensor in (("alphas", alphas), ("cu_seqlens", cu_seqlens)):
        if tensor.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected device {hidden_states.device} of hidden_states, "
                f"got {tensor.device}; use .to(hidden_states.device)"
            )
    rows = (cu_seqlens.shape[0] - 1,)
    if target_lengths is not None:
        _check_target_lengths(target_lengths, rows)
    if max_seqlen is not None and max_seqlen < min(1, hidden_states.shape[0]):
        raise ValueError(
            f"max_seqlen: expected the length of the longest row or None, got {max_seqlen}"
        )


def _check_target_lengths(target_lengths: Tensor, shape: tuple[int, ...]) -> None:
    kind = target_lengths.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise TypeError(
            f"target_lengths: expected an integer dtype, got {target_lengths.dtype}; use .long()"
        )
    if target_lengths.shape != shape:
        raise ValueError(
            f"target_lengths: expected one for each row, shape {shape}, "
            f"got {tuple(target_lengths.shape)}"
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}; use .float()")


def check_options(
    threshold: float, tail: str, tail_threshold: float, max_tokens: int | None, backend: str
) -> None:
    """Raise ValueError where an option of `cif.cif` is out of range."""
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number above 0, got {threshold}")
    if tail not in TAILS:
        raise ValueError(f"tail: expected one of {', '.join(TAILS)}, got {tail!r}")
    if not 0 < tail_threshold <= 1:
        raise ValueError(
            f"tail_threshold: expected a part of a token in (0, 1], got {tail_threshold}; "
            'to fire every rest use tail="keep"'
        )
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens: expected at least 0 or None, got {max_tokens}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
