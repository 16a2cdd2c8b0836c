"""Work on many clips ahead of training, divided among the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist
from accelerate import PartialState

from blspkd.data.manifest import Record

PATIENCE = timedelta(days=7)
"""How long a process waits for the others' shares."""


def in_shares(
    process: PartialState, records: Sequence[Record], work: Callable[[Sequence[Record]], object]
) -> None:
    """Do ``work`` on every record once, each process on a share, and return when all have.

    The process group's own barrier gives up after 10 (NCCL) or 30 (gloo) minutes, and encoding a
    corpus takes longer; this waits in a group of its own. Nodes that have no disk in common make
    what the other nodes' shares would have left them, in a second round.

    Args:
        process: this process among the run's.
        records: the same in every process.
        work: leaves a file for each of the records that it is given, unless it is there.
    """
    if process.num_processes == 1:
        work(records)
        return
    # made before the work, while no process is far behind another
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        work(records[process.process_index :: process.num_processes])
        dist.barrier(group)
        work(records[process.local_process_index % neighbours :: neighbours])
        dist.barrier(group)
    finally:
        dist.destroy_process_group(group)
