"""The speech LLM: encoder, adapter, language model with PLoRA; teacher and student in one.

Shapes: B batch, M mel bins, F mel frames, T encoder frames, L text length, N speech tokens,
H embedding width, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plora import PLoRAConfig, apply_plora, plora_disabled, plora_mask
from speech_adapters import AdapterOutput

from .adapting import build_adapter, check_head, soft_embeddings
from .configuration import BlspKDConfig
from .encoder import SpeechEncoder
from .losses import BlspKDOutput, loss_sums
from .objective import Objective, Pass, loss_items
from .pretrained import PartsModel
from .splice import Spliced, splice

__all__ = ["BlspKDForConditionalGeneration", "BlspKDOutput"]


class BlspKDForConditionalGeneration(PartsModel):
    """A frozen text LLM that reads speech through an adapter (arXiv 2405.19041).

    Build one from pretrained parts with :meth:`from_parts`, load a trained one with
    :meth:`from_pretrained`. The language model is frozen; with PLoRA it has extra capacity on
    speech positions alone, so its answers to text stay bit-identical.

    Args:
        config: the model's configuration.
        encoder: a loaded Whisper encoder.
        language_model: a loaded causal LM.
    """

    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    def __init__(
        self, config: BlspKDConfig, encoder: WhisperEncoder, language_model: PreTrainedModel
    ) -> None:
        super().__init__(config)
        self.speech_encoder = SpeechEncoder(encoder, full_window=config.full_window)
        self.language_model = language_model
        # before adapter and PLoRA: post_init would overwrite their initialisation
        self.post_init()
        check_head(language_model)
        encoder.requires_grad_(config.train_encoder)
        encoder.embed_positions.requires_grad_(False)
        language_model.requires_grad_(False)
        self.adapter = build_adapter(
            config,
            encoder_width=encoder.config.d_model,
            embedding_weight=self.embedding_weight(),
        )
        if config.plora is not None:
            apply_plora(language_model, PLoRAConfig.from_dict(config.plora))

    def train(self, mode: bool = True) -> BlspKDForConditionalGeneration:
        """Switch the trained parts to training mode; frozen parts never drop anything out."""
        super().train(mode)
        if not self.config.train_encoder:
            self.speech_encoder.eval()
        if self.config.plora is None:
            self.language_model.eval()
        return self

    # -- the parts ----------------------------------------------------------------------------

    def embedding_weight(self) -> Tensor:
        """(V, H), the language model's input embeddings."""
        embeddings: Any = self.language_model.get_input_embeddings()
        weight: Tensor = embeddings.weight
        return weight

    def head_weight(self) -> Tensor:
        """(V, H), the language model's head."""
        weight: Tensor = self.language_model.get_output_embeddings().weight
        return weight

    def encode(
        self, input_features: Tensor, feature_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the speech encoder: (B, M, F) and (B, F) to (B, T, D) and its (B, T) mask."""
        with nullcontext() if self.config.train_encoder else torch.no_grad():
            hidden, mask = self.speech_encoder(input_features, feature_attention_mask)
        return hidden, mask

    def embed_speech(
        self,
        *,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        target_lengths: Tensor | None = None,
        max_tokens: int | None = None,
    ) -> tuple[Tensor, AdapterOutput]:
        """Speech to what the language model reads.

        Give either mel features (B, M, F) or cached encoder outputs (B, T, D), each with its mask.

        Returns:
            (B, N, H) embeddings, and the adapter's output.
        """
        if encoder_hidden_states is None or encoder_attention_mask is None:
            if input_features is None or feature_attention_mask is None:
                raise ValueError(
                    "no speech: give input_features and feature_attention_mask, or "
                    "encoder_hidden_states and encoder_attention_mask"
                )
            encoder_hidden_states, encoder_attention_mask = self.encode(
                input_features, feature_attention_mask
            )
        adapter_dtype = next(self.adapter.parameters()).dtype
        out: AdapterOutput = self.adapter(
            encoder_hidden_states.to(adapter_dtype),
            encoder_attention_mask.bool(),
            target_lengths=target_lengths,
            max_tokens=max_tokens,
        )
        if self.config.speech_embedding == "direct":
            return out.hidden_states, out
        weight = self.embedding_weight()
        return soft_embeddings(out.hidden_states, weight, self.config.token_scale), out

    # -- training -----------------------------------------------------------------------------

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
        """
        attention_mask, speech_mask = attention_mask.bool(), speech_mask.bool()
        token_counts = speech_mask.sum(dim=1)
        aligned = self.config.adapter_type == "cformer"
        speech_embeds, adapter = self.embed_speech(
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            target_lengths=token_counts if aligned else None,
        )
        student = teacher = None
        weights = None if objective is None else objective.weights
        if weights is None or weights.reads_language_model:
            if weights is not None and not weights.reads_response:
                # nothing after the utterance is looked at: leave it out of both passes
                length = int(
                    (
                        speech_mask
                        * torch.arange(1, speech_mask.shape[1] + 1, device=speech_mask.device)
                    ).max()
                )
                input_ids, labels = input_ids[:, :length], labels[:, :length]
                attention_mask, speech_mask = attention_mask[:, :length], speech_mask[:, :length]
            text_embeds = self.language_model.get_input_embeddings()(input_ids)
            spliced = splice(
                text_embeds,
                attention_mask,
                speech_mask,
                speech_embeds,
                adapter.attention_mask,
                labels=labels,
                length=input_ids.shape[1] if aligned else None,
            )
            student = self._read(spliced, teacher=False)
            if weights is None or weights.input_kl > 0 or weights.response_kl > 0:
                text = Spliced(text_embeds, attention_mask, speech_mask, labels)
                teacher = self._read(text, teacher=True)
        output = BlspKDOutput(None, {}, adapter, adapter.hidden_states, student, teacher)
        if objective is None:
            return output
        sums = loss_sums(
            output,
            objective,
            token_ids=input_ids,
            speech_mask=speech_mask,
            embedding_weight=self.embedding_weight(),
            head_weight=self.head_weight(),
            token_scale=self.config.token_scale,
        )
        counts = num_items if num_items is not None else loss_items(speech_mask, labels)
        means = {name: value / counts[name].clamp(min=1) for name, value in sums.items()}
        output.losses = {name: value.detach() for name, value in means.items()}
        weighted = [getattr(objective.weights, name) * value for name, value in means.items()]
        output.loss = torch.stack(weighted).sum()
        return output

    def _read(self, spliced: Spliced, *, teacher: bool) -> Pass:
        """One pass through the language model's layers, without its head."""
        gradients = torch.no_grad() if teacher else nullcontext()
        with gradients, self._plora(None if teacher else spliced.speech_mask):
            hidden = self.language_model.get_decoder()(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask.long(),
                use_cache=False,
            ).last_hidden_state
        assert spliced.labels is not None
        return Pass(hidden, spliced.speech_mask, spliced.labels)

    # -- inference ----------------------------------------------------------------------------

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
        """
        speech_embeds, adapter = self.embed_speech(
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        spliced = splice(
            self.language_model.get_input_embeddings()(input_ids),
            attention_mask.bool(),
            speech_mask.bool(),
            speech_embeds,
            adapter.attention_mask,
            padding_side="left",
        )
        with self._plora(spliced.speech_mask):
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
        """
        with self._plora(None):
            tokens: Tensor = self._generate(
                input_ids=input_ids,
                attention_mask=attention_mask.long(),
                max_new_tokens=max_new_tokens,
                **generation_kwargs,
            )
        return tokens[:, input_ids.shape[1] :]

    def _plora(self, speech_mask: Tensor | None) -> AbstractContextManager[Any]:
        """PLoRA on these positions (B, S), or nowhere."""
        if self.config.plora is None:
            return nullcontext()
        if speech_mask is None:
            return plora_disabled(self.language_model)
        return plora_mask(speech_mask)

    def _generate(self, **options: Any) -> Tensor:
        language_model: Any = self.language_model
        tokens: Tensor = language_model.generate(**options)
        return tokens
