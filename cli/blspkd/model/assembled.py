"""The parts put together: encoder, adapter, language model with PLoRA.

Shapes: B batch, M mel bins, F mel frames, T encoder frames, N speech tokens, H embedding width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_disabled, plora_mask
from speech_adapters import AdapterOutput, CFormer

from .adapting import build_adapter, check_head, soft_embeddings, token_keys
from .configuration import BlspKDConfig
from .encoder import SpeechEncoder
from .hearing import hear
from .parts import Part, part_of
from .pretrained import PartsModel

LONGEST = 1 << 15
"""Positions of a sequence where a language model's configuration does not say how many it takes."""


class AssembledModel(PartsModel):
    """A speech encoder, an adapter and a frozen language model, and what each does with speech.

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
        self.register_buffer("spelling", None)
        if config.token_spelling:
            self.spelling = self.embedding_weight().new_zeros(
                (len(self.embedding_weight()), config.token_spelling), dtype=torch.bfloat16
            )
        if config.plora is not None:
            apply_plora(language_model, PLoRAConfig.from_dict(config.plora))
        # fixed now: what is frozen for a while still belongs to a checkpoint
        self.trainable = frozenset(n for n, p in self.named_parameters() if p.requires_grad)
        self.learning: frozenset[Part] = frozenset(part_of(name) for name in self.trainable)
        # what a checkpoint leaves out, so that Trainer doesn't warn of it when it resumes
        self._keys_to_ignore_on_save = set(self.state_dict()) - self.trained_names()

    def train(self, mode: bool = True) -> AssembledModel:
        """Switch the trained parts to training mode; frozen parts never drop anything out.

        Of the language model only PLoRA is trained: teacher and student read with the same one.
        """
        super().train(mode)
        if "encoder" not in self.learning:
            self.speech_encoder.eval()
        if "adapter" not in self.learning:
            self.adapter.eval()
        self.language_model.eval()
        if mode and "plora" in self.learning:
            _train_plora(self.language_model)
        return self

    def train_parts(self, parts: Collection[Part]) -> None:
        """Let only these of the trained parts learn from now on, and freeze the others.

        A checkpoint holds all of them nevertheless. Takes effect on dropout with the next
        :meth:`train`.

        Args:
            parts: some of "adapter", "plora" and "encoder"; one that this model does not train
                stays frozen.
        """
        learning = frozenset(parts) & {part_of(name) for name in self.trainable}
        if learning == self.learning:
            return
        self.learning = learning
        for name, parameter in self.named_parameters():
            if name in self.trainable:
                parameter.requires_grad_(part_of(name) in learning)
                if not parameter.requires_grad:
                    parameter.grad = None

    def embedding_weight(self) -> Tensor:
        """(V, H), the language model's input embeddings."""
        embeddings: Any = self.language_model.get_input_embeddings()
        weight: Tensor = embeddings.weight
        return weight

    def token_keys(self) -> Tensor:
        """(V, H + W), unit rows in the embeddings' dtype, that adapter outputs are compared with.

        W is ``config.token_spelling``: without it, these are the embeddings' directions.
        """
        weight = self.embedding_weight()
        return token_keys(weight, self.spelling).to(weight.dtype)

    def head_weight(self) -> Tensor:
        """(V, H), the language model's head."""
        weight: Tensor = self.language_model.get_output_embeddings().weight
        return weight

    def encode(
        self, input_features: Tensor, feature_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the speech encoder: (B, M, F) and (B, F) to (B, T, D) and its (B, T) mask."""
        with nullcontext() if "encoder" in self.learning else torch.no_grad():
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
        free_running: Tensor | None = None,
    ) -> AdapterOutput:
        """Speech to one vector per token; :meth:`readable` makes them the language model's.

        Give either mel features (B, M, F) or cached encoder outputs (B, T, D), each with its mask.
        ``free_running`` is for a :class:`CFormer`. ``config.length_search`` and
        ``config.logprob_threshold`` act where neither ``target_lengths`` nor ``max_tokens`` says
        how many tokens there are.
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
        encoder_hidden_states = encoder_hidden_states.to(next(self.adapter.parameters()).dtype)
        if self.config.finds_lengths and target_lengths is None and max_tokens is None:
            assert isinstance(self.adapter, CFormer)  # the configuration takes no other with it
            return hear(
                self.adapter,
                encoder_hidden_states,
                encoder_attention_mask.bool(),
                self.config,
                token_keys=self.token_keys(),
                read=self.text_log_probs,
            )
        free = {} if free_running is None else {"free_running": free_running}
        out: AdapterOutput = self.adapter(
            encoder_hidden_states,
            encoder_attention_mask.bool(),
            target_lengths=target_lengths,
            max_tokens=max_tokens,
            **free,
        )
        return out

    def readable(self, vectors: Tensor) -> Tensor:
        """What the language model reads in place of adapter outputs: (B, N, H + W) to (B, N, H)."""
        weight = self.embedding_weight()
        if self.config.speech_embedding == "direct":
            return vectors[..., : weight.shape[1]]
        return soft_embeddings(vectors, self.token_keys(), weight, self.config.token_scale)

    @torch.no_grad()
    def text_log_probs(self, token_ids: Tensor) -> Tensor:
        """How likely the language model finds each token of a text: ids (B, N) to (B, N), in nats.

        A token is judged after those before it, the first one after the token that begins a text;
        where the language model has no such token, the first one counts 0.
        """
        start = self.language_model.config.get_text_config().bos_token_id
        sequence = token_ids if start is None else F.pad(token_ids, (1, 0), value=start)
        if sequence.shape[1] < 2:
            return torch.zeros(token_ids.shape, device=token_ids.device)
        with self.plora_on(None):
            logits = self.language_model(input_ids=sequence[:, :-1], use_cache=False).logits
        log_probs = logits.float().log_softmax(dim=-1)
        judged = log_probs.gather(-1, sequence[:, 1:, None]).squeeze(-1)
        return F.pad(judged, (token_ids.shape[1] - judged.shape[1], 0))

    def plora_on(self, speech_mask: Tensor | None) -> AbstractContextManager[Any]:
        """PLoRA on these positions (B, S), or nowhere; on all of them with ``plain_lora``."""
        if self.config.plora is None:
            return nullcontext()
        if self.config.plain_lora:
            return self._lora_everywhere(teaching=speech_mask is None)
        if speech_mask is None:
            return plora_disabled(self.language_model)
        return plora_mask(speech_mask)

    def untouched(self) -> AbstractContextManager[Any]:
        """The language model as it was before any training, whatever else is asked for inside."""
        if self.config.plora is None:
            return nullcontext()
        return plora_disabled(self.language_model)

    @contextmanager
    def _lora_everywhere(self, *, teaching: bool) -> Iterator[None]:
        """Every position adapted, generated ones too; a teacher drops nothing out."""
        text_config = self.language_model.config.get_text_config()
        length = getattr(text_config, "max_position_embeddings", None) or LONGEST
        learning = self.training and "plora" in self.learning
        if teaching:
            self.language_model.eval()
        try:
            with plora_mask(torch.ones(1, length, dtype=torch.bool)):
                yield
        finally:
            if learning:
                _train_plora(self.language_model)


def _train_plora(language_model: PreTrainedModel) -> None:
    """Switch PLoRA to training mode, and what must be for it; not the layers around it.

    The whole, its decoder and what recomputes activations are asked whether they train, so they
    say yes, each for itself. Some of them also drop out by a rate of their own or of their
    configuration (OPT, Falcon): that becomes 0, for good, as the language model is frozen.
    """
    asked = (language_model, language_model.get_decoder())
    for module in language_model.modules():
        if isinstance(module, PLoRALinear):
            module.training = True
        elif module in asked or getattr(module, "gradient_checkpointing", False):
            module.training = True
            for holder in (module, getattr(module, "config", None)):
                _drop_nothing(holder)


def _drop_nothing(holder: Any) -> None:
    """Set the rates of dropout that are plain numbers to 0, whatever they are called."""
    for name, value in list(vars(holder).items() if holder is not None else ()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)
