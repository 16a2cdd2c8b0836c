"""Chosen rows of a matrix: indices, and runs of neighbours where the rows are few runs.

Speech is one run of positions in a sequence. Rows that lie one after the other are read through a
view and added to by one call, without indices.

Letters of shapes: P rows of the matrix, R chosen rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A run costs a call of its own, so that many short ones are dearer than indices.
MOST_RUNS = 16
LEAST_ROWS_PER_RUN = 8


@dataclass(frozen=True)
class Rows:
    """Distinct rows of a matrix, ascending.

    Attributes:
        index: (R,) int64.
        runs: The same rows as half-open ``(start, stop)``, if they are few runs and that is known
            without asking a GPU; else None.
    """

    index: Tensor
    runs: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, index: Tensor, device: torch.device | None = None) -> Rows:
        """Rows for use on `device`; runs are looked for where `index` lies on the CPU.

        Args:
            index: (R,) int64, ascending, distinct.
            device: Where the rows are wanted; by default where `index` is.
        """
        runs = find_runs(index) if index.device.type == "cpu" else None
        return cls(index if device is None else index.to(device, non_blocking=True), runs)

    def __len__(self) -> int:
        return self.index.shape[0]

    def to(self, device: torch.device) -> Rows:
        """The same rows on `device`, itself if they are there."""
        if self.index.device == device:
            return self
        return Rows(self.index.to(device, non_blocking=True), self.runs)

    def take(self, matrix: Tensor) -> Tensor:
        """The rows of `matrix`, (P, ...) -> (R, ...): a view if they are one run, else a copy."""
        if self.runs is None:
            return matrix.index_select(0, self.index)
        if len(self.runs) == 1:
            start, stop = self.runs[0]
            return matrix.narrow(0, start, stop - start)
        return torch.cat([matrix[start:stop] for start, stop in self.runs])


def find_runs(index: Tensor) -> tuple[tuple[int, int], ...] | None:
    """The runs of neighbours in `index`, or None where there is no row or there are many runs.

    Args:
        index: (R,) int64 on the CPU, ascending, distinct.

    >>> find_runs(torch.tensor([2, 3, 4]))
    ((2, 5),)
    >>> find_runs(torch.tensor([2, 3, 4])[:0]) is None
    True
    """
    count = index.shape[0]
    if count == 0:
        return None
    # both ends by one call
    ends = index[:: max(1, count - 1)].tolist()
    first, last = ends[0], ends[-1]
    if last - first == count - 1:
        return ((first, last + 1),)
    (breaks,) = torch.where(index.diff() != 1)
    most = min(MOST_RUNS, count // LEAST_ROWS_PER_RUN)
    if breaks.shape[0] >= most:
        return None
    edges = [0, *(breaks + 1).tolist(), count]
    starts, lasts = index[edges[:-1]].tolist(), index[[edge - 1 for edge in edges[1:]]].tolist()
    return tuple((start, stop + 1) for start, stop in zip(starts, lasts, strict=True))
