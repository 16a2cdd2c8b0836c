"""KL from hidden states as others do it, for benchmarks.kd_losses, and in float64.

Shapes: n tokens, H width, V vocabulary. Every implementation is called as
`run(student, weight, teacher)` with (n, H), a frozen (V, H) and (n, H), and returns the mean over
the tokens of KL(teacher || student), teacher and student sharing the head.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_losses import linear_kl_div

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
TORCHTUNE, LIGER = "0.6.1", "0.8.5"
HOW = "pip install --no-deps --target FOLDER {}=={}, and FOLDER in PYTHONPATH"


class Implementation(NamedTuple):
    """One way to compute the mean KL.

    Attributes:
        run: the function, see the module.
        note: what to know about it.
        package: name and version that it comes from, if it is another's.
        only_cuda: why it runs on GPUs alone, if it does.
    """

    run: Run
    note: str = ""
    package: tuple[str, str] | None = None
    only_cuda: str = ""


def naive(student: Tensor, weight: Tensor, teacher: Tensor, *, upcast: bool) -> Tensor:
    """F.kl_div on all logits, with the softmax in the logits' dtype or in float32."""
    log_q, log_p = (
        (logits.float() if upcast else logits).log_softmax(-1)
        for logits in (student @ weight.T, teacher @ weight.T)
    )
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@cache
def _torchtune_losses() -> ModuleType:
    # torchtune's own imports want many more packages; the file of its losses wants torch alone
    files = importlib.metadata.files("torchtune") or []
    path = next(file for file in files if file.match("torchtune/modules/loss/kd_losses.py"))
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchtune(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """ForwardKLWithChunkedOutputLoss, 8 chunks; cross entropy less the teacher's entropy."""
    loss = _torchtune_losses().ForwardKLWithChunkedOutputLoss(num_output_chunks=8)
    labels = torch.zeros(1, len(student), dtype=torch.int64, device=student.device)
    chunks = [[chunk @ weight.T for chunk in rows.chunk(8)] for rows in (student, teacher)]
    return loss(*([chunk[None] for chunk in one] for one in chunks), labels)


def liger(student: Tensor, weight: Tensor, teacher: Tensor, *, chunk_size: int) -> Tensor:
    """LigerFusedLinearJSDLoss at beta 0, which is forward KL, without compilation."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk_size
    )
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    return loss(student, weight, teacher, weight, labels)


def liger_triton(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """LigerFusedLinearKLDivLoss, which wants the teacher's probabilities."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    target = (teacher @ weight.T).float().softmax(-1)
    return LigerFusedLinearKLDivLoss(reduction="batchmean")(student, weight, target)


def ours(
    student: Tensor, weight: Tensor, teacher: Tensor, *, two_heads: bool, backend: str
) -> Tensor:
    """`linear_kl_div`; with two heads they are equal, but a view is another tensor to it."""
    other = weight.view_as(weight) if two_heads else None
    return linear_kl_div(student, weight, teacher, other, backend=backend)


DW = "always allocates and computes the head's gradient"
IMPLEMENTATIONS: dict[str, Implementation] = {
    "F.kl_div": Implementation(partial(naive, upcast=False)),
    "F.kl_div, float32 softmax": Implementation(partial(naive, upcast=True)),
    "torchtune, 8 chunks": Implementation(
        torchtune, "its value leaves out the teacher's entropy", ("torchtune", TORCHTUNE)
    ),
    "Liger, 1024 rows": Implementation(
        partial(liger, chunk_size=1024), DW, ("liger-kernel", LIGER)
    ),
    "Liger, 64 rows": Implementation(partial(liger, chunk_size=64), DW, ("liger-kernel", LIGER)),
    "Liger, Triton": Implementation(
        liger_triton,
        "holds the teacher's probabilities in float32",
        ("liger-kernel", LIGER),
        "its kernels need a GPU",
    ),
    "linear_kl_div, two heads": Implementation(partial(ours, two_heads=True, backend="torch")),
    "linear_kl_div": Implementation(partial(ours, two_heads=False, backend="torch")),
    "linear_kl_div, Triton": Implementation(
        partial(ours, two_heads=False, backend="triton"),
        only_cuda="Triton's interpreter says nothing about speed",
    ),
}


def why_not(implementation: Implementation, device: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot be measured; None if it can."""
    if implementation.only_cuda and (device != "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        return implementation.only_cuda
    if implementation.package is not None:
        name, version = implementation.package
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed; {HOW.format(name, version)}"
        if found != version:
            return f"{name} {found} is installed; {HOW.format(name, version)}"
    if dtype == torch.float32 and implementation is IMPLEMENTATIONS["F.kl_div, float32 softmax"]:
        return "the same as F.kl_div in float32"
    return None


def truth(student: Tensor, weight: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The mean KL and its gradient with respect to the student, in float64, few rows at a time."""
    value, gradients, head = 0.0, [], weight.detach().double()
    for rows, teacher_rows in zip(student.detach().split(32), teacher.split(32), strict=True):
        z, z_teacher = ((h.double() @ head.T).log_softmax(-1) for h in (rows, teacher_rows))
        p = z_teacher.exp()
        value += (p * (z_teacher - z)).sum().item()
        gradients.append((z.exp() - p) @ head)
    return value / len(student), torch.cat(gradients) / len(student)
