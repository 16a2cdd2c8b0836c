"""What training did to the language model's reading of text; nothing, unless LoRA acts there too.

Shapes: B batch, S text length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blspkd.model.modeling import BlspKDForConditionalGeneration
from kd_losses import kl_div_with_logits, response_mask

from .meters import CHUNK, ClipMeters

DRIFT_KL, ANSWERS_CHANGED = "text_drift_kl", "text_answers_changed"


@torch.no_grad()
def measure_drift(
    model: BlspKDForConditionalGeneration,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device | str = "cpu",
) -> ClipMeters:
    """KL in nats from the untouched language model to the trained one, both reading text.

    After each token of the transcript and at each token of the recorded response, temperature 1.

    Args:
        model: it is put into eval mode, and back.
        batches: keyword arguments of ``forward``.
        device: where the model is.

    Returns:
        One meter, `text_drift_kl`.
    """
    was_training = model.training
    model.eval()
    found = ClipMeters()
    weight = model.head_weight()
    try:
        for batch in batches:
            on_device = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            trained = model(**on_device).teacher
            with model.untouched():
                before = model(**on_device).teacher
            assert trained is not None
            assert before is not None
            mask = trained.speech_mask | response_mask(trained.labels)
            rows = before.hidden_states[mask], trained.hidden_states[mask]
            divergences = [
                kl_div_with_logits(
                    F.linear(now.to(weight.dtype), weight).float(),
                    F.linear(once.to(weight.dtype), weight).float(),
                    reduction="none",
                )
                for once, now in zip(*(r.split(CHUNK) for r in rows), strict=True)
            ]
            found.add(DRIFT_KL, torch.cat(divergences), mask.nonzero()[:, 0], len(mask))
            found.clips += len(mask)
    finally:
        model.train(was_training)
    return found


def answers_changed(trained: Sequence[str], untouched: Sequence[str]) -> float:
    """Share of answers to text that are no longer the untouched language model's."""
    pairs = zip(trained, untouched, strict=True)
    return sum(now != once for now, once in pairs) / max(1, len(trained))
