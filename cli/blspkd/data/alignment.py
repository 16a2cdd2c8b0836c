"""When each token of a transcript ends, read off a Whisper decoder's cross-attention.

The decoder reads the true transcript while it listens; its alignment heads look at the frame that
they are about to write down (the heads Whisper itself takes for word times, arXiv 2212.04356).
The best monotonic cut of the clip into one stretch per decoder token is found by dynamic
programming, and carried over to another tokenizer's tokens by character.

Shapes: T encoder frames, D encoder width, K decoder tokens, N tokens of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from blspkd.data.languages import language_code
from blspkd.model.bases import load_transcriber, resolve


@dataclass(frozen=True)
class CrossAttentionAligner:
    """A whole Whisper model that says when what is said.

    Attributes:
        model: encoder and decoder, with ``alignment_heads`` in its generation configuration.
        tokenizer: the decoder's, a fast one.
    """

    model: WhisperForConditionalGeneration
    tokenizer: Any

    @classmethod
    def load(
        cls, reference: str, *, dtype: torch.dtype, device: torch.device
    ) -> CrossAttentionAligner:
        """Load one.

        Args:
            reference: path or hub id.
            dtype: of the weights.
            device: where it runs.

        Raises:
            ValueError: the checkpoint has no decoder, or does not name its alignment heads.
        """
        model: Any = load_transcriber(reference, dtype=dtype)
        if model is None:
            raise ValueError(
                f"{reference!r} has no decoder to align transcripts with: name a whole Whisper "
                "model, or set losses.alignment=0"
            )
        if not getattr(model.generation_config, "alignment_heads", None):
            raise ValueError(
                f"{reference!r}: its generation_config.json names no alignment_heads; copy them "
                "from the original Whisper checkpoint, or set losses.alignment=0"
            )
        model.set_attn_implementation("eager")  # the others keep no attention weights
        return cls(model.to(device).eval(), AutoTokenizer.from_pretrained(resolve(reference)))

    @torch.no_grad()
    def token_ends(
        self,
        encoded: Tensor,
        transcript: str,
        char_ends: Sequence[int],
        *,
        language: str | None = None,
    ) -> Tensor:
        """Where each token of a transcript ends.

        Args:
            encoded: (T, D), the encoder's outputs for one clip.
            transcript: what is said in it.
            char_ends: where each of N tokens ends, in characters of the stripped transcript.
            language: of the clip, as manifests have it, for a multilingual model; English if not
                told.

        Returns:
            (N,) float32, in encoder frames, never decreasing; the last is where speech ends.
        """
        coded = self.tokenizer(
            " " + transcript.strip(), add_special_tokens=False, return_offsets_mapping=True
        )
        ids = coded["input_ids"]
        attention = self._attention(encoded, [*self._start(language), *ids], rows=len(ids) + 1)
        times = [0, *monotonic_ends(attention)[:-1]]
        # the decoder's text begins with a blank, which is no character of the transcript
        chars = [0, *(max(0, end - 1) for _, end in coded["offset_mapping"])]
        return torch.from_numpy(np.interp(char_ends, chars, times).astype(np.float32))

    def _start(self, language: str | None) -> list[int]:
        """What the decoder is given before the transcript."""
        settings: Any = self.model.generation_config
        start = [settings.decoder_start_token_id]
        if getattr(settings, "is_multilingual", False):
            code = f"<|{language_code(language)}|>"
            if code not in settings.lang_to_id:
                raise ValueError(f"the aligner's model does not know the language {language!r}")
            start += [settings.lang_to_id[code], settings.task_to_id["transcribe"]]
        return [*start, settings.no_timestamps_token_id]

    def _attention(self, encoded: Tensor, ids: list[int], *, rows: int) -> np.ndarray:
        """(rows, T) float64: of the last ``rows`` positions, averaged over the alignment heads."""
        model: Any = self.model
        states = encoded.to(model.device, model.dtype)[None]
        output = model.model.decoder(
            input_ids=torch.tensor([ids], device=model.device),
            encoder_hidden_states=states,
            output_attentions=True,
            use_cache=False,
        )
        heads = model.generation_config.alignment_heads
        chosen = torch.stack(
            [output.cross_attentions[layer][0, head, -rows:] for layer, head in heads]
        ).float()
        std, mean = torch.std_mean(chosen, dim=1, keepdim=True, correction=0)
        return ((chosen - mean) / std.clamp(min=1e-6)).mean(dim=0).double().cpu().numpy()


def monotonic_ends(scores: np.ndarray) -> np.ndarray:
    """The best cut of T frames into K successive stretches.

    Args:
        scores: (K, T), what row k gains from each frame of its stretch.

    Returns:
        (K,) int64, where each stretch ends (exclusive); the last is T. Stretches may be empty.
    """
    tokens, frames = scores.shape
    total = np.zeros((tokens, frames + 1))
    np.cumsum(scores, axis=1, out=total[:, 1:])
    best = total[0]  # best[t]: gain of the first t frames, all cut so far
    begins = np.zeros((tokens, frames + 1), dtype=np.int64)
    for k in range(1, tokens):
        gain = best - total[k]
        highest = np.maximum.accumulate(gain)
        # where the running maximum was last raised is where stretch k begins
        raised = np.concatenate([[True], gain[1:] > highest[:-1]])
        begins[k] = np.maximum.accumulate(np.where(raised, np.arange(frames + 1), 0))
        best = total[k] + highest
    ends = np.empty(tokens, dtype=np.int64)
    end = frames
    for k in range(tokens - 1, -1, -1):
        ends[k] = end
        end = begins[k][end]
    return ends
