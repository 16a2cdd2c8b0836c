"""Which chat turns a record is part of."""

from __future__ import annotations

from blspkd.model.prompts import Messages, as_messages

from .manifest import Record


def record_messages(record: Record, prompt: str) -> Messages:
    """The chat turns of a record: its own, or the given prompt as one user turn."""
    return record.messages if record.messages is not None else as_messages(prompt)
