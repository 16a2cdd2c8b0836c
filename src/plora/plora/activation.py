"""What the layers see of the mask: the adapted rows of the decoder pass that is running.

Letters of shapes: B rows of the mask, L positions of the whole sequence, T positions of one forward
pass, P flattened positions, R adapted rows among them.

An activation is made at the start of a decoder's forward pass and dropped at its end. A pass that
is repeated later (gradient checkpointing) gets its own activation back, see ``recompute``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plora.rows import Rows
from plora.state import state
from plora.taken import Taken

NOWHERE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Activation:
    """The adapted rows of one forward pass.

    Attributes:
        rows: Modality -> (R,) int64, ascending, distinct indices into the flattened (batch, T)
            positions, on the mask's device; a modality none of whose positions is in the pass is
            absent, unless gradients are wanted. While torch.compile traces, (P,) bool instead where
            the number of rows is not known beforehand.
        batch: Number of sequences in the pass.
        length: T, positions per sequence in the pass.
        masks: Modality -> (B, L) bool, where the pass has a cache, for layers that read what it
            holds; else empty.
        past: Positions before the pass's first one.
        learning: Whether gradients are on, so that also no row at all has to reach A and B.
        watched: In the first masked pass, id of each adapted layer that ran -> for each call why it
            was not adapted, or None; else None. Here and not on the model, where other threads are.
    """

    rows: Mapping[str, Tensor]
    batch: int
    length: int
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    past: int = 0
    learning: bool = False
    watched: dict[int, list[str | None]] | None = field(default=None, repr=False)
    _in_cache: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)
    _ready: dict[tuple[int, torch.device], Rows] = field(default_factory=dict, repr=False)

    def ready(self, rows: Tensor, device: torch.device) -> Rows:
        """Rows that `find` returned, on `device`, with their runs if they came from the CPU.

        All layers on one device, of which a spread out decoder has several, get the same object.
        """
        key = id(rows), device  # no other tensor has this id as long as the activation lives
        if key not in self._ready:
            self._ready[key] = Rows.of(rows, device)
        return self._ready[key]

    def find(self, hidden_states: Tensor) -> tuple[bool, Mapping[str, Tensor]]:
        """Whether a layer's input holds positions of the sequence, and which rows to adapt.

        Multi-head latent attention keeps compressed keys in the cache as (batch, 1, S, K), S being
        everything up to now, and expands all of them at every step: the layer that does so sees
        positions that earlier passes had masked.

        Args:
            hidden_states: (..., K), the input of an adapted layer.

        Returns:
            True and, per modality, the rows among the flattened leading positions, empty if no row
            is adapted; False and nothing where the leading shape is not that of the sequence.
        """
        if not self.rows and (not self.masks or hidden_states.ndim != 4):
            return True, NOWHERE
        batch, length, lead = self.batch, self.length, hidden_states.shape[:-1]
        if lead in ((batch, length), (batch * length,), (batch, 1, length)):
            return True, self.rows
        if self.masks and len(lead) == 3 and lead[:2] == (batch, 1):
            return True, self._rows_in_cache(lead[2])
        # where no position of the pass is adapted, nothing is lost
        return not self.rows, NOWHERE

    def _rows_in_cache(self, length: int) -> dict[str, Tensor]:
        """Rows of a cache of `length`: its last positions, or, if it has room, from the first."""
        found = {}
        for name, mask in self.masks.items():
            if (name, length) not in self._in_cache:
                start = max(0, self.past + self.length - length)
                self._in_cache[name, length] = active_rows(
                    mask, batch=self.batch, length=length, past=start, device=mask.device
                )
            rows = self._in_cache[name, length]
            if self.learning or rows.numel():
                found[name] = rows
        return found


@dataclass
class Frame:
    """One entry of the stack of forward passes under way.

    Attributes:
        owner: The decoder's id.
        activation: None until the mask has been looked at.
        below: The pass around this one.
        taken: What layers of this pass share, once one asks for it. Here and not in the
            activation, which a checkpoint keeps until the backward pass: tensors in it would keep
            the graph, and that the checkpoint.
    """

    owner: int
    activation: Activation | None
    below: Frame | None
    taken: Taken | None = field(default=None, repr=False)


def current_activation() -> Activation | None:
    """The activation of the decoder pass that is running, or None outside of one."""
    frame: Frame | None = state().top
    return None if frame is None else frame.activation


def current_taken() -> Taken:
    """What the layers of the pass that is running share."""
    frame: Frame | None = state().top
    assert frame is not None, "current_taken is called within a pass"
    if frame.taken is None:
        frame.taken = Taken()
    return frame.taken


def open_pass(owner: object) -> None:
    """Begin a pass of decoder `owner`, as yet without an activation.

    Hooks do not run when a pass ends by KeyboardInterrupt. What such a pass left behind, above and
    including an earlier frame of the same decoder, is dropped here.
    """
    frame: Frame | None = state().top
    below = frame
    while frame is not None:
        if frame.owner == id(owner):
            below = frame.below
        frame = frame.below
    state().top = Frame(id(owner), None, below)


def set_activation(activation: Activation) -> None:
    """Give the pass opened last its activation."""
    frame: Frame | None = state().top
    assert frame is not None, "set_activation is called between open_pass and close_pass"
    state().top = Frame(frame.owner, activation, frame.below)


def close_pass(owner: object) -> None:
    """End the pass of `owner`; nothing happens where it was never opened."""
    frame: Frame | None = state().top
    if frame is not None and frame.owner == id(owner):
        state().top = frame.below


@contextmanager
def restored(activation: Activation) -> Iterator[None]:
    """Run the block as part of a pass with `activation`, on whatever thread it is run."""
    here = state()
    below = here.top
    here.top = Frame(id(activation), activation, below)
    try:
        yield
    finally:
        here.top = below


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
    check_batch(mask, batch)
    window = mask if past == 0 and mask.shape[1] == length else mask[:, past : past + length]
    if batch != mask.shape[0]:
        window = window.repeat_interleave(batch // mask.shape[0], dim=0)
    if window.shape[1] == length:
        index = window.flatten().nonzero().view(-1)
    else:
        where = window.nonzero()
        index = where[:, 0] * length + where[:, 1]
    return index.to(device, non_blocking=True)


def dense_rows(mask: Tensor, *, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """The same rows as `active_rows` as a (P,) bool tensor, whose shape does not depend on them."""
    check_batch(mask, batch)
    window = mask[:, past : past + length]
    window = torch.nn.functional.pad(window, (0, length - window.shape[1]))
    if batch != mask.shape[0]:
        window = window.repeat_interleave(batch // mask.shape[0], dim=0)
    return window.flatten().to(device)


def check_batch(mask: Tensor, batch: int) -> None:
    """Raise ValueError unless `batch` sequences can share the rows of `mask`."""
    if batch != mask.shape[0] and (mask.shape[0] == 0 or batch % mask.shape[0]):
        raise ValueError(
            f"mask: expected a row per sequence, so that the batch of {batch} is a multiple of its "
            f"rows, got shape {tuple(mask.shape)}; give plora_mask the mask of this batch"
        )
