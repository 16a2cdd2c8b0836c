"""Which positions are adapted, and how that reaches the layers.

Letters of shapes: B rows of the mask, L positions of the whole sequence, T positions of one forward
pass, R adapted rows among its flattened positions.

A mask is *ambient*: `plora_mask` lays it around a call. The decoder's forward pass turns it into an
`Activation`, the only thing that the layers see, and drops that again when the pass ends. A pass
that is repeated later (gradient checkpointing) gets its own activation back, see ``recompute``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """The adapted rows of one forward pass.

    Attributes:
        rows: (R,) int64, ascending, indices into the flattened (batch, T) positions; None where
            none of them is adapted.
        batch: Number of sequences in the pass.
        length: T, positions per sequence in the pass.
        mask: (B, L) bool, where the pass has a cache, for layers that read what it holds.
        past: Positions before the pass's first one.
        learning: Whether gradients are on, so that also no row at all has to reach A and B.
    """

    rows: Tensor | None
    batch: int
    length: int
    mask: Tensor | None = None
    past: int = 0
    learning: bool = False
    _in_cache: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def find(self, hidden_states: Tensor) -> tuple[bool, Tensor | None]:
        """Whether a layer's input holds positions of the sequence, and which rows to adapt.

        Multi-head latent attention keeps compressed keys in the cache as (batch, 1, S, K), S being
        everything up to now, and expands all of them at every step: the layer that does so sees
        positions that earlier passes had masked.

        Args:
            hidden_states: (..., K), the input of an adapted layer.

        Returns:
            True and the rows among the flattened leading positions, or None if no row is adapted;
            False and None where the leading shape is not that of the sequence.
        """
        if self.rows is None and (self.mask is None or hidden_states.ndim != 4):
            return True, None
        batch, length, lead = self.batch, self.length, hidden_states.shape[:-1]
        if lead in ((batch, length), (batch * length,), (batch, 1, length)):
            return True, self.rows
        if self.mask is not None and len(lead) == 3 and lead[:2] == (batch, 1):
            return True, self._rows_in_cache(lead[2], hidden_states.device)
        # where no position of the pass is adapted, nothing is lost
        return self.rows is None, None

    def _rows_in_cache(self, length: int, device: torch.device) -> Tensor | None:
        """Rows of a cache of `length`: its last positions, or, if it has room, from the first."""
        assert self.mask is not None
        if length not in self._in_cache:
            start = max(0, self.past + self.length - length)
            self._in_cache[length] = active_rows(
                self.mask, batch=self.batch, length=length, past=start, device=device
            )
        rows = self._in_cache[length]
        return None if rows.numel() == 0 and not self.learning else rows


@dataclass(frozen=True)
class Frame:
    """One entry of the stack of forward passes under way; `owner` is the decoder's id."""

    owner: int
    activation: Activation | None
    below: Frame | None


# Module-level, not per model: a ContextVar can be neither copied nor pickled with a model. Passes
# nest like calls do, so the top of the stack always belongs to the decoder that is running.
_ambient_mask: ContextVar[Tensor | None] = ContextVar("plora_mask", default=None)
_disabled: ContextVar[frozenset[int]] = ContextVar("plora_disabled", default=frozenset())
_top: ContextVar[Frame | None] = ContextVar("plora_pass", default=None)


@contextmanager
def plora_mask(mask: Tensor) -> Iterator[None]:
    """Adapt the positions in `mask` in every decoder call inside the ``with`` block.

    The mask counts positions of the sequence, padding included, from its first one: a call that
    continues a key-value cache starts at the cache's length, and positions past the end of the mask
    are not adapted. Generated tokens therefore see the plain base model. A call with k times as
    many sequences (beams) repeats each row of the mask k times, as
    ``torch.repeat_interleave(mask, k, dim=0)`` does. An inner block replaces the outer one's mask.

    The backward pass may run outside the block.

    Args:
        mask: (B, L) bool, True on the positions to adapt.

    Raises:
        TypeError: `mask` is no bool tensor.
        ValueError: `mask` has not two dimensions.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}; convert it with mask.bool()")
    if mask.ndim != 2:
        raise ValueError(
            f"mask: expected shape (batch, positions), got {tuple(mask.shape)}; "
            "a single sequence needs mask[None]"
        )
    token = _ambient_mask.set(mask)
    try:
        yield
    finally:
        _ambient_mask.reset(token)


@contextmanager
def disabled_modules(ids: frozenset[int]) -> Iterator[None]:
    """Switch the modules with these ids off inside the block, on top of those off already."""
    token = _disabled.set(_disabled.get() | ids)
    try:
        yield
    finally:
        _disabled.reset(token)


def is_disabled(module: object) -> bool:
    """Whether `module` is switched off in this context."""
    return id(module) in _disabled.get()


def ambient_mask() -> Tensor | None:
    """The mask of the innermost `plora_mask` block, or None."""
    return _ambient_mask.get()


def current_activation() -> Activation | None:
    """The activation of the decoder pass that is running, or None outside of one."""
    frame = _top.get()
    return None if frame is None else frame.activation


def open_pass(owner: object) -> None:
    """Begin a pass of decoder `owner`, as yet without an activation.

    Hooks do not run when a pass ends by KeyboardInterrupt. What such a pass left behind, above and
    including an earlier frame of the same decoder, is dropped here.
    """
    below = frame = _top.get()
    while frame is not None:
        if frame.owner == id(owner):
            below = frame.below
        frame = frame.below
    _top.set(Frame(id(owner), None, below))


def set_activation(activation: Activation) -> None:
    """Give the pass opened last its activation."""
    frame = _top.get()
    assert frame is not None, "set_activation is called between open_pass and close_pass"
    _top.set(replace(frame, activation=activation))


def close_pass(owner: object) -> None:
    """End the pass of `owner`; nothing happens where it was never opened."""
    frame = _top.get()
    if frame is not None and frame.owner == id(owner):
        _top.set(frame.below)


@contextmanager
def restored(activation: Activation) -> Iterator[None]:
    """Run the block as part of a pass with `activation`, on whatever thread it is run."""
    below = _top.get()
    _top.set(Frame(id(activation), activation, below))
    try:
        yield
    finally:
        _top.set(below)


def active_rows(
    mask: Tensor, *, batch: int, length: int, past: int, device: torch.device
) -> Tensor:
    """Rows to adapt among the flattened positions ``past .. past + length`` of `batch` sequences.

    Equals: ``repeat_interleave(pad(mask, (0, inf))[:, past:past + length], batch // B,
    dim=0).flatten().nonzero()``

    Args:
        mask: (B, L) bool.
        batch: Sequences in the pass, a multiple of B.
        length: T, positions per sequence in the pass.
        past: Positions before the pass's first one.
        device: Where the indices are needed. A mask on the CPU costs no device sync.

    Returns:
        (R,) int64 on `device`, ascending.

    Raises:
        ValueError: `batch` is no multiple of B.
    """
    if mask.shape[0] == 0 or batch % mask.shape[0]:
        raise ValueError(
            f"mask: expected a row per sequence, so that the batch of {batch} is a multiple of its "
            f"rows, got shape {tuple(mask.shape)}; give plora_mask the mask of this batch"
        )
    window = mask[:, past : past + length].repeat_interleave(batch // mask.shape[0], dim=0)
    where = window.nonzero()
    return (where[:, 0] * length + where[:, 1]).to(device, non_blocking=True)
