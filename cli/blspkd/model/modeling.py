"""The speech LLM: encoder, adapter, language model with PLoRA; teacher and student in one.

Shapes: B batch, M mel bins, F mel frames, T encoder frames, L text length, N speech tokens,
H embedding width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speech_adapters import AdapterOutput

from .assembled import AssembledModel
from .decoding import check_length
from .losses import BlspKDOutput, loss_sums
from .objective import Objective, Pass, loss_items, paired
from .passes import Depth, read, read_prompt
from .splice import Spliced, splice

__all__ = ["BlspKDForConditionalGeneration", "BlspKDOutput"]


class BlspKDForConditionalGeneration(AssembledModel):
    """A frozen text LLM that reads speech through an adapter (arXiv 2405.19041).

    Build one from pretrained parts with ``from_parts``, load a trained one with
    ``from_pretrained``. The language model is frozen; with PLoRA it has extra capacity on speech
    positions alone, so its answers to text stay bit-identical.

    Args:
        config: the model's configuration.
        encoder: a loaded Whisper encoder.
        language_model: a loaded causal LM.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        speech_mask: Tensor,
        labels: Tensor,
        *,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        objective: Objective | None = None,
        num_items: dict[str, Tensor] | None = None,
        prompt_length: int = 0,
        free_running: Tensor | None = None,
        token_ends: Tensor | None = None,
    ) -> BlspKDOutput:
        """Read the same utterances as speech and as text, and compare.

        Args:
            input_ids: (B, L) int64: prompt, transcript, end of prompt, response; right-padded.
            attention_mask: (B, L).
            speech_mask: (B, L) bool, True on the transcript.
            labels: (B, L) int64, the response's ids at their own positions, -100 elsewhere.
            input_features: (B, M, F), or else ``encoder_hidden_states`` (B, T, D).
            feature_attention_mask: (B, F).
            encoder_hidden_states: (B, T, D), if the encoder's outputs are cached.
            encoder_attention_mask: (B, T).
            objective: which losses, how weighted; None computes no loss but both passes.
            num_items: by loss name, what its sum is divided by; by default this batch's own count.
                Given under gradient accumulation and data parallelism, see :func:`loss_items`.
            prompt_length: P, how many leading tokens all rows share before the speech; they are
                read once for all rows and both passes, which then begin after them.
            free_running: (B,) bool, rows whose speech a CFormer cuts at its predicted length, as in
                inference. The losses that pair speech with text tokens leave them out.
            token_ends: (B, N) float32, where each transcript token ends, in encoder frames, for the
                alignment loss.
        """
        attention_mask, speech_mask = attention_mask.bool(), speech_mask.bool()
        if self.config.plain_lora:
            prompt_length = 0  # what is read once for all passes carries no gradient
        aligned = self.config.adapter_type == "cformer"
        adapter = self.embed_speech(
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            target_lengths=speech_mask.sum(dim=1) if aligned else None,
            free_running=free_running if aligned else None,
        )
        output = BlspKDOutput(None, {}, adapter, adapter.hidden_states, None, None)
        weights = None if objective is None else objective.weights
        if weights is None or weights.reads_language_model:
            end = input_ids.shape[1]
            if weights is not None and not weights.reads_response:
                # nothing after the utterance is looked at: leave it out of both passes
                end = int(speech_mask.any(dim=0).nonzero().max()) + 1
            output.student, output.teacher = self._read_both(
                input_ids[:, :end],
                Spliced(
                    self.language_model.get_input_embeddings()(input_ids[:, :end]),
                    attention_mask[:, :end],
                    speech_mask[:, :end],
                    labels[:, :end],
                ).after(prompt_length),
                adapter,
                prompt_length=prompt_length,
                aligned=aligned,
                with_teacher=weights is None or weights.reads_teacher,
                depth=None if objective is None else objective.depth,
                free_running=free_running,
            )
        if objective is None:
            return output
        sums = loss_sums(
            output,
            objective,
            token_ids=input_ids,
            speech_mask=speech_mask,
            free_running=free_running,
            token_ends=token_ends,
            token_keys=self.token_keys() if objective.weights.token > 0 else None,
            head_weight=self.head_weight(),
            token_scale=self.config.token_scale,
        )
        counts = (
            num_items if num_items is not None else loss_items(speech_mask, labels, free_running)
        )
        means = {name: value / counts[name].clamp(min=1) for name, value in sums.items()}
        output.losses = {name: value.detach() for name, value in means.items()}
        weighted = [getattr(objective.weights, name) * value for name, value in means.items()]
        output.loss = torch.stack(weighted).sum()
        return output

    def _read_both(
        self,
        input_ids: Tensor,
        text: Spliced,
        adapter: AdapterOutput,
        *,
        prompt_length: int,
        aligned: bool,
        with_teacher: bool,
        depth: Depth | None,
        free_running: Tensor | None,
    ) -> tuple[Pass, Pass | None]:
        """The student's pass over speech and, if asked for, the teacher's over ``text``."""
        assert text.labels is not None
        prompt = None
        if prompt_length > 0:
            with self.plora_on(None):
                prompt = read_prompt(self.language_model, input_ids[:1, :prompt_length], depth)
        spliced = splice(
            text.inputs_embeds,
            text.attention_mask,
            text.speech_mask,
            self.readable(adapter.hidden_states),
            adapter.attention_mask,
            labels=text.labels,
            length=text.inputs_embeds.shape[1] if aligned and free_running is None else None,
        )
        assert spliced.labels is not None
        in_prompt = spliced.speech_mask.new_zeros(len(spliced.speech_mask), prompt_length)
        with self.plora_on(torch.cat([in_prompt, spliced.speech_mask], dim=1)):
            heard = read(
                self.language_model,
                spliced.inputs_embeds,
                spliced.attention_mask,
                prompt,
                prompt_length,
                depth,
            )
        student = Pass.of(heard, paired(spliced.speech_mask, free_running), spliced.labels)
        if not with_teacher:
            return student, None
        with torch.no_grad(), self.plora_on(None):
            seen = read(
                self.language_model,
                text.inputs_embeds,
                text.attention_mask,
                prompt,
                prompt_length,
                depth,
            )
        return student, Pass.of(seen, paired(text.speech_mask, free_running), text.labels)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        speech_mask: Tensor,
        *,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Answer speech.

        Args:
            input_ids: (B, L) int64, the prompt with any placeholder ids under ``speech_mask``.
            attention_mask: (B, L).
            speech_mask: (B, L) bool, True where the speech goes: one run per row.
            input_features: (B, M, F), or else ``encoder_hidden_states`` (B, T, D).
            feature_attention_mask: (B, F).
            encoder_hidden_states: (B, T, D).
            encoder_attention_mask: (B, T).
            max_new_tokens: how long an answer may be.
            **generation_kwargs: as for the language model's own ``generate``.

        Returns:
            (B, R) int64, the new tokens alone.

        Raises:
            ValueError: a row has not one place for speech, or the language model does not read
                as many tokens as prompt, speech and answer may have.
        """
        adapter = self.embed_speech(
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        spliced = splice(
            self.language_model.get_input_embeddings()(input_ids),
            attention_mask.bool(),
            speech_mask.bool(),
            self.readable(adapter.hidden_states),
            adapter.attention_mask,
            padding_side="left",
        )
        length = spliced.inputs_embeds.shape[1]
        check_length(self.language_model.config, length, max_new_tokens)
        with self.plora_on(spliced.speech_mask):
            tokens: Tensor = self._generate(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask.long(),
                max_new_tokens=max_new_tokens,
                **generation_kwargs,
            )
        return tokens

    @torch.no_grad()
    def generate_from_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int = 64,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Answer text with the untouched language model: the teacher's own words.

        Args:
            input_ids: (B, L) int64, left-padded.
            attention_mask: (B, L).
            max_new_tokens: how long an answer may be.
            **generation_kwargs: as for the language model's own ``generate``.

        Returns:
            (B, R) int64, the new tokens alone.

        Raises:
            ValueError: the language model does not read as many tokens as prompt and answer may
                have.
        """
        check_length(self.language_model.config, input_ids.shape[1], max_new_tokens)
        with self.plora_on(None):
            tokens: Tensor = self._generate(
                input_ids=input_ids,
                attention_mask=attention_mask.long(),
                max_new_tokens=max_new_tokens,
                **generation_kwargs,
            )
        return tokens[:, input_ids.shape[1] :]

    def _generate(self, **options: Any) -> Tensor:
        language_model: Any = self.language_model
        tokens: Tensor = language_model.generate(**options)
        return tokens
