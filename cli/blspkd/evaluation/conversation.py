"""A conversation about a recording: speech first, then text, turn by turn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from blspkd.model.decoding import GREEDY, Decoding
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor
from blspkd.model.prompts import PLACEHOLDER, Messages

from .clips import read_clips

FEATURES = ("input_features", "feature_attention_mask")
TEXT = ("input_ids", "attention_mask", "speech_mask")


class Conversation:
    """What was said so far, to a speech LLM that answers each turn with all of it in mind.

    The language model hears one utterance a conversation, as in training, so that each recording
    begins a new one.

    Args:
        model: The speech LLM; it is put into eval mode.
        processor: The model's.
        prompt: The user turn around a recording, with `{speech}` in it; by default the model's own.
        decoding: How words are chosen.

    Attributes:
        messages: The turns, answers included; `{speech}` stands for the recording.
        spoken: How many tokens were heard in the recording; 0 if it held no speech.
        silent: The recording holds no sound that could be speech.
    """

    def __init__(
        self,
        model: BlspKDForConditionalGeneration,
        processor: BlspKDProcessor,
        *,
        prompt: str | None = None,
        decoding: Decoding = GREEDY,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.prompt = model.config.prompt if prompt is None else prompt
        self.decoding = decoding
        self.messages: Messages = []
        self.spoken = 0
        self.silent = False
        self._speech: dict[str, Tensor] = {}

    @torch.no_grad()
    def listen(self, path: Path) -> str:
        """Begin anew with a recording, and answer it.

        Args:
            path: Any audio file of 0.1 to 30 s.

        Raises:
            AudioError: It cannot be used; the conversation stays as it was.
            ValueError: Likewise.
        """
        (clip,) = read_clips([path], prompt=self.prompt)
        features = self.processor.pad_features(
            [self.processor.features(path)], full_window=self.model.config.full_window
        )
        device = self.model.embedding_weight().device
        hidden, mask = self.model.encode(*(features[name].to(device) for name in FEATURES))
        speech = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        spoken = int(self.model.embed_speech(**speech).attention_mask.sum())
        answer = self._answer(clip.messages, speech)
        self._speech, self.spoken, self.silent = speech, spoken, clip.silent
        self.messages = [*clip.messages, {"role": "assistant", "content": answer}]
        return answer

    def say(self, text: str) -> str:
        """Go on with a turn of text, and answer it.

        Raises:
            ValueError: Nothing was heard yet, the conversation is too long, or the text has
                `{speech}` in it; the conversation stays as it was.
        """
        if not self.messages:
            raise ValueError("a conversation begins with a recording: name an audio file first")
        if PLACEHOLDER in text:
            raise ValueError(f"{PLACEHOLDER} stands for the recording, and cannot be in a text")
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer(messages, self._speech)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _answer(self, messages: Messages, speech: dict[str, Tensor]) -> str:
        turn = self.processor.tokenize_turn(messages)
        text = self.processor.pad_turns([turn], padding_side="left")
        device = self.model.embedding_weight().device
        tokens = self.model.generate(
            **{name: text[name].to(device) for name in TEXT},
            **speech,
            **self.decoding.options(self.processor),
        )
        # what looks like the recording's place in an answer would be taken for it in the next turn
        return self.processor.decode_responses(tokens)[0].replace(PLACEHOLDER, "{ speech }")
