"""The pieces against the same computation written plainly in torch: forward and backward.

    python -m benchmarks.pieces [--out RESULTS_DIR] [--device cpu|cuda] [--quick]

Each case first checks that its implementations agree. The fused KL is compared with F.kl_div on the
logits of the selected positions and of all positions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from kd_losses import linear_kl_div

# case -> (shape on a CPU, on a GPU, toy); what the letters mean is in each case's docstring
SHAPES = {
    "linear_kl_div": ((8, 96, 576, 16384), (16, 384, 2048, 131072), (2, 8, 16, 64)),
}


def backward(run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that runs forward and backward and returns the gradients of the leaves."""

    def call() -> list[Tensor]:
        return list(torch.autograd.grad(run(), leaves))

    return call


def kl_case(shape: Sequence[int], device: str, dtype: torch.dtype) -> dict:
    """Shape: B batch, T positions (a third of them selected), D width, V vocabulary."""
    batch, positions, width, vocabulary = shape
    head = torch.randn(vocabulary, width, device=device, dtype=dtype) / width**0.5
    student = torch.randn(batch, positions, width, device=device, dtype=dtype, requires_grad=True)
    teacher = (student + 0.3 * torch.randn_like(student)).detach()
    mask = (torch.arange(positions, device=device) % 3 == 0).expand(batch, -1)

    def kl(ours: Tensor, theirs: Tensor) -> Tensor:
        log_q, log_p = ((h @ head.mT).float().log_softmax(-1) for h in (ours, theirs))
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    def everywhere() -> Tensor:
        return (kl(student, teacher) * mask).sum() / mask.sum()

    return {
        "F.kl_div, selected": backward(lambda: kl(student[mask], teacher[mask]).mean(), [student]),
        "F.kl_div, all": backward(everywhere, [student]),
        "linear_kl_div": backward(
            lambda: linear_kl_div(student, head, teacher, mask=mask), [student]
        ),
    }


CASES = {"linear_kl_div": kl_case}


def check_agreement(name: str, calls: dict[str, Callable[[], list[Tensor]]], tol: float) -> None:
    (_, first), *others = calls.items()
    expected = first()
    for other, call in others:
        for got, want in zip(call(), expected, strict=True):
            error = (got.float() - want.float()).norm() / want.float().norm()
            assert error < tol, f"{name}: {other} is off by {error:.2g} of the gradient's norm"


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.options("python -m benchmarks.pieces", arguments)
    where = measure.machine(options.device)
    dtypes = (torch.float32, torch.bfloat16) if options.device == "cuda" else (torch.float32,)
    rows = []
    for name, case in CASES.items():
        if options.case not in name:
            continue
        shape = SHAPES[name][2 if options.quick else int(options.device == "cuda")]
        for dtype in dtypes:
            torch.manual_seed(0)
            calls = case(shape, options.device, dtype)
            check_agreement(name, calls, tol=5e-2 if dtype == torch.bfloat16 else 1e-3)
            timed = measure.take_turns(
                calls, device=options.device, warm_up=options.warm_up, repeats=options.repeats
            )
            for implementation, figures in timed.items():
                setting = {"case": name, "implementation": implementation, "shape": list(shape)}
                rows.append({**setting, "dtype": str(dtype)[6:], **figures, **where})
                print(
                    f"{name:14} {str(dtype)[6:]:9} {implementation:20} "
                    f"{figures['median_ms']:9.2f} ms  x {figures['over_first']:.2f}",
                    flush=True,
                )
    measure.write(rows, options.out / "pieces.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
