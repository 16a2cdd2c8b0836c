"""The mean of the weights that a run began with and of those that it ended with.

Fine-tuned weights do better on what they were tuned on, and often worse on what is unlike it; their
mean with those before keeps most of both (WiSE-FT, arXiv 2109.01903; model soups, 2203.05482).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blspkd.model.assembled import AssembledModel


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
