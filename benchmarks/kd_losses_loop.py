"""The losses as a training loop calls them on a CPU: one call after another, malloc as it is.

glibc maps every block above 32 MiB anew, and gives it back when it is freed, whatever has gone
before: that is the most to which the limit (M_MMAP_THRESHOLD) rises by itself. So logits of all
positions lie in fresh memory in every step, while what fits into smaller blocks is recycled. Here
nothing of malloc is set or trimmed, and no implementation finds the holes that another has left:
each has a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

import torch

from benchmarks import memory

Figures = dict[str, dict[str, float]]
# In a child: the call that it makes, again and again.
_calls: list[Callable[[], object]] = []


def in_a_loop(
    make: Callable[..., Callable[[], object]],
    names: Iterable[str],
    *arguments: object,
    repeats: int,
    limit_s: float,
) -> Figures:
    """Time the calls make(name, *arguments) in turns, each in a process of its own.

    Args:
        make: a function that another process can import.
        names: of the implementations.
        arguments: what else make takes.
        repeats: timed turns, after two that are not.
        limit_s: after so many seconds no further turn begins, but three are timed in any case.

    Returns:
        For each name loop_ms, the median, loop_p20_ms and loop_p80_ms, and loop_faults, the pages
        mapped per call.
    """
    # forked from a process that has imported torch and done nothing else
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in seconds}
    with ExitStack() as stack:
        loops = {}
        for name in seconds:
            options = (torch.get_num_threads(), make, name, *arguments)
            loops[name] = stack.enter_context(
                ProcessPoolExecutor(1, context, initializer=_prepare, initargs=options)
            )
        begin = time.perf_counter()
        for turn in range(2 + repeats):
            if turn >= 5 and time.perf_counter() - begin > limit_s:
                break
            for name, loop in loops.items():
                passed, mapped = loop.submit(_timed).result()
                seconds[name].append(passed)
                faults[name].append(mapped)
    return {name: _figures(seconds[name][2:], faults[name][2:]) for name in seconds}


def _prepare(threads: int, make: Callable[..., Callable[[], object]], *arguments: object) -> None:
    torch.set_num_threads(threads)
    _calls.append(make(*arguments))


def _timed() -> tuple[float, int]:
    """The seconds of one more call, and the pages mapped in it."""
    before, start = memory.page_faults(), time.perf_counter()
    _calls[0]()
    return time.perf_counter() - start, memory.page_faults() - before


def _figures(seconds: list[float], faults: list[int]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "loop_ms": statistics.median(ordered) * 1e3,
        "loop_p20_ms": ordered[round(0.2 * last)] * 1e3,
        "loop_p80_ms": ordered[round(0.8 * last)] * 1e3,
        "loop_faults": statistics.median(faults),
    }
