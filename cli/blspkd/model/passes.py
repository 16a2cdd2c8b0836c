"""Passes through the language model's layers, for teacher and student.

Shapes: B batch, P shared prompt, L text length, S spliced length, H width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


def shared_prompt_length(input_ids: Tensor, speech_mask: Tensor) -> int:
    """How many leading tokens all rows have in common before any speech.

    Args:
        input_ids: (B, L) int64, right-padded.
        speech_mask: (B, L) bool.
    """
    same = (input_ids == input_ids[:1]).all(dim=0) & ~speech_mask.any(dim=0)
    return int(same.long().cumprod(dim=0).sum())


@torch.no_grad()
def read_prompt(language_model: PreTrainedModel, input_ids: Tensor) -> Cache:
    """Keys and values of a prompt (1, P) int64 that teacher and student share.

    Raises:
        ValueError: if the language model keeps no such cache.
    """
    decoder: Any = language_model.get_decoder()
    cache = decoder(input_ids=input_ids, use_cache=True).past_key_values
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{type(language_model).__name__} gives no key-value cache: set "
            "optim.share_prompt=false"
        )
    return cache


def read(
    language_model: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    prompt: Cache | None,
    prompt_length: int,
) -> Tensor:
    """Hidden states (B, S, H) that the head would read, of what follows the prompt.

    Args:
        language_model: a causal LM; its head is not run.
        inputs_embeds: (B, S, H), right-padded, without the shared prompt.
        attention_mask: (B, S) bool.
        prompt: what :func:`read_prompt` gave, which is left as it is; None if there is none.
        prompt_length: P.
    """
    decoder: Any = language_model.get_decoder()
    if prompt is None:
        output = decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask.long(), use_cache=False
        )
    else:
        cache: Any = copy.deepcopy(prompt)
        cache.batch_repeat_interleave(len(inputs_embeds))
        before = attention_mask.new_ones(len(inputs_embeds), prompt_length)
        output = decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.cat([before, attention_mask], dim=1).long(),
            past_key_values=cache,
            use_cache=True,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden
