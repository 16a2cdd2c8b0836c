"""Losses fused with a frozen head: each row's gradient is computed at once and alone is kept.

Letters: n rows, c rows of a chunk, k rows of a block, H width, V vocabulary, m losses per row.

Two sizes matter on a CPU. A chunk is what goes through the head in one matrix product: many rows,
or reading the head costs more than multiplying with it. A block is what the softmax and all that
follows work on at a time: few rows, which stay in the cache from one pass to the next.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kd_losses import triton_rows
from kd_losses.block_losses import Block, block_losses, losses_per_row
from kd_losses.head import (
    LinearHead,
    chunk_rows,
    head_products,
    pull_back,
    scale_row_gradients,
)
from kd_losses.reduction import accumulation_dtype

# Of one tensor of a block, of which about four are in use: together they pass between L2 and L3.
_BLOCK_BYTES = 2**20


class _Room:
    """Tensors of a block's size to write to, the same ones for every block."""

    def __init__(self, rows: int, weight: Tensor) -> None:
        self._shape = (rows, weight.shape[0])
        self._like = weight
        self._made: dict[int, Tensor] = {}
        self.rows = rows

    def __call__(self, number: int) -> Tensor:
        if number not in self._made:
            dtype = accumulation_dtype(self._like.dtype)
            self._made[number] = self._like.new_empty(self._shape, dtype=dtype)
        return self._made[number][: self.rows]

    def widened(self, number: int, rows: Tensor) -> Tensor:
        """The rows themselves, or a copy in the dtype of the sums."""
        if rows.dtype == accumulation_dtype(rows.dtype):
            return rows
        return self(number).copy_(rows)


def _compute(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    kind: str,
    with_gradient: bool,
    valid: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    extras: list[Tensor],
    parameter: float,
    temperature: float,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Losses of all rows and the gradient of the first loss of each.

    Args:
        student: (n, H).
        teacher: (n, H'), or None for a loss without a teacher's head.
        weight: (V, H), with bias and softcap the student's head.
        kind: see ``block_losses``.
        with_gradient: False: the gradient is (0, H).
        valid: (n,) boolean, True, then False: the rows that count; the others' results are 0. None:
            all count.
        bias: (V,) or None.
        softcap: see ``LinearHead``.
        teacher_weight: (V, H') or None: the student's head, whose bias cancels and which has no
            softcap.
        teacher_bias: (V,) or None.
        teacher_softcap: see ``LinearHead``.
        extras: what else the loss needs, each (n, ...).
        parameter: of the divergence.
        temperature: divides the logits.
        chunk_size: rows per matrix product; None chooses.
        backend: "torch" or "triton".

    Returns:
        Losses (m, n), and T times the gradient with respect to the student's rows (n, H).
    """
    head = LinearHead(weight, bias, softcap)
    losses, gradient = _results(student, weight, kind, with_gradient)
    teacher_head = None
    if teacher_weight is not None:
        teacher_head = LinearHead(teacher_weight, teacher_bias, teacher_softcap)
    count = len(student) if valid is None else int(valid.sum())
    losses[:, count:], gradient[count:] = 0, 0
    rows = chunk_rows(chunk_size, count, student.device)
    buffer = _buffer(
        (1 if teacher is None else 2) * rows, weight, _logits_dtype(weight, teacher_weight)
    )
    room = _Room(_block_rows(rows, losses[:, :1], weight), weight)
    # the head is in autocast's dtype already; sums over the vocabulary must stay as they are
    with torch.autocast(student.device.type, enabled=False):
        for start in range(0, count, rows):
            chunk = slice(start, min(start + rows, count))
            logits = head_products(
                student[chunk], None if teacher is None else teacher[chunk], head, teacher_head,
                buffer,
            )  # fmt: skip
            scales = None
            if backend == "triton":
                triton_rows.forward_kl(
                    logits, losses[0, chunk], head, teacher_head, temperature, with_gradient
                )
            else:
                scales = _blocks(
                    logits, losses[:, chunk], head, teacher_head,
                    [extra[chunk] for extra in extras], kind, parameter, temperature,
                    with_gradient, room,
                )  # fmt: skip
            if with_gradient:
                pull_back(logits[-1], scales, weight, gradient[chunk])
    return losses, gradient


def _results(
    student: Tensor, weight: Tensor, kind: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(weight.dtype)
    losses = student.new_empty(losses_per_row(kind), len(student), dtype=dtype)
    return losses, student.new_empty(len(student) if with_gradient else 0, student.shape[1])


def _logits_dtype(weight: Tensor, teacher_weight: Tensor | None) -> torch.dtype:
    """The student's, unless a finer teacher's logits would be rounded to half precision by it."""
    if teacher_weight is None or teacher_weight.dtype == weight.dtype:
        return weight.dtype
    return accumulation_dtype(weight.dtype)


def _buffer(rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for logits (rows, V), each row of which lies an odd number of cache lines further on.

    After a multiple of 4 KiB, as 49,152 entries are, all rows fall on the same lines of a cache,
    which takes a product in float32 a tenth longer. One in half precision takes the same time.
    """
    size, stride = weight.shape[0], weight.shape[0]
    if weight.device.type == "cpu" and dtype.itemsize >= 4:
        line = 64 // dtype.itemsize
        stride = (math.ceil(size / line) | 1) * line
    return weight.new_empty(rows, stride, dtype=dtype)[:, :size]


def _block_rows(rows: int, a_loss: Tensor, weight: Tensor) -> int:
    if weight.device.type != "cpu":
        return rows
    block = torch.get_num_threads() * _BLOCK_BYTES // (weight.shape[0] * a_loss.element_size())
    return max(1, min(block, rows))


def _blocks(
    logits: Tensor,
    losses: Tensor,
    head: LinearHead,
    teacher_head: LinearHead | None,
    extras: list[Tensor],
    kind: str,
    parameter: float,
    temperature: float,
    with_gradient: bool,
    room: _Room,
) -> Tensor | None:
    """Work through a chunk's logits; the gradient takes the place of the last of them.

    Returns:
        What the rows of that gradient have been divided by, (c, 1), if they have.
    """
    scales = None
    if with_gradient and head.weight.dtype == torch.float16:
        scales = losses.new_empty(logits.shape[1], 1)
    block_rows = room.rows
    for start in range(0, logits.shape[1], block_rows):
        rows = slice(start, min(start + block_rows, logits.shape[1]))
        room.rows = rows.stop - start
        last = room.widened(-1, logits[-1, rows])
        teacher_logits, student_logits, difference = None, None, None
        if len(logits) == 2:
            teacher_logits = room.widened(-2, logits[0, rows])
            (head if teacher_head is None else teacher_head).finish(teacher_logits, temperature)
        if len(logits) == 2 and teacher_head is None:
            difference = last if temperature == 1 else last.div_(temperature)
        else:
            student_logits = head.finish(last, temperature)
        slope = None
        if with_gradient and head.softcap is not None:
            slope = torch.mul(last, temperature / head.softcap, out=room(-3))
            slope.square_().neg_().add_(1)
        block = Block(
            teacher_logits, student_logits, difference, [extra[rows] for extra in extras],
            rounded=last.dtype != logits.dtype,
        )  # fmt: skip
        values, gradient = block_losses(kind, parameter, block, room, with_gradient)
        for number, value in enumerate(values):
            losses[number, rows] = value
        if gradient is None:
            continue
        if slope is not None:
            gradient.mul_(slope)
        if scales is not None:
            # most of a row's entries would underflow in float16 if it kept its scale
            scales[rows] = gradient.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
            gradient.div_(scales[rows])
        if gradient.data_ptr() != logits[-1, rows].data_ptr():
            logits[-1, rows] = gradient
    room.rows = block_rows
    return scales


_compute_whole = torch.library.custom_op("kd_losses::frozen_head", _compute, mutates_args=())


@_compute_whole.register_fake
def _(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    kind: str,
    with_gradient: bool,
    *_options: object,
) -> tuple[Tensor, Tensor]:
    return _results(student, weight, kind, with_gradient)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, temperature: float, student: Tensor, *options: Any) -> Tensor:
        # the compiler sees one operator, not a loop
        compute = _compute_whole if torch.compiler.is_compiling() else _compute
        losses, gradient = compute(student, *options)
        ctx.save_for_backward(gradient)
        ctx.temperature, ctx.options = temperature, len(options)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factors = grad_losses[0] / ctx.temperature
        grad_student = scale_row_gradients(gradient, factors)
        return (None, grad_student, *(None,) * ctx.options)


def frozen_head_losses(
    student: Tensor,
    teacher: Tensor | None,
    head: LinearHead,
    teacher_head: LinearHead | None,
    *,
    kind: str,
    parameter: float = 0.0,
    temperature: float,
    chunk_size: int | None,
    backend: str = "torch",
    extras: tuple[Tensor, ...] = (),
    valid: Tensor | None = None,
) -> Tensor:
    """Losses (m, n) of all rows; the first is differentiable with respect to ``student``.

    Args:
        student: (n, H).
        teacher: (n, H'), or None for a loss without a teacher's head.
        head: the student's.
        teacher_head: None: the student's, which has no softcap.
        kind: see ``block_losses``, like the rest.
        parameter: of the divergence.
        temperature: divides the logits.
        chunk_size: rows per matrix product; None chooses.
        backend: "torch" or "triton".
        extras: what else the loss needs, each (n, ...).
        valid: (n,) boolean, True, then False: the rows that count; the others' losses are 0. None:
            all count.
    """
    own: tuple[Tensor | None, Tensor | None, float | None] = (None, None, None)
    if teacher_head is not None:
        own = (teacher_head.weight, teacher_head.bias, teacher_head.softcap)
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    losses: Tensor = _FrozenHead.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        temperature, student, teacher, head.weight, kind, with_gradient, valid, head.bias,
        head.softcap, *own, list(extras), parameter, temperature, chunk_size, backend,
    )  # fmt: skip
    return losses
