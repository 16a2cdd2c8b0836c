"""The ways to integrate, and the choice among them."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch")

__all__ = ["BACKENDS", "Backend"]
