"""Answers to text, answers to speech, and what the speech tokens stand for: in batches.

An answer does not depend on its batch, unless it is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from blspkd.data.manifest import Record
from blspkd.model.decoding import GREEDY, Decoding, check_length
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor
from blspkd.model.prompts import Messages

from .conditions import Hear, hear_clean
from .meters import nearest_tokens

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""


def answer_from_text(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    transcripts: Sequence[str],
    messages: Sequence[Messages],
    *,
    decoding: Decoding = GREEDY,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[str]:
    """Let the untouched language model answer transcripts.

    Args:
        model: The speech LLM; its PLoRA is off.
        processor: The model's.
        transcripts: What stands in place of the speech: true, or a recogniser's.
        messages: The chat around each, with `{speech}` in one turn.
        decoding: How words are chosen.
        batch_size: How many are answered at a time.
        progress: Told how far it is.

    Raises:
        ValueError: The language model does not read as many tokens as the longest of them and its
            answer may have.
    """
    _check_counts(transcripts, messages)
    turns = [processor.tokenize_turn(*pair) for pair in zip(messages, transcripts, strict=True)]
    longest = max((len(turn.input_ids) for turn in turns), default=0)
    # all of them before the first is answered, so that none fails after hours
    check_length(model.language_model.config, longest, decoding.max_new_tokens)
    answers: list[str] = []
    device = model.embedding_weight().device
    with _evaluating(model):
        for part in _parts(len(transcripts), batch_size):
            batch = processor.pad_turns([turns[i] for i in part], padding_side="left")
            tokens = model.generate_from_text(
                batch["input_ids"].to(device),
                batch["attention_mask"].to(device),
                **decoding.options(processor),
            )
            answers += processor.decode_responses(tokens)
            if progress is not None:
                progress(len(answers), len(transcripts))
    return answers


def answer_from_speech(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    records: Sequence[Record],
    messages: Sequence[Messages],
    *,
    decoding: Decoding = GREEDY,
    batch_size: int = 8,
    progress: Progress | None = None,
    hear: Hear = hear_clean,
) -> list[str]:
    """Let the speech LLM answer clips; it never sees their transcripts.

    Args:
        model: The speech LLM.
        processor: The model's.
        records: The clips.
        messages: The chat around each, with `{speech}` in one turn.
        decoding: How words are chosen.
        batch_size: How many are answered at a time.
        progress: Told how far it is.
        hear: How the clips sound.

    Raises:
        AudioError: A clip cannot be read.
    """
    _check_counts(records, messages)
    answers: list[str] = []
    device = model.embedding_weight().device
    with _evaluating(model):
        for part in _parts(len(records), batch_size):
            batch = processor(
                [hear(records[i]) for i in part],
                messages=[messages[i] for i in part],
                full_window=model.config.full_window,
            ).to(device)
            tokens = model.generate(**batch, **decoding.options(processor))
            answers += processor.decode_responses(tokens)
            if progress is not None:
                progress(len(answers), len(records))
    return answers


def nearest_embedding_transcripts(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    records: Sequence[Record],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    hear: Hear = hear_clean,
) -> list[str]:
    """Spell out each adapter output as the token whose embedding is nearest by cosine.

    The adapter alone decides how many tokens there are. This is what has been recognised, whatever
    the language model then makes of it.

    Args:
        model: The speech LLM; its adapter makes one output per token (CFormer).
        processor: The model's.
        records: The clips.
        batch_size: How many are read at a time.
        progress: Told how far it is.
        hear: How the clips sound.
    """
    transcripts: list[str] = []
    device = model.embedding_weight().device
    with _evaluating(model), torch.no_grad():
        for part in _parts(len(records), batch_size):
            features = [processor.features(hear(records[i])) for i in part]
            batch = processor.pad_features(features, full_window=model.config.full_window)
            adapter = model.embed_speech(
                input_features=batch["input_features"].to(device),
                feature_attention_mask=batch["feature_attention_mask"].to(device),
            )
            mask = adapter.attention_mask
            found = nearest_tokens(model, adapter.hidden_states[mask])
            for ids in found.cpu().tensor_split(mask.sum(dim=1).cumsum(dim=0)[:-1].cpu()):
                text = processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                transcripts.append(text.strip())
            if progress is not None:
                progress(len(transcripts), len(records))
    return transcripts


@contextmanager
def _evaluating(model: BlspKDForConditionalGeneration) -> Iterator[None]:
    """Switch dropout off for the time being: training calls this between two steps."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def _parts(count: int, batch_size: int) -> Iterator[range]:
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def _check_counts(clips: Sequence[Any], messages: Sequence[Messages]) -> None:
    if len(clips) != len(messages):
        raise ValueError(
            f"expected the chat messages of each clip, got {len(messages)} for {len(clips)} clips"
        )
