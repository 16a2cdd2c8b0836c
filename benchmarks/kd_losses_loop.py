"""The losses as a training loop calls them on a CPU: one call after another, malloc as it is.

glibc maps every block above 32 MiB anew, and gives it back when it is freed, whatever has gone
before: that is the most to which the limit (M_MMAP_THRESHOLD) rises by itself. So logits of all
positions lie in fresh memory in every step, while what fits into smaller blocks is recycled. Here
nothing of malloc is set or trimmed, which needs a process of its own, as benchmarks.measure does
both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks import memory

Figures = dict[str, dict[str, float]]


def in_a_loop(
    make: Callable[..., dict[str, Callable[[], object]]],
    *arguments: object,
    repeats: int,
    limit_s: float,
) -> Figures:
    """Time the calls that make(*arguments) gives, in turns, in a process of its own.

    Args:
        make: a function that another process can import.
        arguments: of it.
        repeats: timed turns, after two that are not.
        limit_s: after so many seconds no further turn begins, but three are timed in any case.

    Returns:
        For each name loop_ms, the median, loop_p20_ms and loop_p80_ms, and loop_faults, the pages
        mapped per call.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        threads = torch.get_num_threads()
        return processes.submit(_turns, make, arguments, threads, repeats, limit_s).result()


def _turns(
    make: Callable[..., dict[str, Callable[[], object]]],
    arguments: tuple[object, ...],
    threads: int,
    repeats: int,
    limit_s: float,
) -> Figures:
    torch.set_num_threads(threads)
    calls = make(*arguments)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[int]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(2 + repeats):
        if turn >= 5 and time.perf_counter() - begin > limit_s:
            break
        for name, call in calls.items():
            before, start = memory.page_faults(), time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
            faults[name].append(memory.page_faults() - before)
    return {name: _figures(seconds[name][2:], faults[name][2:]) for name in calls}


def _figures(seconds: list[float], faults: list[int]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "loop_ms": statistics.median(ordered) * 1e3,
        "loop_p20_ms": ordered[round(0.2 * last)] * 1e3,
        "loop_p80_ms": ordered[round(0.8 * last)] * 1e3,
        "loop_faults": statistics.median(faults),
    }
