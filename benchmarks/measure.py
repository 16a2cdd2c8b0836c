"""How every benchmark measures, and what a row of its results holds.

The implementations of a case take turns, so that whatever else the machine does meets them all
alike; medians and quantiles are over those turns. One row of results/NAME.jsonl is one
implementation of one case; measuring it again replaces the row.

On a CPU every call is timed twice: in memory that the same call has just freed, which is what
median_ms says and what a copy's bandwidth can be compared with, and in fresh memory (fresh_ms);
see memory.py, which also finds the peak of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory

Row = dict[str, Any]
# What was measured; rows that agree in it are replaced together.
IDENTITY = ("case", "implementation", "shape", "dtype", "device", "threads")


def options(program: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed turns of each")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="of torch on a CPU, one run for each"
    )
    parser.add_argument("--seconds", type=float, default=30, help="no new turn after so many")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="toy shapes: does it run at all?")
    return parser.parse_args(arguments)


def machine(device: str) -> dict[str, object]:
    """Where and on which code a row was measured."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src", "cli")),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _git(*command: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def take_turns(
    implementations: dict[str, Callable[[], object]],
    *,
    device: str,
    warm_up: int,
    repeats: int,
    limit_s: float = math.inf,
) -> dict[str, dict[str, object]]:
    """Time the implementations in turns; the first is what the others are compared with.

    After `limit_s` seconds no further turn begins, but three are timed in any case, and warming up
    takes at most a third of that time or one turn.

    Returns:
        For each name: median, p20 and p80 in ms, its median over that of the first (below 1 is
        faster), by how much its p20 is above that of the first (what else the machine does disturbs
        that least), on a CPU the median in fresh memory, and the peak of memory above what was held
        before the call (MiB), which one more call measures after the timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    fresh: dict[str, list[float]] = {name: [] for name in implementations}
    begin = time.perf_counter()
    warmed, timed = 0, 0
    while timed < repeats:
        spent = time.perf_counter() - begin
        if timed >= 3 and spent > limit_s:
            break
        warm = warmed >= warm_up or (warmed > 0 and spent > limit_s / 3)
        for name, call in implementations.items():
            if device == "cpu" and warm and memory.HAS_GLIBC:
                both = _in_both_states(call)
                fresh[name].append(both[0])
                seconds[name].append(both[1])
            elif warm:
                seconds[name].append(_seconds(call, device))
            else:
                call()
        warmed, timed = (warmed, timed + 1) if warm else (warmed + 1, timed)
    firsts = sorted(next(iter(seconds.values())))
    first = statistics.median(firsts)
    rows: dict[str, dict[str, object]] = {}
    for name, times in seconds.items():
        ordered = sorted(times)
        median, last = statistics.median(times), len(times) - 1
        rows[name] = {
            "median_ms": median * 1e3,
            "p20_ms": ordered[round(0.2 * last)] * 1e3,
            "p80_ms": ordered[round(0.8 * last)] * 1e3,
            "over_first": median / first,
            "extra_ms": (ordered[round(0.2 * last)] - firsts[round(0.2 * last)]) * 1e3,
            "fresh_ms": statistics.median(fresh[name]) * 1e3 if fresh[name] else None,
            "peak_mib": memory.peak_mib(implementations[name], device),
            "warm_up": warmed,
            "repeats": timed,
        }
    return rows


def _seconds(call: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _in_both_states(call: Callable[[], object]) -> tuple[float, float]:
    """The seconds of a call in fresh memory, and of one in recycled memory."""
    memory.fresh()
    start = memory.page_faults()
    fresh = _seconds(call, "cpu")
    few = 64 + (memory.page_faults() - start) // 16
    memory.recycled()
    call()
    # A block that was freed is sometimes found too small for its successor, which must be aligned.
    for _ in range(6):
        start = memory.page_faults()
        recycled = _seconds(call, "cpu")
        if memory.page_faults() - start <= few:
            break
    return fresh, recycled


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kernel_ms(call: Callable[[], object], calls: int = 5) -> float:
    """The time for which one call keeps the GPU busy: the sum of its kernels, in ms.

    The rest of a call's wall time is spent on launching them.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    return sum(event.self_device_time_total for event in kernels) / calls / 1e3


def copy_gb_s(device: str, mib: int = 256) -> float:
    """The bytes that a copy reads and writes each second, in GB/s, with memory that is in use.

    The copy is larger than the caches; on a CPU it runs on as many threads as torch uses.
    """
    source = torch.ones(mib * 2**18, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(12):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e9


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Put rows into a jsonl file, in the place of those that measured the same before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = read(path) if path.exists() else []
    new = {_identity(row) for row in rows}
    kept = [row for row in old if _identity(row) not in new]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *rows]), "utf-8")
    partial.replace(path)


def read(path: Path) -> list[dict[str, object]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def select(rows: list[Row], **wanted: object) -> list[Row]:
    """The rows that were measured and have these values."""
    return [
        row
        for row in rows
        if "skipped" not in row and all(row[key] == value for key, value in wanted.items())
    ]


def _identity(row: dict[str, object]) -> str:
    return json.dumps([row.get(key) for key in IDENTITY])
