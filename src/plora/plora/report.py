"""Which layers got A and B but do not use them, and why: found out by the passes themselves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from plora.layer import PLoRALinear

NOT_CALLED = "the model did not call it in its first masked pass; it may read its weight instead"


def settle(decoder: nn.Module, watched: Mapping[int, Sequence[str | None]]) -> None:
    """Mark the layers that the first masked pass did not adapt, for good where no call of one fits.

    A layer that was not called is adapted should a later pass call it, as layers that are dropped
    at random are.

    Args:
        decoder: Whose pass it was.
        watched: ``Activation.watched`` of that pass.

    Raises:
        ValueError: No adapted layer saw the positions of the pass, so that the mask had no effect.
            They are marked, but nothing is settled: the next pass may fit.
    """
    layers = _layers(decoder)
    for layer in layers.values():
        calls = watched.get(id(layer), (NOT_CALLED,))
        layer.left_out = next((reason for reason in calls if reason), None)
    if not any(None in calls for calls in watched.values()):
        path, layer = next(iter(layers.items()))
        raise ValueError(
            f"{type(decoder).__name__}: none of its {len(layers)} adapted layers sees the "
            f"positions of the decoder pass, so the mask has no effect; {path!r}: {layer.left_out}"
        )
    for layer in layers.values():
        calls = watched.get(id(layer), ())
        layer.stays_plain = bool(calls) and None not in calls
        layer.settled = True


def tell(decoder: nn.Module) -> None:
    """Warn of the layers that the first pass left out."""
    layers = _layers(decoder)
    reasons = {path: layer.left_out for path, layer in layers.items() if layer.left_out}
    if reasons:
        path, reason = next(iter(reasons.items()))
        warnings.warn(
            f"plora: {len(reasons)} of {len(layers)} layers are not adapted, such as {path!r}: "
            f"{reason}. plora.unadapted_layers(model) lists them; exclude_modules spares their A "
            "and B",
            stacklevel=2,
        )


def is_compiling() -> bool:
    """Whether torch.compile is tracing this pass; what comes and goes would make it do so again."""
    return torch.compiler.is_compiling()


def _layers(decoder: nn.Module) -> dict[str, PLoRALinear]:
    return {
        path: module for path, module in decoder.named_modules() if isinstance(module, PLoRALinear)
    }
