"""The ways to integrate, and the choice among them."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch", "dense"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch", "dense")

__all__ = ["BACKENDS", "Backend", "resolve", "why_not_triton"]


def why_not_triton(device: torch.device) -> str | None:
    """Say what keeps the Triton kernels from running on tensors of `device`; None if nothing does.

    Triton's interpreter, which runs kernels on a CPU, is for tests: it is used where it is asked
    for by name and TRITON_INTERPRET=1 is set.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}, its kernels need a GPU; move them there"
    return None


def resolve(backend: Backend, device: torch.device) -> Backend:
    """Turn "auto" into the backend that runs, and check one that was chosen.

    Raises:
        ValueError: Triton was chosen and cannot run; the message says why.
    """
    if backend == "auto":
        fast = device.type == "cuda" and why_not_triton(device) is None
        return "triton" if fast else "torch"
    if backend == "triton" and (reason := why_not_triton(device)) is not None:
        raise ValueError(f'backend: "triton" cannot run here: {reason}, or choose backend="auto"')
    return backend
