"""The heap of this process: fresh or recycled memory, and the peak of what a call holds.

With glibc, a tensor that does not fit into a hole of the heap is mapped anew, and each of its pages
costs a fault when first touched: 61 MB take five times as long as in memory that is in use. Whether
there is a hole depends on what else has run in the process. So both ends are measured: `fresh`
leaves no free memory, `recycled` lets a second call find all that the first has freed.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch

# of <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
CLEAR_REFS = Path("/proc/self/clear_refs")
LIBC = ctypes.CDLL(None)
HAS_GLIBC = hasattr(LIBC, "mallopt") and hasattr(LIBC, "malloc_trim")


def fresh() -> None:
    """Give all free memory back, and let malloc do as it does by default once it has settled."""
    if HAS_GLIBC:
        LIBC.mallopt(M_MMAP_MAX, 65536)
        LIBC.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        LIBC.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        LIBC.malloc_trim(0)


def recycled() -> None:
    """From now on keep what is freed, whatever its size, as other allocators do."""
    if HAS_GLIBC:
        LIBC.mallopt(M_MMAP_MAX, 0)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def page_faults() -> int:
    """How often the process has touched a page that was not there, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """The peak of memory during a call above what was held before it, in MiB.

    The result counts. On CUDA the allocator knows (torch.cuda.max_memory_allocated). On a CPU it is
    resident memory: free heap is given back, Linux forgets the process's peak, the call runs, and
    the new peak (VmHWM) is read. So pages count that were touched, whoever mapped them. None where
    there is no glibc or no Linux.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - held) / 2**20
    if not (HAS_GLIBC and CLEAR_REFS.exists()):
        return None
    fresh()
    CLEAR_REFS.write_text("5")
    held_kib = _peak_kib()
    call()
    return (_peak_kib() - held_kib) / 1024


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
