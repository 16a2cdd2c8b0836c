"""CIF: every backend of `cif` against torch-cif, dense weights, index_add and a loop over frames.

    python -m benchmarks.cif [--out RESULTS_DIR] [--device cpu|cuda] [--case 8x1500x1280] [--quick]

Shapes: B batch, T frames, N tokens, D width; N differs from row to row, M is the largest. alpha is
float32 and scaled so that row b fires exactly N_b tokens. Each implementation is compared with
float64 before it is timed. What a row of results/cif-DEVICE.jsonl holds beside measure.py's:

    pass      forward (with what it saves for the backward), backward (with a graph that is kept),
              or forward+backward
    error_*   of out, dh and dalpha against float64, relative to the norm
    gb_s      the least bytes that must be moved, over the median; with s bytes per element
                  forward:   s D B (T + M) + 4 B T          read h and alpha, write out
                  backward:  s D B (2 T + M) + 12 B T       read h, dout and an int64 prefix,
                                                            write dh and dalpha
    over_floor  the median over the time that a copy of as many bytes takes (copy_gb_s)
    kernel_*  on CUDA, the time for which the GPU is busy, the rest of the median being spent on
              launching; and the same GB/s over that time

Nothing flushes caches: small shapes find their input in them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import cif_report, measure
from benchmarks.cif_peers import (
    IMPLEMENTATIONS,
    TOLERANCES,
    Implementation,
    scaled_prefix,
    truth,
    why_not,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Call = Callable[[], object]
# ((B, T, D), (least N, most N), dtypes)
Case = tuple[tuple[int, int, int], tuple[int, int], tuple[torch.dtype, ...]]
CASES: dict[str, list[Case]] = {
    "cpu": [
        ((8, 1500, 1280), (60, 400), (FP32, BF16)),
        ((1, 1500, 512), (60, 400), (FP32,)),
        ((8, 375, 512), (15, 100), (FP32,)),
        ((8, 400, 1280), (500, 1200), (FP32,)),
        ((2, 12000, 256), (500, 3000), (FP32,)),
        ((32, 1500, 1280), (60, 400), (FP32,)),
    ],
    "cuda": [
        ((32, 1500, 1280), (400, 400), (FP32, BF16, FP16)),
        ((32, 1500, 1280), (60, 400), (FP32, BF16, FP16)),
        ((8, 1500, 1280), (60, 400), (FP32, BF16)),
        ((1, 1500, 512), (60, 400), (FP32, BF16)),
        ((32, 400, 1280), (500, 1200), (BF16,)),
        ((32, 1500, 4096), (60, 400), (BF16,)),
        ((64, 3000, 1280), (120, 800), (BF16,)),
    ],
    "quick": [
        ((2, 40, 8), (2, 9), (FP32, BF16)),
        ((2, 10, 8), (20, 30), (FP32,)),
    ],
}


class Setting:
    """The tensors of one case, its truth, and what its rows share."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.shape, self.tokens, _ = case
        self.dtype = dtype
        self.device = device
        batch, frames, _ = self.shape
        made = torch.Generator().manual_seed(0)
        low, high = self.tokens
        lengths = torch.randint(low, high + 1, (batch,), generator=made)
        self.num_tokens = int(lengths.max())
        upstream = torch.randn(batch, self.num_tokens, self.shape[2], generator=made)
        real = torch.arange(self.num_tokens) < lengths[:, None]
        hidden = torch.randn(self.shape, generator=made)
        alphas = torch.rand(batch, frames, generator=made)
        after, before = scaled_prefix(alphas.double(), lengths)
        self.most_fires = int((after.floor() - before.floor()).max())
        self.lengths = lengths.to(device)
        self.upstream = (upstream * real[..., None]).to(device, dtype)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.alphas = alphas.to(device).requires_grad_()

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} N{'-'.join(map(str, self.tokens))}"

    def floor_bytes(self) -> dict[str, int]:
        """The least bytes of each pass, see the module."""
        batch, frames, width = self.shape
        row = self.hidden.element_size() * batch * width
        forward = row * (frames + self.num_tokens) + 4 * batch * frames
        backward = row * (2 * frames + self.num_tokens) + 12 * batch * frames
        both = forward + backward
        return {"forward": forward, "backward": backward, "forward+backward": both}

    def passes(self, implementation: Implementation) -> dict[str, Callable[[], Call]]:
        """Pass -> what prepares the call that is timed."""
        leaves = [self.hidden, self.alphas]

        def run() -> Tensor:
            return implementation.run(*leaves, self.lengths, self.num_tokens)

        def backward() -> Call:
            out = run()
            return lambda: torch.autograd.grad(out, leaves, self.upstream, retain_graph=True)

        return {
            "forward": lambda: run,
            "backward": backward,
            "forward+backward": lambda: lambda: torch.autograd.grad(run(), leaves, self.upstream),
        }

    def errors(self, implementation: Implementation, wanted: Sequence[Tensor]) -> dict[str, float]:
        """The errors of output and gradients against `wanted`, relative to the norm."""
        leaves = [self.hidden, self.alphas]
        out = implementation.run(*leaves, self.lengths, self.num_tokens)
        found = (out, *torch.autograd.grad(out, leaves, self.upstream))
        return {
            f"error_{name}": ((x.double() - want).norm() / want.norm()).item()
            for name, x, want in zip(("out", "dh", "dalpha"), found, wanted, strict=True)
        }


def check(name: str, implementation: Implementation, dtype: torch.dtype, errors: dict) -> str:
    """Hold errors to the table of tolerances; the note that the rows carry."""
    frames, alphas = TOLERANCES[implementation.arithmetic][dtype]
    limits = {"error_out": frames, "error_dh": frames, "error_dalpha": alphas}
    wrong = [f"{k} {errors[k]:.2g} > {limit}" for k, limit in limits.items() if errors[k] > limit]
    if math.isnan(sum(errors.values())):
        wrong.append("NaN")
    if not wrong:
        return implementation.note
    assert implementation.foreign, f"{name} in {dtype}: {', '.join(wrong)}"
    return f"WRONG HERE ({', '.join(wrong)}); {implementation.note}"


def measured(
    setting: Setting, copy_gb_s: float, options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """The rows of one case and dtype."""
    wanted = truth(
        setting.hidden, setting.alphas, setting.lengths, setting.num_tokens, setting.upstream
    )
    known: dict[str, dict[str, object]] = {}
    passes: dict[str, dict[str, Callable[[], Call]]] = {}
    base = {
        "case": setting.name,
        "shape": [*setting.shape],
        "tokens": [*setting.tokens],
        "dtype": str(setting.dtype)[6:],
    }
    for name, implementation in IMPLEMENTATIONS.items():
        reason = why_not(name, setting.most_fires)
        try:
            errors = {} if reason else setting.errors(implementation, wanted)
        except ValueError as error:  # a backend that cannot run here says why
            reason = str(error)
        if reason:
            yield {**base, "implementation": name, "skipped": reason}
            continue
        note = check(name, implementation, setting.dtype, errors)
        known[name] = {**errors, "note": note}
        passes[name] = setting.passes(implementation)
    del wanted
    for which, floor in setting.floor_bytes().items():
        turns = {name: prepare[which]() for name, prepare in passes.items()}
        timed = measure.take_turns(
            turns,
            device=setting.device,
            warm_up=options.warm_up,
            repeats=options.repeats,
            limit_s=options.seconds,
        )
        for name, figures in timed.items():
            gb_s = floor / figures["median_ms"] / 1e6
            figures |= {"gb_s": gb_s, "copy_gb_s": copy_gb_s, "over_floor": copy_gb_s / gb_s}
            if setting.device == "cuda":
                busy = measure.kernel_ms(turns[name])
                figures |= {"kernel_ms": busy, "kernel_gb_s": floor / busy / 1e6}
            yield {**base, "implementation": name, "pass": which, **figures, **known[name]}


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.options("python -m benchmarks.cif", arguments)
    device, threads = options.device, torch.get_num_threads()
    path = options.out / f"cif-{device}.jsonl"
    many = (options.threads or sorted({1, threads})) if device == "cpu" else [threads]
    try:
        for count in many:
            torch.set_num_threads(count)
            where = measure.machine(device)
            copy_gb_s = measure.copy_gb_s(device, mib=8 if options.quick else 256)
            for case in CASES["quick" if options.quick else device]:
                for dtype in case[2]:
                    setting = Setting(case, dtype, device)
                    if options.case not in setting.name:
                        continue
                    rows = []
                    for row in measured(setting, copy_gb_s, options):
                        rows.append({**row, **where})
                        print(cif_report.line(rows[-1]), flush=True)
                    measure.write(rows, path)  # now, lest a run that is cut short leave nothing
    finally:
        torch.set_num_threads(threads)
    if path.exists():
        rows = measure.read(path)
        cif_report.chart(rows, path.with_suffix(".svg"))
        print(*cif_report.goals(rows), sep="\n")
    return 0


def table(rows: list[dict[str, object]]) -> str:
    """What benchmarks.readme puts into src/cif/README.md."""
    return cif_report.table(rows)


if __name__ == "__main__":
    sys.exit(main())
