"""Partial LoRA: one layer beside the frozen layer, PEFT and a dense mask; decoding, mask off.

    python -m benchmarks.plora [--out RESULTS_DIR] [--device cpu|cuda] [--case r16] [--quick]

Shapes: B batch, T positions, K input features, N output features, r the rank; a share of the
positions is masked. x requires a gradient, the layer is frozen, A and B are float32. Each
implementation is compared with float64 before it is timed. What a row of results/plora-DEVICE.jsonl
holds beside measure.py's, where extra_ms is the time over the base layer's:
    added_ms   on a CPU, the time of a call outside of the layer's own two products, over that of
               the base layer alone: plora_products.py, by the clock, median, p20 and p80 of turns.
               The products take most of a call, and from one to the next they differ by more than
               an adapter adds; extra_ms has that noise. What PEFT adds doubles while other programs
               use the memory, what PLoRA adds grows less. For the ratio of a calm machine:
               OMP_NUM_THREADS=1 chrt -r 20 taskset -c 1 python -m benchmarks.plora --threads 1

    pass       forward+backward of one layer, or decode: 8 tokens, one at a time, through a small
               Llama whose cache holds 128 positions
    masked     share of positions, in percent
    error_*    of out, dx, dA and dB against float64, relative to the norm
    saved_mib  what autograd keeps for the backward pass: whole storages, each once, no parameters
    kernel_ms  on CUDA, the time for which the GPU is busy

PEFT adapts every position, whatever the mask. With dropout the results are random and not compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import measure, plora_report
from benchmarks.plora_peers import (
    IMPLEMENTATIONS,
    TOLERANCES,
    Implementation,
    Problem,
    decoders,
    truth,
    why_not,
)
from benchmarks.plora_products import added_ms
from plora import plora_mask

FP32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    """B, T, K, N and r; percent of positions masked; dropout."""

    shape: tuple[int, int, int, int, int]
    masked: int
    dtype: torch.dtype
    dropout: float = 0.0

    @property
    def name(self) -> str:
        batch, length, width, out, rank = self.shape
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"{batch}x{length} {width}x{out} r{rank} {self.masked}%{dropout}"

    @property
    def label(self) -> str:
        """The name with the dtype, which --case is looked for in."""
        return f"{self.name} {str(self.dtype)[6:]}"


def _cases(main: tuple[int, int, int, int, int], *others: Case) -> list[Case]:
    return [*(Case(main, masked, BF16) for masked in (25, 6, 100)), *others]


CASES: dict[str, list[Case]] = {
    "cpu": _cases(
        (1, 2048, 2048, 2048, 16),
        Case((1, 2048, 2048, 2048, 16), 25, BF16, 0.05),
        Case((1, 2048, 2048, 2048, 16), 25, FP32),
        Case((1, 2048, 2048, 2048, 64), 25, BF16),
        Case((1, 2048, 1024, 1024, 16), 25, BF16),
        Case((8, 256, 2048, 2048, 16), 25, BF16),
    ),
    "cuda": _cases(
        (1, 2048, 4096, 4096, 16),
        Case((1, 2048, 4096, 4096, 16), 25, BF16, 0.05),
        Case((1, 2048, 4096, 4096, 16), 25, FP32),
        Case((1, 2048, 4096, 4096, 64), 25, BF16),
        Case((8, 2048, 4096, 4096, 16), 25, BF16),
        Case((1, 2048, 1024, 1024, 16), 25, BF16),
    ),
    "quick": [Case((2, 24, 16, 12, 4), 25, FP32), Case((2, 24, 16, 12, 4), 100, BF16, 0.1)],
}
# width and layers of the Llama
DECODERS = {"cpu": (1024, 4), "cuda": (2048, 8), "quick": (64, 1)}


def problem_of(case: Case, device: str) -> tuple[Problem, Tensor, Tensor]:
    """The layer and masks of a case, x, and the gradient of the output."""
    made = torch.Generator().manual_seed(0)
    batch, length, width, out, rank = case.shape
    count = max(1, length * case.masked // 100)
    base = nn.Linear(width, out, bias=False, device=device, dtype=case.dtype).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(torch.randn(out, width, generator=made) / width**0.5)
    span, scattered = (torch.zeros(batch, length, dtype=torch.bool) for _ in range(2))
    for row in range(batch):
        start = int(torch.randint(length - count + 1, (), generator=made))
        span[row, start : start + count] = True
        scattered[row, torch.randperm(length, generator=made)[:count]] = True
    problem = Problem(
        base,
        (torch.randn(rank, width, generator=made) / width**0.5).to(device),
        (torch.randn(out, rank, generator=made) / rank**0.5).to(device),
        span.to(device),
        scattered.to(device),
        case.dropout,
    )
    x, upstream = (
        torch.randn(batch, length, features, generator=made).to(device, case.dtype)
        for features in (width, out)
    )
    return problem, x.requires_grad_(), upstream


def check(
    name: str, problem: Problem, implementation: Implementation, x: Tensor, upstream: Tensor
) -> dict[str, float]:
    """The errors of output and gradients, which have to be within TOLERANCES."""
    out = implementation.run(x)
    found = [out, *torch.autograd.grad(out, [x, *implementation.parameters], upstream)]
    wanted = truth(problem, implementation, x, upstream)
    errors = {
        f"error_{which}": ((got.double() - want).norm() / want.norm()).item()
        for which, got, want in zip(("out", "dx", "da", "db"), found, wanted, strict=False)
    }
    limit = TOLERANCES[x.dtype]
    assert all(error <= limit for error in errors.values()), f"{name}: {errors} > {limit}"
    return errors


def saved_mib(implementation: Implementation, problem: Problem, x: Tensor) -> float:
    """MiB of the storages that a forward pass keeps for the backward pass, without parameters."""
    owned = {p.untyped_storage().data_ptr() for p in implementation.parameters}
    owned.add(problem.base.weight.untyped_storage().data_ptr())
    owned |= {p.untyped_storage().data_ptr() for p in _frozen(implementation)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # held, lest another storage get its address
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = implementation.run(x)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def _frozen(implementation: Implementation) -> Iterator[Tensor]:
    """Parameters of a module that an implementation's `run` is, or closes over."""
    run = implementation.run
    cells = [cell.cell_contents for cell in getattr(run, "__closure__", None) or ()]
    for held in (run, *cells):
        if isinstance(held, nn.Module):
            yield from held.parameters()


def layer_rows(case: Case, device: str, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The rows of one case."""
    problem, x, upstream = problem_of(case, device)
    known: dict[str, dict[str, object]] = {}
    turns: dict[str, Callable[[], object]] = {}
    base = {
        "case": case.name,
        "shape": [*case.shape],
        "masked": case.masked,
        "dropout": case.dropout,
        "dtype": str(case.dtype)[6:],
        "pass": "forward+backward",
    }
    for name, build in IMPLEMENTATIONS.items():
        reason = why_not(name, case.dtype, device)
        if reason:
            yield {**base, "implementation": name, "skipped": reason}
            continue
        one = build(problem)
        errors = {} if case.dropout else check(name, problem, one, x, upstream)
        known[name] = {**errors, "saved_mib": saved_mib(one, problem, x)}

        def call(one: Implementation = one) -> object:
            return torch.autograd.grad(one.run(x), [x, *one.parameters], upstream)

        turns[name] = call
    if device == "cpu":
        weight, repeats, limit_s = problem.base.weight, options.repeats, options.seconds
        for name, added in added_ms(turns, weight, repeats=repeats, limit_s=limit_s).items():
            known[name].update(added)
    yield from _timed(turns, base, known, device, options)


def decode_rows(
    width: int, layers: int, device: str, options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """Tokens, one at a time, through decoders whose caches hold the prompt."""
    from transformers import DynamicCache

    turns: dict[str, Callable[[], object]] = {}
    prompt = torch.arange(128, device=device)[None]
    outputs = {}
    for name, model in decoders(width, layers, BF16, device).items():
        cache = DynamicCache()
        mask = torch.zeros(1, 128, dtype=torch.bool)  # as after any prompt, adapted or not
        with torch.no_grad(), plora_mask(mask):
            model(input_ids=prompt, past_key_values=cache, use_cache=True)

        def step(model: nn.Module = model, cache: object = cache, mask: Tensor = mask) -> Tensor:
            with torch.no_grad(), plora_mask(mask):
                for token in prompt[0, :8]:
                    ids = token.view(1, 1)
                    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
                cache.crop(-8)
                return logits

        turns[name] = step
        outputs[name] = step()
    first = next(iter(outputs.values()))
    for name, logits in outputs.items():  # B is zero in all of them
        torch.testing.assert_close(logits, first, rtol=0.02, atol=0.02, msg=name)
    base = {
        "case": f"Llama, {layers} layers of {width}",
        "shape": [1, 1, width],
        "masked": 0,
        "dropout": 0.0,
        "dtype": "bfloat16",
        "pass": "decode",
    }
    yield from _timed(turns, base, {name: {"saved_mib": None} for name in turns}, device, options)


def _timed(
    turns: dict[str, Callable[[], object]],
    base: dict[str, object],
    known: dict[str, dict[str, object]],
    device: str,
    options: argparse.Namespace,
) -> Iterator[dict[str, object]]:
    timed = measure.take_turns(
        turns,
        device=device,
        warm_up=options.warm_up,
        repeats=options.repeats,
        limit_s=options.seconds,
    )
    for name, figures in timed.items():
        if device == "cuda":
            figures["kernel_ms"] = measure.kernel_ms(turns[name])
        yield {**base, "implementation": name, **figures, **known[name]}


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.options("python -m benchmarks.plora", arguments)
    device, threads = options.device, torch.get_num_threads()
    path = options.out / f"plora-{device}.jsonl"
    kind = "quick" if options.quick else device
    many = (options.threads or sorted({1, threads})) if device == "cpu" else [threads]
    try:
        for count in many:
            torch.set_num_threads(count)
            where = measure.machine(device)
            parts = [
                (case.label, lambda c=case: layer_rows(c, device, options)) for case in CASES[kind]
            ]
            parts.append(("decode", lambda: decode_rows(*DECODERS[kind], device, options)))
            for name, rows_of in parts:
                if options.case not in name:
                    continue
                rows = []
                for row in rows_of():
                    rows.append({**row, **where})
                    print(plora_report.line(rows[-1]), flush=True)
                measure.write(rows, path)  # now, lest a run that is cut short leave nothing
    finally:
        torch.set_num_threads(threads)
    if path.exists():
        rows = measure.read(path)
        plora_report.chart(rows, path.with_suffix(".svg"))
        print(*plora_report.goals(rows), sep="\n")
    return 0


def table(rows: list[dict[str, object]]) -> str:
    """What benchmarks.readme puts into src/plora/README.md."""
    return plora_report.table(rows)


if __name__ == "__main__":
    sys.exit(main())
