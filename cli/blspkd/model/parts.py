"""The parts of a model that can be trained, each by itself."""

from __future__ import annotations

from typing import Literal

Part = Literal["adapter", "plora", "encoder"]


def part_of(name: str) -> Part:
    """The part that a trained parameter belongs to.

    Args:
        name: of the parameter, whatever prefix a wrapper puts before it.
    """
    if ".lora_" in name:
        return "plora"
    return "encoder" if "speech_encoder." in name else "adapter"
