"""How every benchmark measures, and what a row of its results holds.

The implementations of a case take turns, so that whatever else the machine does meets them all
alike; medians and quantiles are over those turns. One row of results/NAME.jsonl is one
implementation of one case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def options(program: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed turns of each")
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
    implementations: dict[str, Callable[[], object]], *, device: str, warm_up: int, repeats: int
) -> dict[str, dict[str, object]]:
    """Time the implementations in turns; the first is what the others are compared with.

    Returns:
        For each name: median, p20 and p80 in ms, its median over that of the first (below 1 is
        faster), and the peak of memory above what the inputs hold (MiB; None on a CPU).
    """
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    peaks: dict[str, float | None] = dict.fromkeys(implementations)
    for turn in range(warm_up + repeats):
        for name, call in implementations.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    first = statistics.median(next(iter(seconds.values())))
    rows: dict[str, dict[str, object]] = {}
    for name, times in seconds.items():
        ordered = sorted(times)
        median, last = statistics.median(times), len(times) - 1
        rows[name] = {
            "median_ms": median * 1e3,
            "p20_ms": ordered[round(0.2 * last)] * 1e3,
            "p80_ms": ordered[round(0.8 * last)] * 1e3,
            "over_first": median / first,
            "peak_mib": peaks[name],
            "warm_up": warm_up,
            "repeats": repeats,
        }
    return rows


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Append rows to a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
