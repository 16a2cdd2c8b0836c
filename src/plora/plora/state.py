"""What holds while a call is running: masks, switched-off modules, the passes under way.

One record per thread, and a plain object inside: torch.compile can trace writes to that, but not
to a ``contextvars.ContextVar``, nor to the attributes of a ``threading.local``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any


class State:
    """One thread's record.

    Attributes:
        masks: For each `plora_mask` block around, the innermost last: modality -> its mask
            (``mask.Marked``).
        disabled: For each `plora_disabled` block around: ids of the modules it switches off.
        top: The decoder pass opened last (``activation.Frame``); passes nest like calls do, so it
            is the running one.
    """

    def __init__(self) -> None:
        self.masks: tuple[Mapping[str, Any], ...] = ()
        self.disabled: tuple[frozenset[int], ...] = ()
        self.top: Any = None


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.state = State()


# Module-level, not per model: a model with it could be neither copied nor pickled
_per_thread = _PerThread()


def state() -> State:
    """This thread's record."""
    return _per_thread.state
