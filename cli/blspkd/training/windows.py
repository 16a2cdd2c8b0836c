"""Stretches of a run, as fractions of its optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SHARE = 0.01
"""What a ramp begins with: at 0 a loss would not count, and there might be no other to step on."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of the run.

    Attributes:
        start: fraction of the run at which it begins.
        stop: fraction of the run before which it ends.
        ramp: fraction of the run over which what it governs rises linearly, from 1 % at ``start``;
            0 for all of it at once.
    """

    start: float = 0.0
    stop: float = 1.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        """Refuse windows that are empty or reach out of the run."""
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(f"expected 0 <= start < stop <= 1, got {self.start} and {self.stop}")
        if not 0.0 <= self.ramp <= 1.0:
            raise ValueError(f"ramp must be a fraction of the run, in [0, 1], got {self.ramp}")

    def share_at(self, progress: float) -> float:
        """How much of what it governs counts at a point of the run.

        Args:
            progress: fraction of the optimiser steps done, in [0, 1].

        Returns:
            0 outside of the window; inside 1, or less on the ramp.
        """
        if not self.start <= progress < self.stop:
            return 0.0
        if progress - self.start >= self.ramp:
            return 1.0
        return max(FIRST_SHARE, (progress - self.start) / self.ramp)


@dataclass(frozen=True)
class LossSection(Window):
    """One loss: its weight, and the stretch of the run in which it counts.

    Attributes:
        weight: factor on the loss; 0 leaves it out.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        super().__post_init__()
        if not self.weight >= 0:
            raise ValueError(f"weight must be >= 0, got {self.weight}")


@dataclass(frozen=True)
class FractionSection(Window):
    """A fraction of the clips, and the stretch of the run in which they are drawn.

    Attributes:
        fraction: in [0, 1]; it may rise on the ramp.
    """

    fraction: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        super().__post_init__()
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"fraction must lie in [0, 1], got {self.fraction}")


@dataclass(frozen=True)
class PartSection(Window):
    """The stretch of the run in which one part is trained; outside of it, it is frozen.

    The ramp is one of the part's learning rate, on top of the run's own schedule.
    """


@dataclass(frozen=True)
class TrainedSection:
    """Which part is trained when; nothing for a part that the model section leaves frozen or out.

    Attributes:
        adapter: the adapter.
        plora: PLoRA's matrices.
        encoder: the speech encoder, with ``model.train_encoder``.
    """

    adapter: PartSection = PartSection()
    plora: PartSection = PartSection()
    encoder: PartSection = PartSection()
