"""Audio and chat turns to model inputs.

Shapes: B batch, M mel bins, F mel frames, L text length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .audio import MIN_DURATION, check_waveform, load_audio
from .literal import literal_ids
from .prompts import Messages, as_messages, end_of_answer, render
from .splice import IGNORE_INDEX


@dataclass(frozen=True)
class TokenizedTurn:
    """One conversation as token ids.

    Attributes:
        input_ids: prompt, utterance, end of prompt, response.
        speech_mask: True on the utterance.
        labels: the response's ids at their own positions, -100 elsewhere.
    """

    input_ids: list[int]
    speech_mask: list[bool]
    labels: list[int]


@dataclass(frozen=True)
class _Prompt:
    """What stands around an utterance.

    Attributes:
        before: ids before it.
        word_before: whether it follows a space.
        after: ids behind it.
        word_at_end: whether the answer goes on in the text, and so begins with a space.
    """

    before: list[int]
    word_before: bool
    after: list[int]
    word_at_end: bool


class BlspKDProcessor(ProcessorMixin):
    """Whisper's feature extractor and the language model's tokenizer, joined.

    The prompt before the speech, the transcript, and the prompt after it are tokenised apart and
    then joined, in training and in generation alike: so the prompt's tokens never depend on what
    is said.

    Args:
        feature_extractor: a Whisper feature extractor.
        tokenizer: the language model's tokenizer.
    """

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        super().__init__(feature_extractor, tokenizer)  # type: ignore[no-untyped-call]  # transformers
        self._prompts: dict[str, _Prompt] = {}

    @functools.cached_property
    def _end(self) -> int:
        return end_of_answer(self.tokenizer)

    def features(self, audio: np.ndarray | str | Path) -> np.ndarray:
        """(M, F) float32 log-mel features of one clip, its own frames alone.

        Args:
            audio: a path, or mono float samples (S,) at the extractor's sampling rate.

        Raises:
            AudioError: it cannot be read, is empty, too short or too long, or not finite.
            TypeError: it is neither a path nor an array of floats.
            ValueError: it has several channels.
        """
        rate = self.feature_extractor.sampling_rate
        if isinstance(audio, (str, Path)):
            audio = load_audio(audio, sampling_rate=rate)
        elif isinstance(audio, np.ndarray):
            # augmentation makes a clip up to four times as fast, one of the least length too
            audio = check_waveform(audio, sampling_rate=rate, min_duration=MIN_DURATION / 4)
        else:
            raise TypeError(
                f"audio: expected a path or a numpy array, got {type(audio).__name__}; convert "
                "samples with numpy.asarray"
            )
        extracted = self.feature_extractor(
            audio, sampling_rate=rate, padding=False, truncation=False, return_tensors="np"
        )
        mel: np.ndarray = extracted.input_features[0].astype(np.float32)
        return mel

    def pad_features(
        self, features: Sequence[np.ndarray], *, full_window: bool = False
    ) -> dict[str, Tensor]:
        """Batch features of different lengths.

        Args:
            features: each (M, F_b).
            full_window: pad to the encoder's 30 s instead of to the longest.

        Returns:
            ``input_features`` (B, M, F) float32 and ``feature_attention_mask`` (B, F) bool.
        """
        longest = max(one.shape[1] for one in features)
        frames = self.feature_extractor.nb_max_frames if full_window else longest
        if longest > frames:
            raise ValueError(
                f"a clip of {longest / 100:.1f} s exceeds the encoder's window of "
                f"{frames / 100:.0f} s: split it into shorter clips"
            )
        batch = torch.zeros(len(features), features[0].shape[0], frames)
        mask = torch.zeros(len(features), frames, dtype=torch.bool)
        for row, one in enumerate(features):
            if full_window:
                batch[row] = _silence_beside(one)
            batch[row, :, : one.shape[1]] = torch.from_numpy(one)
            mask[row, : one.shape[1]] = True
        return {"input_features": batch, "feature_attention_mask": mask}

    def tokenize_turn(
        self,
        messages: Messages,
        transcript: str | None = None,
        *,
        response: str | None = None,
        response_finished: bool = True,
    ) -> TokenizedTurn:
        """One conversation as token ids.

        Args:
            messages: chat turns, exactly one of which contains ``{speech}``, once.
            transcript: what is said; None leaves one placeholder position for speech. An empty one
                has no tokens, not even the space that goes before a word.
            response: the answer, when it is known.
            response_finished: the answer came to its end, so the end token is part of it.
        """
        prompt = self._prompt(messages)
        if transcript is None:
            spoken = [self.tokenizer.pad_token_id]
        else:
            spoken, _ = literal_ids(
                self.tokenizer, transcript.strip(), behind_a_word=prompt.word_before
            )
        answer: list[int] = []
        if response is not None:
            answer, _ = literal_ids(
                self.tokenizer, response.strip(), behind_a_word=prompt.word_at_end
            )
            if response_finished:
                answer = [*answer, self._end]
        before, after = prompt.before, prompt.after
        prompt_length = len(before) + len(spoken) + len(after)
        return TokenizedTurn(
            input_ids=[*before, *spoken, *after, *answer],
            speech_mask=[False] * len(before)
            + [True] * len(spoken)
            + [False] * (len(after) + len(answer)),
            labels=[IGNORE_INDEX] * prompt_length + answer,
        )

    def transcript_ends(self, messages: Messages, transcript: str) -> list[int]:
        """Where each token of a transcript ends, in characters of the stripped transcript.

        Raises:
            ValueError: if the tokenizer cannot tell, for want of a fast implementation.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell where its tokens end in a text; "
                "alignment needs a fast tokenizer"
            )
        word_before = self._prompt(messages).word_before
        return literal_ids(self.tokenizer, transcript.strip(), behind_a_word=word_before)[1]

    def pad_turns(
        self, turns: Sequence[TokenizedTurn], *, padding_side: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        """Batch conversations: ``input_ids``, ``attention_mask``, ``speech_mask``, ``labels``."""
        length = max(len(turn.input_ids) for turn in turns)
        columns: dict[str, tuple[Any, Any]] = {
            "input_ids": (self.tokenizer.pad_token_id, torch.long),
            "attention_mask": (False, torch.bool),
            "speech_mask": (False, torch.bool),
            "labels": (IGNORE_INDEX, torch.long),
        }
        batch = {
            name: torch.full((len(turns), length), fill, dtype=dtype)
            for name, (fill, dtype) in columns.items()
        }
        for row, turn in enumerate(turns):
            size = len(turn.input_ids)
            place = slice(length - size, length) if padding_side == "left" else slice(0, size)
            batch["input_ids"][row, place] = torch.tensor(turn.input_ids)
            batch["attention_mask"][row, place] = True
            batch["speech_mask"][row, place] = torch.tensor(turn.speech_mask)
            batch["labels"][row, place] = torch.tensor(turn.labels)
        return batch

    def __call__(
        self,
        audio: np.ndarray | str | Path | Sequence[np.ndarray | str | Path],
        *,
        messages: Messages | Sequence[Messages] | None = None,
        prompt: str | None = None,
        transcripts: Sequence[str] | None = None,
        responses: Sequence[str] | None = None,
        full_window: bool = False,
    ) -> BatchFeature:
        """Clips and what to do with them, to a batch for the model.

        Args:
            audio: one clip or several: paths, or mono float samples (S,) at 16 kHz.
            messages: chat turns for all clips or for each, with ``{speech}`` in one of them.
            prompt: instead of ``messages``: the user turn's text, with ``{speech}`` in it.
            transcripts: what is said, for ``forward``; left out for ``generate``.
            responses: the answers, for ``forward``.
            full_window: see :class:`BlspKDConfig`.

        Returns:
            The keyword arguments of ``generate``, or, with transcripts, of ``forward``.
        """
        clips = [audio] if isinstance(audio, (str, Path, np.ndarray)) else list(audio)
        if (messages is None) == (prompt is None):
            raise ValueError("give either messages or prompt")
        if prompt is not None:
            messages = as_messages(prompt)
        assert messages is not None
        # first of all, so that what is no clip, or no list of clips, is told as such
        features = [self.features(clip) for clip in clips]
        shared = isinstance(messages[0], dict)
        chats = [messages] * len(clips) if shared else list(messages)
        for name, values in (("transcripts", transcripts), ("responses", responses)):
            if values is not None and len(values) != len(clips):
                raise ValueError(f"{len(clips)} clips but {len(values)} {name}")
        turns = [
            self.tokenize_turn(
                chats[i],  # type: ignore[arg-type]  # told apart by `shared` above
                None if transcripts is None else transcripts[i],
                response=None if responses is None else responses[i],
            )
            for i in range(len(clips))
        ]
        side: Literal["left", "right"] = "left" if transcripts is None else "right"
        text = self.pad_turns(turns, padding_side=side)
        if transcripts is None:
            del text["labels"]
        speech = self.pad_features(features, full_window=full_window)
        return BatchFeature({**text, **speech})

    def decode_responses(self, token_ids: Tensor) -> list[str]:
        """Answers as text, special tokens left out. token_ids (B, R) int64."""
        texts: list[str] = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _ids(self, text: str) -> list[int]:
        """Token ids of a part of the prompt, whose special tokens are such."""
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _prompt(self, messages: Messages) -> _Prompt:
        key = repr(messages)
        if key not in self._prompts:
            before, after = render(self.tokenizer, messages)
            bare = self.tokenizer.chat_template is None
            self._prompts[key] = _Prompt(
                # a space belongs to the word after it, as tokenizers have it
                before=self._ids(before.removesuffix(" ")),
                word_before=before.endswith(" "),
                after=self._ids(after),
                word_at_end=bare and not after[-1:].isspace(),
            )
        return self._prompts[key]


def _silence_beside(mel: np.ndarray) -> float:
    """What Whisper's log-mel is where it pads a clip (M, F) with zeros: 80 dB below the peak.

    And never below the least logarithm that it takes. It scales log10 as (x + 4) / 4.
    """
    return max(float(mel.max()) - 8 / 4, (-10 + 4) / 4)
