"""Which losses count at which point of a run."""

from __future__ import annotations

from blspkd.model.objective import LOSS_NAMES, LossWeights, Objective

from .config import LossesSection


def weights_at(losses: LossesSection, progress: float) -> LossWeights:
    """The loss weights at a point of the run.

    Args:
        losses: weights and windows.
        progress: fraction of the optimiser steps done, in [0, 1].

    Returns:
        The weights: a loss counts from its ``start`` up to, not including, its ``stop``.
    """
    weights = {}
    for name in LOSS_NAMES:
        loss = getattr(losses, name)
        weights[name] = loss.weight if loss.start <= progress < loss.stop else 0.0
    return LossWeights(**weights)


def objective_at(losses: LossesSection, progress: float) -> Objective:
    """The objective at a point of the run; see :func:`weights_at`."""
    return Objective(
        weights_at(losses, progress),
        losses.temperature,
        losses.scale_by_temperature_squared,
        losses.layer,
        losses.layer_distance,
    )


def check_schedule(losses: LossesSection) -> None:
    """Refuse objectives that at some point of the run ask for nothing."""
    bounds = sorted(
        {0.0}
        | {getattr(losses, n).start for n in LOSS_NAMES}
        | {getattr(losses, n).stop for n in LOSS_NAMES}
    )
    for bound in bounds:
        if bound < 1.0 and not weights_at(losses, bound).active:
            raise ValueError(
                f"losses: none is active from {bound:.0%} of the run on; give one of "
                f"{', '.join(LOSS_NAMES)} a weight there"
            )
