"""What a user turn around an utterance must have in it."""

from __future__ import annotations

from .processing import PLACEHOLDER


def check_prompt(prompt: str) -> None:
    """Refuse a user turn that does not say, once, where the speech goes.

    Raises:
        ValueError: it has ``{speech}`` in it never, or twice.
    """
    if prompt.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"prompt: expected {PLACEHOLDER} exactly once, where the speech goes; got {prompt!r}"
        )
