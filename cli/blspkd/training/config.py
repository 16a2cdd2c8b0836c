"""The training configuration: every setting of a run, and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from blspkd.data.augment_config import AugmentConfig
from blspkd.model.configuration import DEFAULT_PROMPT, AdapterType, SpeechEmbedding
from blspkd.model.objective import LayerDistance

from .windows import FractionSection, LossSection, TrainedSection


def _at_least(section: Any, **least: float) -> None:
    """Refuse numbers below their least; a field that is None has none."""
    for name, bound in least.items():
        value = getattr(section, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}: expected at least {bound:g}, got {value:g}")


def _above_zero(section: Any, *names: str) -> None:
    """Refuse numbers that are not above 0."""
    for name in names:
        value = getattr(section, name)
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value:g}")


@dataclass(frozen=True)
class ModelSection:
    """What is trained on what; see :class:`blspkd.model.configuration.BlspKDConfig`.

    Attributes:
        encoder: path or hub id of a Whisper model.
        language_model: path or hub id of a causal LM.
        dtype: of the frozen parts; what is trained is float32.
        adapter_type: "cformer" or "conv".
        adapter: fields of the adapter's configuration.
        plora: fields of PLoRAConfig; null for a bare language model.
        plain_lora: let PLoRA act on text too, for teacher and student: ordinary LoRA, the contrast.
        train_encoder: train the speech encoder too.
        full_window: encode 30 s of padding with each clip.
        speech_embedding: "direct" (the paper) or "soft".
        token_scale: factor on cosines, for the soft embedding and the token loss.
        token_spelling: width of the spelling code beside each token's embedding there; 0 for none.
        length_search: weight, against the predicted length, of how much the outputs look like
            tokens, where the length is not given; 0 takes the predicted length.
        length_search_lm_weight: how much the language model has a say in that; 0 for none.
        logprob_threshold: below which mean log-probability of its tokens a clip is taken for no
            speech, where the length is not given; null never.
        prompt: what the user turn says around ``{speech}``.
        trust_remote_code: run code that a checkpoint brings along.
        start_from: folder of a trained model whose weights this run begins with, instead of fresh
            ones; what it lacks (PLoRA, say) starts fresh.
    """

    encoder: str = ""
    language_model: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    adapter_type: AdapterType = "cformer"
    adapter: dict[str, Any] = field(default_factory=dict)
    plora: dict[str, Any] | None = field(default_factory=dict)
    plain_lora: bool = False
    train_encoder: bool = False
    full_window: bool = False
    speech_embedding: SpeechEmbedding = "direct"
    token_scale: float = 30.0
    token_spelling: int = 0
    length_search: float = 0.0
    length_search_lm_weight: float = 0.0
    logprob_threshold: float | None = None
    prompt: str = DEFAULT_PROMPT
    trust_remote_code: bool = False
    start_from: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _above_zero(self, "token_scale")
        _at_least(self, token_spelling=0, length_search=0, length_search_lm_weight=0)


@dataclass(frozen=True)
class DataSection:
    """What is read.

    Attributes:
        train: a manifest.
        responses: a manifest that `blspkd respond` wrote for some of the training clips; its
            responses are joined to them by id.
        eval: manifests of held-out clips, by name; never trained on.
        max_duration: seconds; longer clips are dropped and counted.
        max_text_tokens: of prompt, transcript and response; longer ones are dropped and counted.
        limit: use only the first so many training clips.
        eval_limit: use only the first so many clips of each held-out set.
        cache_features: compute the frozen encoder's outputs once, and keep them.
        cache_dir: where; by default inside the run's folder.
        augment: what is done to the training clips; see :class:`AugmentConfig`.
    """

    train: str = ""
    responses: str | None = None
    eval: dict[str, str] = field(default_factory=dict)
    max_duration: float = 30.0
    max_text_tokens: int = 384
    limit: int | None = None
    eval_limit: int | None = None
    cache_features: bool = False
    cache_dir: str | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and masks in frequency where there are no frequencies."""
        _above_zero(self, "max_duration")
        _at_least(self, max_text_tokens=1, limit=1, eval_limit=1)
        if self.cache_features and self.augment.masks.frequency:
            raise ValueError(
                "augment.masks.frequency masks mel features, which are not there with "
                "cache_features: set it to 0, or cache_features=false"
            )


@dataclass(frozen=True)
class LossesSection:
    """The objective; see :class:`blspkd.model.objective.LossWeights` for what each loss is.

    Attributes:
        token: cross entropy of each speech token against its text token.
        input_kl: KL after each token of the utterance.
        response_kl: KL over the response.
        response_ce: cross entropy of the response.
        layer_hidden: distance of the hidden states after ``layer``, at each token of the utterance.
        layer_kl: KL after each token of the utterance, read by the head from ``layer``. Where
            no other loss of the language model counts, no layer after ``layer`` is run.
        quantity: CIF's token count.
        alignment: CIF's weight in each token's stretch of the clip, by the alignment that the
            encoder's own Whisper decoder gives; needs data.cache_features.
        temperature: of both distributions in the KL losses (2 in the authors' code).
        scale_by_temperature_squared: multiply the KL losses by the temperature squared.
        layer: of the language model, from 1, which layer_hidden and layer_kl look at.
        layer_distance: of layer_hidden: "cosine" or "mse".
        predicted_length: fraction of the clips with a response that CIF cuts at its predicted
            length, as in inference, instead of at the text's, while a response loss counts. The
            losses that pair speech with text tokens leave these clips out.
    """

    token: LossSection = field(default_factory=LossSection)
    input_kl: LossSection = field(default_factory=lambda: LossSection(weight=1.0))
    response_kl: LossSection = field(default_factory=lambda: LossSection(weight=1.0))
    response_ce: LossSection = field(default_factory=LossSection)
    layer_hidden: LossSection = field(default_factory=LossSection)
    layer_kl: LossSection = field(default_factory=LossSection)
    quantity: LossSection = field(default_factory=lambda: LossSection(weight=1.0))
    alignment: LossSection = field(default_factory=LossSection)
    temperature: float = 2.0
    scale_by_temperature_squared: bool = False
    layer: int = 1
    layer_distance: LayerDistance = "cosine"
    predicted_length: FractionSection = field(default_factory=FractionSection)

    def __post_init__(self) -> None:
        """Refuse numbers out of range; how many layers there are, the language model knows."""
        _above_zero(self, "temperature")
        if self.layer < 1:
            raise ValueError(f"layer must be 1 for the first layer, or more, got {self.layer}")


@dataclass(frozen=True)
class OptimSection:
    """How it is optimised: AdamW; the defaults are the authors'.

    Attributes:
        learning_rate: at its peak.
        plora_learning_rate: of PLoRA's matrices; the same when null.
        encoder_learning_rate: of the speech encoder, where it is trained; the same when null.
        trained: the stretch of the run in which each part is trained.
        warmup_steps: linear.
        schedule: after the warm-up.
        weight_decay: on matrices; never on norms and biases.
        max_grad_norm: clips the gradient.
        epochs: passes over the data, unless max_steps is given.
        max_steps: optimiser steps.
        batch_size: clips per device and micro-batch.
        gradient_accumulation: micro-batches per step.
        bf16: autocast to bfloat16.
        gradient_checkpointing: recompute activations in the backward pass.
        share_prompt: read what the prompts of a batch have in common once, for all its clips and
            both passes; not together with gradient_checkpointing.
        average_with_start: how much of the weights that the run began with (model.start_from) is in
            those that it leaves, 0 for none: keeps what they were good at (WiSE-FT, arXiv
            2109.01903, section 3). Checkpoints hold the weights as trained.
    """

    learning_rate: float = 1e-4
    plora_learning_rate: float | None = None
    encoder_learning_rate: float | None = None
    trained: TrainedSection = field(default_factory=TrainedSection)
    warmup_steps: int = 1000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    share_prompt: bool = True
    average_with_start: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        rates = {"learning_rate": 0, "plora_learning_rate": 0, "encoder_learning_rate": 0}
        _at_least(self, **rates, warmup_steps=0, weight_decay=0, max_grad_norm=0)
        _at_least(self, max_steps=1, batch_size=1, gradient_accumulation=1)
        _above_zero(self, "epochs")
        if not 0.0 <= self.average_with_start < 1.0:
            raise ValueError(
                f"average_with_start must be at least 0 and below 1, got {self.average_with_start}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything about one run.

    Attributes:
        name: of the run; its folder is runs/NAME unless output says otherwise.
        output: the run's folder.
        seed: of initialisation, order and dropout.
        log_steps: steps between log lines.
        eval_steps: steps between looks at the held-out clips; null for start and end alone.
        save_steps: steps between checkpoints; null for the end alone.
        keep_checkpoints: how many to keep.
        answer_limit: how many held-out clips are answered, from text and from speech, at the
            start and at the end; 0 for none.
        num_workers: processes that read clips.
        tensorboard: write TensorBoard events.
        model: what is trained on what.
        data: what is read.
        losses: the objective.
        optim: how it is optimised.
        trainer: further fields of transformers.TrainingArguments (deepspeed, fsdp, ...).
    """

    name: str = "run"
    output: str | None = None
    seed: int = 0
    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    keep_checkpoints: int = 2
    answer_limit: int = 0
    num_workers: int = 0
    tensorboard: bool = False
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    losses: LossesSection = field(default_factory=LossesSection)
    optim: OptimSection = field(default_factory=OptimSection)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and to average with weights that there are none of."""
        _at_least(self, seed=0, log_steps=1, eval_steps=1, save_steps=1, keep_checkpoints=1)
        _at_least(self, answer_limit=0, num_workers=0)
        if self.optim.average_with_start and self.model.start_from is None:
            raise ValueError(
                "optim.average_with_start takes the weights of model.start_from, which is null: "
                "name a run there, or leave it 0"
            )
