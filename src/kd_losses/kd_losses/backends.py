"""Who makes the passes over the logits, and the choice."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

Backend = Literal["auto", "torch", "triton"]


def why_not_triton(device: torch.device) -> str | None:
    """Say what keeps Triton kernels from running on tensors of `device`; None if nothing does.

    Triton's interpreter, which runs kernels on a CPU, is for tests: it is used where it is asked
    for by name and TRITON_INTERPRET=1 is set.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, its kernels need a GPU; move them there"
    return None


def resolve(backend: str, device: torch.device, why_not: str | None) -> str:
    """Turn "auto" into the backend that runs, and check one that was chosen.

    Args:
        backend: what was asked for.
        device: of the tensors.
        why_not: what else keeps the kernels from doing this; None if nothing does.

    Raises:
        ValueError: the backend is unknown, or Triton was chosen and can't run; says why.
    """
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}"
        )
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reason = why_not or why_not_triton(device)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "torch"
    raise ValueError(f'backend: "triton" cannot run here: {reason}, or choose backend="auto"')
