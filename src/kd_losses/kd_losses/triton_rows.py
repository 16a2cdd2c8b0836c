"""Launching the Triton kernel on a chunk's logits.

Letters: c rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kd_losses.head import LinearHead

# Entries of a row that are read at a time.
_BLOCK = 4096
# As in kd_losses.row_losses: beyond it nothing cancels, and the exponential stays finite.
_LARGEST_LOG_RATIO = 50.0


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """Say why logits of this dtype are not for the kernel; None if they are."""
    if dtype in (torch.float32, torch.bfloat16):
        return None
    return f"the kernel takes float32 and bfloat16, not {dtype}"


def forward_kl(
    logits: Tensor,
    losses: Tensor,
    head: LinearHead,
    teacher_head: LinearHead | None,
    temperature: float,
    with_gradient: bool,
) -> None:
    """Compute KL(p || q) of each row of a chunk.

    Args:
        logits: (2, c, V) float32 or bfloat16, as the products left them: the teacher's, then the
            student's or, with a shared head, the difference. The gradient takes the place of the
            latter.
        losses: (c,) float32, contiguous; written.
        head: the student's, of which the bias is read.
        teacher_head: None: the student's.
        temperature: divides the logits.
        with_gradient: False: nothing is written to ``logits``.
    """
    teacher_logits, last = logits.unbind()
    shared = teacher_head is None
    teacher_bias = head.bias if teacher_head is None else teacher_head.bias
    with _device_of(logits):
        _kernels().forward_kl_kernel[(logits.shape[1],)](
            teacher_logits,
            last,
            losses,
            head.bias,
            teacher_bias,
            last.stride(0),
            1 / temperature,
            VOCABULARY=logits.shape[2],
            SHARED=shared,
            HAS_BIAS=head.bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            WITH_GRADIENT=with_gradient,
            LARGEST=_LARGEST_LOG_RATIO,
            BLOCK=_BLOCK,
            num_warps=16,
        )


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _kernels() -> ModuleType:
    # only now: triton may be missing
    return import_module("kd_losses.triton_kernels")
