"""How near the model's reading of speech is to its reading of the transcript.

The meters run the training pass on held-out clips, with the transcript's length given, and count
what the free-running length would have been. Shapes: n positions, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blspkd.model.modeling import BlspKDForConditionalGeneration, BlspKDOutput
from kd_losses import kl_div_with_logits, response_mask
from speech_adapters import AdapterOutput

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


@dataclass
class ClipMeters:
    """The meters clip by clip: what :class:`Meters` are the means of.

    Attributes:
        clips: how many there are so far.
        parts: by meter, a sum and a count for each clip; a count of 0 where the clip does not
            give the figure (such as `response_kl` without a response).
    """

    clips: int = 0
    parts: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, clip: Tensor, batch_size: int) -> None:
        """Add values (n,) of one batch, each with the index (n,) of its clip in the batch."""
        ones = torch.ones_like(values, dtype=torch.float64)
        sums = torch.zeros(batch_size, dtype=torch.float64, device=values.device)
        counts = sums.index_add(0, clip, ones)
        sums = sums.index_add(0, clip, values.double())
        pairs = zip(sums.tolist(), counts.tolist(), strict=True)
        each = self.parts.setdefault(name, [])
        each.extend((total, int(count)) for total, count in pairs)

    def means(self) -> Meters:
        """Over all clips, each item weighing the same."""
        names = (name for name in Meters.__dataclass_fields__ if name != "clips")
        return Meters(clips=self.clips, **{name: self.mean(name) for name in names})

    def mean(self, name: str) -> float | None:
        """One meter over all clips; None if no clip gives it."""
        pairs = self.parts.get(name, [])
        count = sum(number for _, number in pairs)
        return sum(total for total, _ in pairs) / count if count else None


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
    return measure_clips(model, batches, device=device).means()


@torch.no_grad()
def measure_clips(
    model: BlspKDForConditionalGeneration,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device | str = "cpu",
) -> ClipMeters:
    """Run the model over held-out batches, and keep each clip's figures; see :func:`measure`."""
    was_training = model.training
    model.eval()
    found = ClipMeters()
    try:
        for batch in batches:
            on_device = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            _encode(model, on_device)
            output = model(**on_device)
            _add_passes(found, model, output)
            if output.adapter.alpha_sum is not None:
                _add_tokens(found, model, output, on_device)
            found.clips += len(on_device["input_ids"])
    finally:
        model.train(was_training)
    return found


def _encode(model: BlspKDForConditionalGeneration, batch: dict[str, Any]) -> None:
    """Put the encoder's outputs in place of its inputs, which are looked at twice."""
    if "input_features" in batch:
        encoded = model.encode(batch.pop("input_features"), batch.pop("feature_attention_mask"))
        batch["encoder_hidden_states"], batch["encoder_attention_mask"] = encoded


def _free_lengths(
    model: BlspKDForConditionalGeneration, adapter: AdapterOutput, batch: Mapping[str, Tensor]
) -> Tensor:
    """How many tokens the adapter makes when nobody tells it, (B,)."""
    if model.config.finds_lengths:
        adapter = model.embed_speech(
            encoder_hidden_states=batch["encoder_hidden_states"],
            encoder_attention_mask=batch["encoder_attention_mask"],
        )
        return adapter.attention_mask.sum(dim=1)
    assert adapter.alpha_sum is not None
    return adapter.alpha_sum.round().clamp(min=1)


def _add_passes(
    found: ClipMeters, model: BlspKDForConditionalGeneration, output: BlspKDOutput
) -> None:
    student, teacher = output.student, output.teacher
    assert student is not None
    assert teacher is not None
    pairs = {"response": (response_mask(student.labels), response_mask(teacher.labels))}
    if output.adapter.alpha_sum is not None:  # one speech token per text token
        pairs["input"] = (student.speech_mask, teacher.speech_mask)
    for name, (student_mask, teacher_mask) in pairs.items():
        rows = student.hidden_states[student_mask], teacher.hidden_states[teacher_mask]
        clip = student_mask.nonzero()[:, 0]
        divergences, hits = [], []
        for from_speech, from_text in zip(*(r.split(CHUNK) for r in rows), strict=True):
            p, q = _logits(model, from_text), _logits(model, from_speech)
            divergences.append(kl_div_with_logits(q, p, reduction="none"))
            hits.append(p.argmax(-1) == q.argmax(-1))
        found.add(f"{name}_kl", torch.cat(divergences), clip, len(student_mask))
        found.add(f"{name}_top1", torch.cat(hits), clip, len(student_mask))


def _add_tokens(
    found: ClipMeters,
    model: BlspKDForConditionalGeneration,
    output: BlspKDOutput,
    batch: Mapping[str, Tensor],
) -> None:
    speech_mask = batch["speech_mask"].bool()
    size = len(speech_mask)
    nearest = nearest_tokens(model, output.speech_vectors[output.adapter.attention_mask])
    right = nearest == batch["input_ids"][speech_mask]
    found.add("token_accuracy", right, speech_mask.nonzero()[:, 0], size)
    off = _free_lengths(model, output.adapter, batch) - speech_mask.sum(dim=1)
    each = torch.arange(size, device=off.device)
    found.add("length_exact", off == 0, each, size)
    found.add("length_within_one", off.abs() <= 1, each, size)
    found.add("length_error", off, each, size)


def nearest_tokens(model: BlspKDForConditionalGeneration, vectors: Tensor) -> Tensor:
    """The token whose key is nearest by cosine. vectors (n, H + W) to (n,) int64."""
    keys = model.token_keys().float()
    parts = [(part.float() @ keys.T).argmax(dim=-1) for part in vectors.split(CHUNK)]
    return torch.cat(parts) if parts else vectors.new_zeros(0, dtype=torch.long)


def _logits(model: BlspKDForConditionalGeneration, hidden: Tensor) -> Tensor:
    weight = model.head_weight()
    return F.linear(hidden.to(weight.dtype), weight).float()
