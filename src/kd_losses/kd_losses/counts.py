"""How many items a loss averages over, in all processes together.

Letters: B batch, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def global_num_items(mask: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Count the selected positions of all processes, for ``num_items``.

    Each loss has a mask of its own, so each needs a count of its own. Under gradient accumulation,
    add up the counts of the step's micro-batches: before the first backward, for every micro-batch
    is divided by the whole.

    DistributedDataParallel and FSDP average the processes' gradients, while losses that are divided
    by the global count are to be added up: multiply the loss by the number of processes. The
    Trainer of transformers does so in its own ``compute_loss``, not in one that overrides it.

    Args:
        mask: boolean, of any shape, the positions that count here.
        group: of processes; None: all. Without torch.distributed, this process alone.

    Returns:
        An int64 scalar on mask's device, the same in each process.

    Raises:
        TypeError: the mask isn't boolean.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a boolean tensor, got {mask.dtype}; pass mask.bool()")
    count = mask.sum()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count, group=group)
    return count
