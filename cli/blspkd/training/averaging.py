"""The mean of the weights that a run began with and of those that it ended with.

Fine-tuned weights do better on what they were tuned on, and often worse on what is unlike it; their
mean with those before keeps most of both (WiSE-FT, arXiv 2109.01903; model soups, 2203.05482).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from blspkd.model.assembled import AssembledModel

from .config import TrainConfig


def check_averaging(config: TrainConfig) -> None:
    """Refuse to average what no process has whole.

    Raises:
        ValueError: ``optim.average_with_start`` under FSDP or DeepSpeed, whether the configuration
            asks for them or ``accelerate launch`` does.
    """
    if not config.optim.average_with_start:
        return
    for name, field in (("FSDP", "fsdp"), ("DeepSpeed", "deepspeed")):
        if config.trainer.get(field) or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ValueError(
                "optim.average_with_start needs whole weights in each process, and with "
                f"{name} they are in shards: set it to 0"
            )


def trained_weights(model: AssembledModel) -> dict[str, Tensor]:
    """A copy of all that is trained at any point of a run, by name, in the memory of the CPU."""
    parameters = model.named_parameters()
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in parameters
        if name in model.trainable
    }


@torch.no_grad()
def average_with(model: nn.Module, start: Mapping[str, Tensor], share: float) -> None:
    """Each weight w of ``start`` becomes ``(1 - share) * w + share * start``, in place.

    Args:
        model: whole in this process: its parameters have the names and shapes of ``start``.
        start: from :func:`trained_weights`.
        share: between 0 and 1.
    """
    parameters = dict(model.named_parameters())
    for name, weight in start.items():
        parameters[name].lerp_(weight.to(parameters[name]), share)
