"""The speech LLM: encoder, adapter, language model with PLoRA; teacher and student in one.

Shapes: B batch, M mel bins, F mel frames, T encoder frames, L text length, N speech tokens,
H embedding width, V vocabulary.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plora import PLoRAConfig, apply_plora, plora_disabled, plora_mask
from speech_adapters import (
    AdapterOutput,
    CFormer,
    CFormerConfig,
    ConvSubsampler,
    ConvSubsamplerConfig,
)

from . import objective
from .bases import fingerprint, load_encoder, load_language_model
from .configuration import BlspKDConfig
from .encoder import SpeechEncoder
from .objective import LossWeights, Pass, loss_items
from .splice import Spliced, splice

WEIGHTS_NAME = "model.safetensors"


@dataclass
class BlspKDOutput:
    """What a training or evaluation pass yields.

    Attributes:
        loss: scalar, the weighted sum of ``losses``; None without loss weights.
        losses: each active loss, averaged over its items, detached.
        adapter: what the adapter made of the speech.
        speech_vectors: (B, N, H), the adapter's outputs before any soft embedding.
        student: the pass that read speech; None if no active loss needs it.
        teacher: the pass that read text, without gradients; None likewise.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    adapter: AdapterOutput
    speech_vectors: Tensor
    student: Pass | None
    teacher: Pass | None


class BlspKDForConditionalGeneration(PreTrainedModel):
    """A frozen text LLM that reads speech through an adapter (arXiv 2405.19041).

    Build one from pretrained parts with :meth:`from_parts`, load a trained one with
    :meth:`from_pretrained`. The language model is frozen; with PLoRA it has extra capacity on
    speech positions alone, so its answers to text stay bit-identical.

    Args:
        config: the model's configuration.
        encoder: a loaded Whisper encoder.
        language_model: a loaded causal LM.
    """

    config_class = BlspKDConfig
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
        self._check_head()
        encoder.requires_grad_(config.train_encoder)
        encoder.embed_positions.requires_grad_(False)
        language_model.requires_grad_(False)
        self.adapter = self._build_adapter()
        if config.plora is not None:
            apply_plora(language_model, PLoRAConfig.from_dict(config.plora))

    @classmethod
    def from_parts(
        cls,
        config: BlspKDConfig,
        *,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> BlspKDForConditionalGeneration:
        """Load the two pretrained parts that ``config`` names; adapter and PLoRA start fresh.

        The parts' fingerprints are written into ``config``; if it has them already, they must
        agree.

        Args:
            config: names the parts.
            dtype: of the frozen parts. Adapter, PLoRA and a trained encoder are float32.
            trust_remote_code: run code that the language model's checkpoint brings along.
        """
        encoder = load_encoder(
            config.encoder, dtype=torch.float32 if config.train_encoder else dtype
        )
        language_model = load_language_model(
            config.language_model, dtype=dtype, trust_remote_code=trust_remote_code
        )
        for part, module, name in (
            ("encoder", encoder, config.encoder),
            ("language_model", language_model, config.language_model),
        ):
            found = fingerprint(module)
            expected = getattr(config, f"{part}_fingerprint")
            if expected is not None and expected != found:
                raise ValueError(
                    f"this checkpoint was trained on another {part}: expected weights {expected}, "
                    f"{name!r} has {found}; give the path of the right one"
                )
            setattr(config, f"{part}_fingerprint", found)
        return cls(config, encoder, language_model)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # fewer options: the parts load themselves
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        encoder: str | None = None,
        language_model: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> BlspKDForConditionalGeneration:
        """Load a trained model: its parts from where they came from, the rest from the folder.

        Args:
            pretrained_model_name_or_path: a folder that :meth:`save_pretrained` wrote.
            encoder: where the encoder is now, if it moved.
            language_model: where the language model is now, if it moved.
            dtype: of the frozen parts.
            trust_remote_code: see :meth:`from_parts`.

        Raises:
            ValueError: if a part is not the one the model was trained on, or the folder's weights
                are not exactly the trained ones.
        """
        folder = Path(pretrained_model_name_or_path)
        weights = folder / WEIGHTS_NAME
        if not weights.is_file():
            raise ValueError(f"{folder} is no trained BLSP-KD model: it has no {WEIGHTS_NAME}")
        config = BlspKDConfig.from_pretrained(str(folder))
        config.encoder = encoder or config.encoder
        config.language_model = language_model or config.language_model
        with safe_open(weights, framework="pt") as archive:
            stored = set(archive.keys())
        model = cls.from_parts(config, dtype=dtype, trust_remote_code=trust_remote_code)
        expected = model.trained_names()
        if stored != expected:
            missing, unknown = sorted(expected - stored), sorted(stored - expected)
            raise ValueError(
                f"{weights} does not fit its config.json: {len(missing)} weights are missing "
                f"({', '.join(missing[:2])}), {len(unknown)} unknown ({', '.join(unknown[:2])})"
            )
        model.load_state_dict(load_file(weights), strict=False)
        model.eval()
        return model

    def trained_names(self) -> set[str]:
        """Names of the parameters that belong to a checkpoint: all that are trained."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save_pretrained(  # type: ignore[override]  # the rest goes through **kwargs
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config.json and the trained weights alone; the parts stay where they are.

        Args:
            save_directory: the folder, made if need be.
            is_main_process: whether this process is the one that writes.
            state_dict: the weights, if something else gathered them (FSDP, DeepSpeed).
            **kwargs: as :meth:`transformers.PreTrainedModel.save_pretrained`.
        """
        everything = self.state_dict() if state_dict is None else state_dict
        trained = {name: everything[name] for name in sorted(self.trained_names())}
        super().save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=trained, **kwargs
        )

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
        scores = F.linear(
            F.normalize(out.hidden_states.float(), dim=-1).to(weight.dtype),
            F.normalize(weight.float(), dim=-1).to(weight.dtype),
        )
        share = (scores.float() * self.config.token_scale).softmax(dim=-1)
        return share.to(weight.dtype) @ weight, out

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
        loss_weights: LossWeights | None = None,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
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
            loss_weights: which losses; None computes no loss but both passes.
            temperature: of both distributions in the KL losses.
            scale_by_temperature_squared: multiply the KL losses by temperature squared.
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
        if loss_weights is None or loss_weights.reads_language_model:
            if loss_weights is not None and not loss_weights.reads_response:
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
            if loss_weights is None or loss_weights.input_kl > 0 or loss_weights.response_kl > 0:
                text = Spliced(text_embeds, attention_mask, speech_mask, labels)
                teacher = self._read(text, teacher=True)
        output = BlspKDOutput(None, {}, adapter, adapter.hidden_states, student, teacher)
        if loss_weights is None:
            return output
        sums = self._loss_sums(
            output, loss_weights, input_ids, speech_mask, temperature, scale_by_temperature_squared
        )
        counts = num_items if num_items is not None else loss_items(speech_mask, labels)
        means = {name: value / counts[name].clamp(min=1) for name, value in sums.items()}
        output.losses = {name: value.detach() for name, value in means.items()}
        weighted = [getattr(loss_weights, name) * value for name, value in means.items()]
        output.loss = torch.stack(weighted).sum()
        return output

    def _read(self, spliced: Spliced, *, teacher: bool) -> Pass:
        """One pass through the language model's layers, without its head."""
        mode: AbstractContextManager[Any] = nullcontext()
        if self.config.plora is not None:
            mode = (
                plora_disabled(self.language_model) if teacher else plora_mask(spliced.speech_mask)
            )
        gradients = torch.no_grad() if teacher else nullcontext()
        with gradients, mode:
            hidden = self.language_model.get_decoder()(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask.long(),
                use_cache=False,
            ).last_hidden_state
        assert spliced.labels is not None
        return Pass(hidden, spliced.speech_mask, spliced.labels)

    def _loss_sums(
        self,
        output: BlspKDOutput,
        weights: LossWeights,
        input_ids: Tensor,
        speech_mask: Tensor,
        temperature: float,
        scale_by_temperature_squared: bool,
    ) -> dict[str, Tensor]:
        """Each active loss, summed over its items."""
        adapter, student, teacher = output.adapter, output.student, output.teacher
        sums: dict[str, Tensor] = {}
        if (weights.token > 0 or weights.input_kl > 0) and adapter.alpha_sum is None:
            raise ValueError(
                "the token and input_kl losses need one speech embedding per text token, which "
                f"adapter_type={self.config.adapter_type!r} does not give: set their weights to 0"
            )
        if weights.token > 0:
            sums["token"] = objective.token_loss(
                output.speech_vectors[adapter.attention_mask],
                input_ids[speech_mask],
                self.embedding_weight(),
                self.config.token_scale,
            )
        head = self.head_weight()
        for name, on in (("input_kl", "input"), ("response_kl", "response")):
            if getattr(weights, name) > 0:
                assert student is not None
                assert teacher is not None
                sums[name] = objective.kl_loss(
                    student,
                    teacher,
                    head,
                    on=on,
                    temperature=temperature,
                    scale_by_temperature_squared=scale_by_temperature_squared,
                )
        if weights.response_ce > 0:
            assert student is not None
            sums["response_ce"] = objective.response_ce_loss(student, head)
        if weights.quantity > 0 and adapter.alpha_sum is not None:
            sums["quantity"] = objective.quantity_loss(adapter.alpha_sum, speech_mask.sum(dim=1))
        return sums

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
        mode: AbstractContextManager[Any] = nullcontext()
        if self.config.plora is not None:
            mode = plora_mask(spliced.speech_mask)
        with mode:
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
        mode: AbstractContextManager[Any] = nullcontext()
        if self.config.plora is not None:
            mode = plora_disabled(self.language_model)
        with mode:
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

    # -- construction -------------------------------------------------------------------------

    def _build_adapter(self) -> CFormer | ConvSubsampler:
        """A fresh adapter between the two parts' widths."""
        sizes: dict[str, Any] = {
            "input_size": self.speech_encoder.encoder.config.d_model,
            "output_size": self.embedding_weight().shape[1],
            "output_rms": float(self.embedding_weight().float().pow(2).mean().sqrt()),
        }
        options = {**sizes, **self.config.adapter}
        for name in ("input_size", "output_size"):
            if options[name] != sizes[name]:
                raise ValueError(
                    f"adapter.{name} is {options[name]}, the pretrained part has {sizes[name]}: "
                    "leave it out"
                )
        kinds: dict[str, tuple[Any, Any]] = {
            "cformer": (CFormer, CFormerConfig),
            "conv": (ConvSubsampler, ConvSubsamplerConfig),
        }
        module, config = kinds[self.config.adapter_type]
        try:
            adapter: CFormer | ConvSubsampler = module(config(**options))
        except TypeError as error:
            raise ValueError(f"adapter: {error}; see {config.__name__}") from error
        return adapter

    def _check_head(self) -> None:
        """Refuse heads that are more than a matrix: the fused losses would be wrong, silently."""
        config = self.language_model.config
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            value = getattr(config, name, None)
            if value not in (None, 0, 1, 1.0):
                raise ValueError(
                    f"language models with {name}={value} are not supported: the losses read the "
                    "head as a plain matrix"
                )
        if getattr(self.language_model.get_output_embeddings(), "bias", None) is not None:
            raise ValueError("language models with a bias in their head are not supported")
