"""Sizes of the integration kernels' tiles: a table, so that the first call costs no search.

`python -m benchmarks.cif_tune` measures the alternatives on a GPU. What stands here has not been
tuned on one yet: tiles of 4 KiB a warp group, rows of a frame read in whole cache lines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One program's share of the work.

    Attributes:
        frames: frames it reads at a time.
        columns: columns of D it reads at a time, a power of two; small widths take fewer.
        warps: groups of 32 threads that share it.
    """

    frames: int
    columns: int
    warps: int

    def arguments(self, width: int) -> dict[str, int]:
        """Return the kernel's arguments for frames of `width` columns."""
        columns = min(1 << (width - 1).bit_length(), self.columns)
        return {
            "BLOCK_FRAMES": self.frames,
            "BLOCK_WIDTH": columns,
            "num_warps": self.warps if columns >= 256 else min(self.warps, 2),
        }


# by the bytes of one element of the frames
FORWARD = {2: Tile(8, 512, 4), 4: Tile(8, 256, 4), 8: Tile(8, 128, 4)}
BACKWARD = {2: Tile(8, 512, 4), 4: Tile(8, 256, 4), 8: Tile(8, 128, 4)}


def forward_tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of the forward kernel for frames of this width and dtype."""
    return FORWARD[dtype.itemsize].arguments(width)


def backward_tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of the backward kernel for frames of this width and dtype."""
    return BACKWARD[dtype.itemsize].arguments(width)
