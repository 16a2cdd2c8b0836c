"""Masks for `plora_mask`, made from what says where the other modality is.

Letters of shapes: B sequences, L positions, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Span = Sequence[int]


def mask_from_ids(input_ids: Tensor, ids: int | Sequence[int] | Tensor) -> Tensor:
    """True where a token is one of `ids`: the placeholders that embeddings will be put in place of.

    Equals: ``torch.isin(input_ids, ids)``

    Args:
        input_ids: (B, L), integers.
        ids: One token id or several.

    Returns:
        (B, L) bool, on the device of `input_ids`.

    Raises:
        ValueError: `input_ids` has not two dimensions.
    """
    _check_two("input_ids", input_ids)
    wanted = torch.as_tensor(ids, dtype=input_ids.dtype, device=input_ids.device)
    return torch.isin(input_ids, wanted)


def mask_from_spans(
    spans: Tensor | Sequence[Span] | Sequence[Sequence[Span]],
    *,
    length: int,
    batch: int | None = None,
) -> Tensor:
    """True inside the spans, each from its start up to, and without, its end.

    Args:
        spans: Either (sequence, start, end) for each span, as a list or as an (n, 3) integer
            tensor; or for each sequence the list of its (start, end). Spans may overlap and be
            empty.
        length: L, positions of a sequence, padding included.
        batch: B, number of sequences; needed with (sequence, start, end).

    Returns:
        (B, L) bool, on the CPU, where `plora_mask` reads it without waiting for a device.

    Raises:
        ValueError: `batch` is missing or another than the number of lists, or a span does not lie
            inside.
    """
    listed: list[Any] = spans.tolist() if isinstance(spans, Tensor) else list(spans)
    if all(len(one) == 3 and isinstance(one[0], int) for one in listed):
        if batch is None:
            raise ValueError("batch: expected their number beside spans of (sequence, start, end)")
        triples = [(row, start, end) for row, start, end in listed]
    else:
        if batch not in (None, len(listed)):
            raise ValueError(f"batch: expected {len(listed)}, the lists in spans, got {batch}")
        batch = len(listed)
        triples = [(row, *_pair(span)) for row, found in enumerate(listed) for span in found]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, start, end in triples:
        if not (0 <= row < batch and 0 <= start <= end <= length):
            raise ValueError(
                f"spans: expected 0 <= start <= end <= {length} in one of {batch} sequences, got "
                f"({start}, {end}) in sequence {row}"
            )
        mask[row, start:end] = True
    return mask


def mask_from_embeddings(inputs_embeds: Tensor, placeholder: Tensor) -> Tensor:
    """True where an embedding equals `placeholder` in all features.

    For models that are called with embeddings only: those of a prompt in which a placeholder token
    stands wherever speech or an image will be put. Ask before it is put there.

    Equals: ``(inputs_embeds == placeholder).all(-1)``

    Args:
        inputs_embeds: (B, L, D).
        placeholder: (D,), the embedding of the placeholder token.

    Returns:
        (B, L) bool, on the device of `inputs_embeds`.

    Raises:
        ValueError: The shapes do not fit.
    """
    if inputs_embeds.ndim != 3 or placeholder.shape != inputs_embeds.shape[-1:]:
        raise ValueError(
            "inputs_embeds: expected (batch, positions, D) and a placeholder of (D,), got "
            f"{tuple(inputs_embeds.shape)} and {tuple(placeholder.shape)}"
        )
    equal: Tensor = inputs_embeds == placeholder.to(inputs_embeds)
    return equal.all(-1)


def _pair(span: object) -> tuple[int, int]:
    if not isinstance(span, Sequence) or len(span) != 2:
        raise ValueError(f"spans: expected (start, end) in the list of a sequence, got {span!r}")
    start, end = span
    return start, end


def _check_two(name: str, value: Tensor) -> None:
    if value.ndim != 2:
        raise ValueError(
            f"{name}: expected shape (batch, positions), got {tuple(value.shape)}; a single "
            f"sequence needs {name}[None]"
        )
