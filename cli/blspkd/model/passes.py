"""Passes through the language model's layers, for teacher and student.

Shapes: B batch, P shared prompt, L text length, S spliced length, H width.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .early_layer import EarlyLayer, watched_layer


@dataclass(frozen=True)
class Depth:
    """How far into the language model a pass goes.

    Attributes:
        layer: whose output is wanted besides, from 1; None for no other than the last one's.
        stop: run no layer after it.
    """

    layer: int | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        """Refuse to stop nowhere."""
        if self.stop and self.layer is None:
            raise ValueError("stop: expected a layer to stop after, got None")


@dataclass(frozen=True)
class Reading:
    """What a pass through the language model's layers yields.

    Attributes:
        last: (B, S, H), what the head would read after the last layer that was run.
        layer_output: (B, S, H), the output of the layer asked for, or None.
        layer_readout: (B, S, H), the same after the final norm, as the head would read it.
    """

    last: Tensor
    layer_output: Tensor | None = None
    layer_readout: Tensor | None = None


def shared_prompt_length(input_ids: Tensor, speech_mask: Tensor) -> int:
    """How many leading tokens all rows have in common before any speech.

    Args:
        input_ids: (B, L) int64, right-padded.
        speech_mask: (B, L) bool.
    """
    same = (input_ids == input_ids[:1]).all(dim=0) & ~speech_mask.any(dim=0)
    return int(same.long().cumprod(dim=0).sum())


@torch.no_grad()
def read_prompt(
    language_model: PreTrainedModel, input_ids: Tensor, depth: Depth | None = None
) -> Cache:
    """Keys and values of a prompt (1, P) int64 that teacher and student share.

    Args:
        language_model: a causal LM.
        input_ids: (1, P) int64.
        depth: of the passes that will go on from there.

    Raises:
        ValueError: if the language model keeps no such cache.
    """
    decoder: Any = language_model.get_decoder()
    with _as_deep(decoder, depth):
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
    depth: Depth | None = None,
) -> Reading:
    """Hidden states of what follows the prompt.

    Args:
        language_model: a causal LM; its head is not run.
        inputs_embeds: (B, S, H), right-padded, without the shared prompt.
        attention_mask: (B, S) bool.
        prompt: what :func:`read_prompt` gave, which is left as it is; None if there is none.
        prompt_length: P.
        depth: how far; by default through all layers.
    """
    decoder: Any = language_model.get_decoder()
    given: dict[str, Any] = {"attention_mask": attention_mask.long(), "use_cache": False}
    if prompt is not None:
        cache: Any = copy.deepcopy(prompt)
        cache.batch_repeat_interleave(len(inputs_embeds))
        before = attention_mask.new_ones(len(inputs_embeds), prompt_length)
        mask = torch.cat([before, attention_mask], dim=1)
        given = {"attention_mask": mask.long(), "past_key_values": cache, "use_cache": True}
    with _as_deep(decoder, depth) as layer:
        last: Tensor = decoder(inputs_embeds=inputs_embeds, **given).last_hidden_state
    if layer is None:
        return Reading(last)
    return Reading(last, layer.output, layer.readout(last))


def _as_deep(decoder: Any, depth: Depth | None) -> AbstractContextManager[EarlyLayer | None]:
    if depth is None or depth.layer is None:
        return nullcontext()
    return watched_layer(decoder, depth.layer, stop=depth.stop)
