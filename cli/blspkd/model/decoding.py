"""How the language model's words are chosen, wherever it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .processing import BlspKDProcessor


@dataclass(frozen=True)
class Decoding:
    """How the language model's words are chosen. The default is greedy.

    Attributes:
        max_new_tokens: How long an answer may be.
        temperature: 0 takes the most likely token, above 0 draws.
        top_p: Draw from the likeliest tokens that together have this probability.
        num_beams: Above 1, beam search.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded."""
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature: expected a finite number, 0 or more, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")

    def options(self, processor: BlspKDProcessor) -> dict[str, Any]:
        """Keyword arguments of the model's `generate`.

        They override what a chat model's own generation config asks for: sampling, and penalties
        for repeating, which see the prompt's text but not the speech in its place.
        """
        drawn = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": drawn,
            "num_beams": self.num_beams,
            "temperature": self.temperature if drawn else None,
            "top_p": self.top_p if drawn else None,
            "top_k": 0 if drawn else None,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "pad_token_id": processor.tokenizer.pad_token_id,
        }


GREEDY = Decoding()


def check_length(config: PretrainedConfig, length: int, max_new_tokens: int) -> None:
    """Refuse an answer for which the language model has no positions left.

    Args:
        config: the language model's; nothing is refused if it does not say how much it reads.
        length: tokens of the longest prompt, speech included.
        max_new_tokens: how long its answer may be.

    Raises:
        ValueError: together they are longer than the language model reads.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        raise ValueError(
            f"the conversation has {length} tokens and an answer may have {max_new_tokens}, but "
            f"the language model reads {longest}: allow shorter answers (max_new_tokens), or begin "
            "a shorter conversation"
        )
