"""Puts speech embeddings in the place that the text keeps for them.

Shapes: B batch, L text length, N speech tokens, S spliced length, H embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Spliced:
    """A batch of text with speech in it.

    Attributes:
        inputs_embeds: (B, S, H), zero on padding.
        attention_mask: (B, S) bool.
        speech_mask: (B, S) bool, True on speech positions.
        labels: (B, S) int64 or None, -100 on speech and padding.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    speech_mask: Tensor
    labels: Tensor | None

    def after(self, length: int) -> Spliced:
        """The batch without its first ``length`` positions."""
        return Spliced(
            self.inputs_embeds[:, length:],
            self.attention_mask[:, length:],
            self.speech_mask[:, length:],
            None if self.labels is None else self.labels[:, length:],
        )


def splice(
    text_embeds: Tensor,
    attention_mask: Tensor,
    speech_mask: Tensor,
    speech_embeds: Tensor,
    speech_attention_mask: Tensor,
    *,
    labels: Tensor | None = None,
    length: int | None = None,
    padding_side: Literal["left", "right"] = "right",
) -> Spliced:
    """Replace each row's masked positions, however many, by its speech embeddings.

    Padding within the text is squeezed out: a row is its real text with the speech in it, padded on
    one side.

    Args:
        text_embeds: (B, L, H).
        attention_mask: (B, L) bool, True on real text, the speech's place included.
        speech_mask: (B, L) bool, True on the positions that speech replaces: one run per row.
        speech_embeds: (B, N, H), cast to the dtype of ``text_embeds``.
        speech_attention_mask: (B, N) bool, True on the first n_b positions of row b.
        labels: (B, L) int64, -100 where there is nothing to predict; moved along with the text.
        length: S, if it is known; spares the device a synchronisation, and with it the check that
            each row has one run.
        padding_side: where the shorter rows are padded.

    Raises:
        ValueError: a row of ``speech_mask`` has no run, or several.
    """
    batch, text_length = attention_mask.shape
    speech_length = speech_embeds.shape[1]
    keep = attention_mask & ~speech_mask
    first = speech_mask & (speech_mask.long().cumsum(dim=1) == 1)
    width = keep.long() + first.long() * speech_attention_mask.sum(dim=1, keepdim=True)
    end = width.cumsum(dim=1)
    start = end - width
    total = end[:, -1:]
    spliced_length = length if length is not None else _checked_length(total, speech_mask)
    if padding_side == "left":
        start = start + (spliced_length - total)

    # source[b]: the text, the speech, one row of zeros. Positions that nothing moves to get the
    # zeros; what must not move is sent to an extra column that is cut off again.
    nothing = text_length + speech_length
    index = torch.full((batch, spliced_length + 1), nothing, device=start.device)
    text_index = torch.arange(text_length, device=start.device).expand(batch, -1)
    index.scatter_(1, torch.where(keep, start, spliced_length), text_index)
    speech_position = torch.arange(speech_length, device=start.device)
    speech_start = (start * first).sum(dim=1, keepdim=True)
    index.scatter_(
        1,
        torch.where(speech_attention_mask, speech_start + speech_position, spliced_length),
        (text_length + speech_position).expand(batch, -1),
    )
    index = index[:, :spliced_length]

    zeros = text_embeds.new_zeros(batch, 1, text_embeds.shape[-1])
    source = torch.cat([text_embeds, speech_embeds.to(text_embeds.dtype), zeros], dim=1)
    embeds = source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))
    moved_labels = None
    if labels is not None:
        silent = labels.new_full((batch, speech_length + 1), IGNORE_INDEX)
        moved_labels = torch.cat([labels, silent], dim=1).gather(1, index)
    return Spliced(
        inputs_embeds=embeds,
        attention_mask=index != nothing,
        speech_mask=(index >= text_length) & (index != nothing),
        labels=moved_labels,
    )


def _checked_length(total: Tensor, speech_mask: Tensor) -> int:
    """The longest of the rows' lengths (B, 1), once each is known to have one place for speech."""
    begins = speech_mask.clone()
    begins[:, 1:] &= ~speech_mask[:, :-1]
    runs = begins.sum(dim=1)
    # together, so that the device is waited for once
    longest, fewest, most = torch.stack([total.max(), runs.min(), runs.max()]).tolist()
    if fewest != 1 or most != 1:
        raise ValueError(
            "speech_mask: expected one run of True in each row, where its speech goes, got rows "
            f"with {fewest if fewest != 1 else most}; give each row one place, as the processor "
            "does, and leave rows without speech to generate_from_text"
        )
    return int(longest)
