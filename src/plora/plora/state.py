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
        masks: Modality -> its mask (``mask.Marked``), of the innermost `plora_mask` block; None
            outside of any.
        disabled: Ids of the modules that are switched off.
        top: The decoder pass opened last (``activation.Frame``); passes nest like calls do, so it
            is the running one.
    """

    def __init__(self) -> None:
        self.masks: Mapping[str, Any] | None = None
        self.disabled: frozenset[int] = frozenset()
        self.top: Any = None


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.state = State()


# Module-level, not per model: a model with it could be neither copied nor pickled
_per_thread = _PerThread()


def state() -> State:
    """This thread's record."""
    return _per_thread.state
