"""`linear_kl_div` against F.kl_div on all logits, torchtune's and Liger's chunked losses.

    python -m benchmarks.kd_losses [--out RESULTS_DIR] [--device cpu|cuda] [--case 512x] [--quick]

Shapes: n tokens, H width, V vocabulary. Teacher and student share a frozen head; what is timed is
the mean KL and its gradient with respect to the student's hidden states, forward and backward.
Logits have a standard deviation of 4, which leaves the teacher about 3 nats of entropy, and KL is
about 0.1. torchtune and Liger are other people's packages, imported if they are there; rows of what
is not say so. Each implementation is compared with float64 before it is timed. What a row of
results/kd_losses-DEVICE.jsonl holds beside measure.py's:

    error_gradient  against float64, relative to the norm
    error_value     relative
    gflop_s         the three products that no implementation does without (6 n V H), over the
                    median
    over_products   the median over the time that these three products alone take, of all tokens
                    at once
    loop_ms         on a CPU, the median where the calls follow each other as in a training loop,
                    with malloc as it is by default; see kd_losses_loop.py
    loop_faults     the pages that such a call maps anew
    kernel_ms       on CUDA, the time for which the GPU is busy
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import kd_losses_loop, kd_losses_report, measure
from benchmarks.kd_losses_peers import IMPLEMENTATIONS, Implementation, truth, why_not

FP32, BF16 = torch.float32, torch.bfloat16
Call = Callable[[], object]
Case = tuple[tuple[int, int, int], tuple[torch.dtype, ...]]
CASES: dict[str, list[Case]] = {
    "cpu": [
        ((512, 576, 49152), (FP32, BF16)),
        ((128, 576, 49152), (FP32, BF16)),
        ((2048, 576, 49152), (BF16,)),
        ((512, 2048, 32000), (BF16,)),
        ((256, 896, 151936), (BF16,)),
    ],
    "cuda": [
        ((4096, 3584, 152064), (BF16,)),
        ((1024, 3584, 152064), (BF16,)),
        ((4096, 2048, 49152), (FP32, BF16)),
        ((8192, 4096, 32000), (BF16,)),
    ],
    "quick": [((24, 16, 301), (FP32, BF16))],
}
# Largest error of the gradient: what rounded logits allow at this KL, and what they do not.
TOLERANCES = {FP32: 1e-4, BF16: 0.25}


class Setting:
    """The tensors of one case."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        tokens, width, vocabulary = shape
        made = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, width, generator=made) * (4 / width**0.5)
        teacher = torch.randn(tokens, width, generator=made)
        student = teacher + 0.11 * torch.randn(tokens, width, generator=made)
        self.weight, self.teacher = weight.to(device, dtype), teacher.to(device, dtype)
        self.student = student.to(device, dtype).requires_grad_()

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    def call(self, implementation: Implementation) -> Callable[[], tuple[Tensor, Tensor]]:
        """The value and the gradient."""

        def both() -> tuple[Tensor, Tensor]:
            value = implementation.run(self.student, self.weight, self.teacher)
            return value.detach(), torch.autograd.grad(value, self.student)[0]

        return both

    def products_ms(self) -> float:
        """The time of the three matrix products, of all tokens at once, in ms."""
        logits = self.teacher @ self.weight.T

        def three() -> None:
            torch.mm(self.teacher, self.weight.T, out=logits)
            torch.mm(self.teacher, self.weight.T, out=logits)
            torch.mm(logits, self.weight)

        times = []
        for _ in range(4):
            if self.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            three()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:]) * 1e3


def call_of(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Call:
    """One implementation of a case, ready to call on a CPU."""
    return Setting(shape, dtype, "cpu").call(IMPLEMENTATIONS[name])


def check(name: str, setting: Setting, errors: dict[str, float]) -> None:
    """Hold the gradient to the table of tolerances."""
    limit = TOLERANCES[setting.dtype]
    error = errors["error_gradient"]
    # written so that NaN fails too
    assert error <= limit, f"{name} in {setting.dtype}: error of the gradient {error:.2g} > {limit}"


def measured(setting: Setting, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The rows of one case and dtype."""
    value, gradient = truth(setting.student, setting.weight, setting.teacher)
    base = {"case": setting.name, "shape": [*setting.shape], "dtype": str(setting.dtype)[6:]}
    known: dict[str, dict[str, object]] = {}
    calls: dict[str, Call] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        if reason := why_not(implementation, setting.device, setting.dtype):
            yield {**base, "implementation": name, "skipped": reason}
            continue
        call = setting.call(implementation)
        found, found_gradient = call()
        difference = (found_gradient.double() - gradient).norm() / gradient.norm()
        errors = {
            "error_gradient": difference.item(),
            "error_value": abs(found.item() - value) / value,
        }
        check(name, setting, errors)
        known[name] = {**errors, "kl": value, "note": implementation.note}
        calls[name] = call
    del gradient, found_gradient
    loop: dict[str, dict[str, float]] = {}
    if setting.device == "cpu":
        loop = kd_losses_loop.in_a_loop(
            call_of, calls, setting.shape, setting.dtype,
            repeats=options.repeats, limit_s=options.seconds,
        )  # fmt: skip
    products = setting.products_ms()
    tokens, width, vocabulary = setting.shape
    timed = measure.take_turns(
        calls,
        device=setting.device,
        warm_up=options.warm_up,
        repeats=options.repeats,
        limit_s=options.seconds,
    )
    for name, figures in timed.items():
        figures["gflop_s"] = 6 * tokens * width * vocabulary / figures["median_ms"] / 1e6
        figures["over_products"] = figures["median_ms"] / products
        figures["products_ms"] = products
        if setting.device == "cuda":
            figures["kernel_ms"] = measure.kernel_ms(calls[name])
        yield {**base, "implementation": name, **figures, **loop.get(name, {}), **known[name]}


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.options("python -m benchmarks.kd_losses", arguments)
    device, threads = options.device, torch.get_num_threads()
    path = options.out / f"kd_losses-{device}.jsonl"
    many = (options.threads or sorted({1, threads})) if device == "cpu" else [threads]
    try:
        for count in many:
            torch.set_num_threads(count)
            where = measure.machine(device)
            for shape, dtypes in CASES["quick" if options.quick else device]:
                for dtype in dtypes:
                    if options.case not in "x".join(map(str, shape)):
                        continue
                    rows = []
                    for row in measured(Setting(shape, dtype, device), options):
                        rows.append({**row, **where})
                        print(kd_losses_report.line(rows[-1]), flush=True)
                    measure.write(rows, path)  # now, lest a run that is cut short leave nothing
    finally:
        torch.set_num_threads(threads)
    if path.exists():
        rows = measure.read(path)
        kd_losses_report.chart(rows, path.with_suffix(".svg"))
        print(*kd_losses_report.goals(rows), sep="\n")
    return 0


def table(rows: list[dict[str, object]]) -> str:
    """What benchmarks.readme puts into src/kd_losses/README.md."""
    return kd_losses_report.table(rows)


if __name__ == "__main__":
    sys.exit(main())
