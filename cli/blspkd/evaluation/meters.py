"""How near the model's reading of speech is to its reading of the transcript.

The meters run the training pass on held-out clips, with the transcript's length given, and count
what the free-running length would have been. Shapes: n positions, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blspkd.model.modeling import BlspKDForConditionalGeneration, BlspKDOutput
from kd_losses import kl_div_with_logits, response_mask

CHUNK = 256


@dataclass(frozen=True)
class Meters:
    """Means over a set of clips; None where the set or the adapter does not give the figure.

    Attributes:
        clips: how many clips.
        input_kl: nats, teacher to student, after each token of the utterance, temperature 1.
        input_top1: fraction of those positions at which both find the same next token likeliest.
        response_kl: nats, over each token of the recorded response.
        response_top1: likewise for the response.
        token_accuracy: fraction of speech tokens whose nearest text embedding (by cosine) is the
            transcript's token at that place.
        length_exact: fraction of clips whose free-running length is the number of text tokens.
        length_within_one: fraction that are at most one off.
        length_error: mean of (free-running length - text tokens).
    """

    clips: int
    input_kl: float | None
    input_top1: float | None
    response_kl: float | None
    response_top1: float | None
    token_accuracy: float | None
    length_exact: float | None
    length_within_one: float | None
    length_error: float | None

    def figures(self) -> dict[str, float]:
        """The figures that there are, by name."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: float(value) for name, value in named.items() if value is not None}


class _Mean:
    """A running mean of tensors' elements."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@torch.no_grad()
def measure(
    model: BlspKDForConditionalGeneration,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device | str = "cpu",
) -> Meters:
    """Run the model over held-out batches.

    Args:
        model: it is put into eval mode, and back.
        batches: keyword arguments of ``forward``; see :class:`blspkd.data.batches.Collator`.
        device: where the model is.
    """
    was_training = model.training
    model.eval()
    means = {name: _Mean() for name in Meters.__dataclass_fields__}
    clips = 0
    try:
        for batch in batches:
            on_device = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            output = model(**on_device)
            clips += len(on_device["input_ids"])
            _add_passes(means, model, output)
            if output.adapter.alpha_sum is not None:
                _add_tokens(means, model, output, on_device)
    finally:
        model.train(was_training)
    figures = {name: mean.value for name, mean in means.items() if name != "clips"}
    return Meters(clips=clips, **figures)


def _add_passes(
    means: Mapping[str, _Mean], model: BlspKDForConditionalGeneration, output: BlspKDOutput
) -> None:
    student, teacher = output.student, output.teacher
    assert student is not None
    assert teacher is not None
    pairs = {"response": (response_mask(student.labels), response_mask(teacher.labels))}
    if output.adapter.alpha_sum is not None:  # one speech token per text token
        pairs["input"] = (student.speech_mask, teacher.speech_mask)
    for name, (student_mask, teacher_mask) in pairs.items():
        rows = student.hidden_states[student_mask], teacher.hidden_states[teacher_mask]
        for from_speech, from_text in zip(*(r.split(CHUNK) for r in rows), strict=True):
            p, q = _logits(model, from_text), _logits(model, from_speech)
            means[f"{name}_kl"].add(kl_div_with_logits(q, p, reduction="none"))
            means[f"{name}_top1"].add(p.argmax(-1) == q.argmax(-1))


def _add_tokens(
    means: Mapping[str, _Mean],
    model: BlspKDForConditionalGeneration,
    output: BlspKDOutput,
    batch: Mapping[str, Tensor],
) -> None:
    assert output.adapter.alpha_sum is not None
    speech_mask = batch["speech_mask"].bool()
    nearest = nearest_tokens(model, output.speech_vectors[output.adapter.attention_mask])
    means["token_accuracy"].add(nearest == batch["input_ids"][speech_mask])
    predicted = output.adapter.alpha_sum.round().clamp(min=1)
    off = predicted - speech_mask.sum(dim=1)
    means["length_exact"].add(off == 0)
    means["length_within_one"].add(off.abs() <= 1)
    means["length_error"].add(off)


def nearest_tokens(model: BlspKDForConditionalGeneration, vectors: Tensor) -> Tensor:
    """The token whose input embedding is nearest by cosine. vectors (n, H) to (n,) int64."""
    keys = F.normalize(model.embedding_weight().float(), dim=-1)
    parts = [(part.float() @ keys.T).argmax(dim=-1) for part in vectors.split(CHUNK)]
    return torch.cat(parts) if parts else vectors.new_zeros(0, dtype=torch.long)


def _logits(model: BlspKDForConditionalGeneration, hidden: Tensor) -> Tensor:
    weight = model.head_weight()
    return F.linear(hidden.to(weight.dtype), weight).float()
