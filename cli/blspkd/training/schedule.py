"""Which losses count, and which parts are trained, at which point of a run."""

from __future__ import annotations

from blspkd.model.objective import LOSS_NAMES, LossWeights, Objective
from blspkd.model.parts import Part

from .config import LossesSection, TrainConfig
from .windows import Window


def weights_at(losses: LossesSection, progress: float) -> LossWeights:
    """The loss weights at a point of the run.

    Args:
        losses: weights and windows.
        progress: fraction of the optimiser steps done, in [0, 1].

    Returns:
        The weights: a loss counts from its ``start`` up to, not including, its ``stop``.
    """
    sections = {name: getattr(losses, name) for name in LOSS_NAMES}
    return LossWeights(
        **{name: loss.weight * loss.share_at(progress) for name, loss in sections.items()}
    )


def objective_at(losses: LossesSection, progress: float) -> Objective:
    """The objective at a point of the run; see :func:`weights_at`."""
    return Objective(
        weights_at(losses, progress),
        losses.temperature,
        losses.scale_by_temperature_squared,
        losses.layer,
        losses.layer_distance,
    )


def parts_at(config: TrainConfig, progress: float) -> dict[Part, float]:
    """The parts that are trained at a point of the run, each with its share of its learning rate.

    Args:
        config: the run.
        progress: fraction of the optimiser steps done, in [0, 1].
    """
    model, trained = config.model, config.optim.trained
    shares: dict[Part, float] = {"adapter": trained.adapter.share_at(progress)}
    if model.plora is not None:
        shares["plora"] = trained.plora.share_at(progress)
    if model.train_encoder:
        shares["encoder"] = trained.encoder.share_at(progress)
    return {part: share for part, share in shares.items() if share > 0}


def check_schedule(config: TrainConfig) -> None:
    """Refuse runs in which at some point no loss counts, or none reaches a part that is trained."""
    losses, trained = config.losses, config.optim.trained
    windows: list[Window] = [getattr(losses, name) for name in LOSS_NAMES]
    windows += [trained.adapter, trained.plora, trained.encoder]
    for bound in sorted({0.0} | {w.start for w in windows} | {w.stop for w in windows} - {1.0}):
        weights, parts = weights_at(losses, bound), parts_at(config, bound)
        if not weights.active:
            raise ValueError(
                f"losses: none is active from {bound:.0%} of the run on; give one of "
                f"{', '.join(LOSS_NAMES)} a weight there"
            )
        if not parts:
            raise ValueError(
                f"optim.trained: no part is trained from {bound:.0%} of the run on; widen the "
                "window of one"
            )
        if set(parts) == {"plora"} and not weights.reads_language_model:
            raise ValueError(
                f"optim.trained: from {bound:.0%} of the run on only PLoRA is trained, which the "
                f"losses that count there ({', '.join(weights.active)}) do not reach; train the "
                "adapter there, or give a loss of the language model a weight"
            )
