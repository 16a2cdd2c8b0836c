"""The ways to compute the low-rank update, and the choice among them."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")
# The kernels hold a whole row of rank r on the chip.
MOST_RANK = 256
# Elements of the chosen rows from which on "auto" takes the kernels: below, launching them one by
# one costs more than the copies that they save.
LEAST_ELEMENTS = 2**20

__all__ = ["BACKENDS", "Backend", "check_backend", "resolve", "why_not_triton"]


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


def why_not_triton(device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """Say what keeps the Triton kernels from running on such tensors; None if nothing does.

    Triton's interpreter, which runs kernels on a CPU, is for tests: it is used where it is asked
    for by name and TRITON_INTERPRET=1 is set.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}, its kernels need a GPU; move them there"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32 at most, the tensors are {dtype}; cast them"
    if rank > MOST_RANK:
        return f"its kernels take a rank of at most {MOST_RANK}, this one is {rank}; lower it"
    return None


def resolve(
    backend: Backend, device: torch.device, dtype: torch.dtype, elements: int, rank: int
) -> Literal["triton", "torch"]:
    """Turn "auto" into the backend that runs, and check one that was chosen.

    Args:
        backend: As the caller gave it.
        device: Of the tensors.
        dtype: In which the update is computed.
        elements: Of the chosen rows, R times the features on this side of the layer.
        rank: r.

    Raises:
        ValueError: Triton was chosen and cannot run; the message says why.
    """
    if backend == "auto":
        large = device.type == "cuda" and elements >= LEAST_ELEMENTS
        return "triton" if large and why_not_triton(device, dtype, rank) is None else "torch"
    if backend == "triton" and (reason := why_not_triton(device, dtype, rank)) is not None:
        raise ValueError(f'backend: "triton" cannot run here: {reason}, or choose backend="auto"')
    return backend
