"""What a CFormer hears where nobody says how many tokens were spoken, or whether any were.

Shapes: B batch, T encoder frames, D encoder width, N speech tokens, H + W adapter output width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from speech_adapters import AdapterOutput, CFormer, search_length

from .adapting import token_log_probs
from .configuration import BlspKDConfig

Reading = Callable[[Tensor], Tensor]
"""Token ids (B, N) to (B, N): the log-probability of each after those before it."""


def hear(
    adapter: CFormer,
    hidden_states: Tensor,
    attention_mask: Tensor,
    config: BlspKDConfig,
    *,
    token_keys: Tensor,
    read: Reading,
) -> AdapterOutput:
    """Cut frames at a length that is found, and drop what is like no tokens.

    Args:
        adapter: in eval mode.
        hidden_states: (B, T, D), right-padded.
        attention_mask: (B, T) bool.
        config: whose ``length_search``, ``length_search_lm_weight``, ``logprob_threshold`` and
            ``token_scale`` say how.
        token_keys: (V, H + W), unit rows.
        read: the language model as a judge of text.
    """
    keys, lm_weight = token_keys.float(), config.length_search_lm_weight

    def likeliest(vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, H + W) to (B, N) and (B, N): log-probability and id of the likeliest token."""
        log_probs, tokens = token_log_probs(vectors, keys, config.token_scale).max(dim=-1)
        return log_probs, tokens

    def confidence(vectors: Tensor) -> Tensor:
        log_probs, tokens = likeliest(vectors)
        return log_probs + lm_weight * read(tokens) if lm_weight else log_probs

    if config.length_search:
        out = search_length(
            adapter,
            hidden_states,
            attention_mask,
            confidence=confidence,
            weight=config.length_search,
        )
    else:
        out = adapter(hidden_states, attention_mask)
    if config.logprob_threshold is None:
        return out
    return _drop_unlike(out, likeliest(out.hidden_states)[0], config.logprob_threshold)


def _drop_unlike(out: AdapterOutput, log_probs: Tensor, threshold: float) -> AdapterOutput:
    """No tokens from clips whose mean log-probability (of (B, N)) is below the threshold."""
    assert out.fire_times is not None
    counts = out.attention_mask.sum(dim=1)
    means = log_probs.masked_fill(~out.attention_mask, 0.0).sum(dim=1) / counts.clamp(min=1)
    heard = out.attention_mask & (means >= threshold)[:, None]
    return dataclasses.replace(
        out,
        hidden_states=out.hidden_states.masked_fill(~heard[..., None], 0.0),
        attention_mask=heard,
        fire_times=out.fire_times.masked_fill(~heard, 0.0),
    )
