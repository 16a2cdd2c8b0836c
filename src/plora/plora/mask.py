"""Which positions are adapted: the mask that lies around a call, and switching PLoRA off.

A mask is *ambient*: `plora_mask` lays it around a call. The decoder's forward pass turns it into an
``Activation``, the only thing that the layers see.

Letters of shapes: B sequences, L positions of the whole sequence, R adapted rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from plora.activation import active_rows
from plora.config import DEFAULT
from plora.state import state


@dataclass(frozen=True)
class Marked:
    """The positions of one modality.

    Attributes:
        mask: (B, L) bool.
        rows: (R,) int64, those of a pass over the B whole sequences, found before any pass: while
            torch.compile traces one they cannot be. None where it traced this as well.
    """

    mask: Tensor
    rows: Tensor | None


@contextmanager
def plora_mask(mask: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
    """Adapt the positions in `mask` in every decoder call inside the ``with`` block.

    The mask counts positions of the sequence, padding included, from its first one: a call that
    continues a key-value cache starts at the cache's length, and positions past the end of the mask
    are not adapted. Generated tokens therefore see the plain base model. A call with k times as
    many sequences (beams) repeats each row of the mask k times, as
    ``torch.repeat_interleave(mask, k, dim=0)`` does. An inner block replaces the outer one's mask.

    A model with several modalities takes one mask for each, by name; one that is absent marks
    nothing. Their positions have to be disjoint. That is checked for masks on the CPU; elsewhere
    the check would wait for the device, and a position in two masks gets both updates.

    The backward pass may run outside the block. The block holds for the thread that entered it: a
    generator that yields inside of one leaves its mask around whatever its caller does meanwhile,
    and another thread sees none. There, give each call its mask: ``model(..., plora_mask=mask)``.

    Args:
        mask: (B, L) bool, True on the positions to adapt; or modality -> such a mask, all of one
            shape. A mask on the CPU costs no device sync.

    Raises:
        TypeError: `mask` is no bool tensor.
        ValueError: `mask` has not two dimensions, or masks differ in shape or overlap.
    """
    here, mine = state(), marked(mask)
    here.masks = (*here.masks, mine)
    try:
        yield
    finally:
        # Its own, not the last: generators that are inside a block each may end in any order
        here.masks = tuple(one for one in here.masks if one is not mine)


def marked(mask: Tensor | Mapping[str, Tensor]) -> dict[str, Marked]:
    """Modality -> its mask, checked, with its rows; a plain tensor is the mask of ``"default"``."""
    named = dict(mask) if isinstance(mask, Mapping) else {DEFAULT: mask}
    for name, one in named.items():
        _check("mask" if one is mask else f"mask[{name!r}]", one)
    if len(named) > 1:
        _check_disjoint(named)
    return {name: Marked(one, _whole(one)) for name, one in named.items()}


@contextmanager
def disabled_modules(ids: frozenset[int]) -> Iterator[None]:
    """Switch the modules with these ids off inside the block, on top of those off already."""
    here = state()
    here.disabled = (*here.disabled, ids)
    try:
        yield
    finally:
        here.disabled = tuple(one for one in here.disabled if one is not ids)


def is_disabled(module: object) -> bool:
    """Whether `module` is switched off on this thread."""
    return any(id(module) in ids for ids in state().disabled)


def ambient_masks() -> Mapping[str, Marked] | None:
    """The masks of the innermost `plora_mask` block, or None."""
    masks = state().masks
    return masks[-1] if masks else None


def _whole(mask: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling() or not mask.shape[0]:
        return None
    batch, length = mask.shape
    return active_rows(mask, batch=batch, length=length, past=0, device=mask.device)


def _check(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}; convert it with mask.bool()")
    if mask.ndim != 2:
        raise ValueError(
            f"{name}: expected shape (batch, positions), got {tuple(mask.shape)}; "
            "a single sequence needs mask[None]"
        )


def _check_disjoint(masks: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"mask: expected one shape for all modalities, got {shapes}")
    # elsewhere the answer would have to be waited for
    if torch.compiler.is_compiling() or any(mask.device.type != "cpu" for mask in masks.values()):
        return
    twice = torch.stack(list(masks.values())).sum(0) > 1
    if twice.any():
        row, position = twice.nonzero()[0].tolist()
        both = [name for name, mask in masks.items() if mask[row, position]]
        raise ValueError(
            f"mask: position {position} of sequence {row} is in the masks of {both}; a position "
            "belongs to one modality"
        )
