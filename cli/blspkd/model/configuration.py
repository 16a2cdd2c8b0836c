"""What makes a BLSP-KD model: its two pretrained parts, its adapter, its PLoRA."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

AdapterType = Literal["cformer", "conv"]
SpeechEmbedding = Literal["direct", "soft"]
DEFAULT_PROMPT = "Continue the following sentence in a coherent style: {speech}"


class BlspKDConfig(PreTrainedConfig):
    """Configuration of :class:`BlspKDForConditionalGeneration`.

    Args:
        encoder: path or hub id of a Whisper model, or ``blspkd:tiny/encoder`` for the built-in one.
        language_model: path or hub id of a causal LM, or ``blspkd:tiny/llm``.
        encoder_fingerprint: identifies the encoder's weights; written when the model is built and
            checked when it is loaded. See :func:`blspkd.model.bases.fingerprint`.
        language_model_fingerprint: likewise.
        adapter_type: "cformer" (the paper's) or "conv" (its baseline).
        adapter: fields of :class:`speech_adapters.CFormerConfig` or
            :class:`speech_adapters.ConvSubsamplerConfig`; sizes follow from the parts.
        plora: fields of :class:`plora.PLoRAConfig`; None leaves the language model bare.
        plain_lora: PLoRA's matrices act on every position, text and answers too, for the teacher as
            for the student: ordinary LoRA, the contrast. The teacher drifts while it teaches, and
            answers to text are no longer the untouched language model's.
        train_encoder: the encoder is trained too, and therefore belongs to the checkpoint.
        full_window: encode 30 s of padding with each clip, as Whisper was trained; by default only
            the real frames are encoded.
        speech_embedding: "direct": the adapter's outputs are what the language model reads (the
            paper). "soft": they are scores over the vocabulary, and the language model reads the
            mean of its own embeddings under their softmax.
        token_scale: factor on the cosine between an adapter output and a token's key, for the
            soft embedding and the token loss.
        token_spelling: width of the spelling code that stands beside each token's embedding in its
            key, and in the adapter's outputs; 0 for none. See
            :func:`blspkd.model.spelling.spelling_codes`.
        length_search: where the number of tokens is not given, try lengths around the predicted one
            and take the one whose outputs look most like tokens; the weight of that in
            :func:`speech_adapters.search_length`. 0 takes the predicted length.
        length_search_lm_weight: outputs look like tokens by their own log-probability and, with
            this factor, by that of the language model, which reads their likeliest tokens as text;
            0 leaves it unasked.
        logprob_threshold: where the number of tokens is not given, a clip whose outputs' likeliest
            tokens have a lower mean log-probability is taken for no speech and gives no tokens;
            None hears something in every sound.
        prompt: what the user turn says; ``{speech}`` stands where the speech goes.
    """

    model_type = "blspkd"

    def __init__(
        self,
        encoder: str = "",
        language_model: str = "",
        *,
        encoder_fingerprint: str | None = None,
        language_model_fingerprint: str | None = None,
        adapter_type: AdapterType = "cformer",
        adapter: dict[str, Any] | None = None,
        plora: dict[str, Any] | None = None,
        plain_lora: bool = False,
        train_encoder: bool = False,
        full_window: bool = False,
        speech_embedding: SpeechEmbedding = "direct",
        token_scale: float = 30.0,
        token_spelling: int = 0,
        length_search: float = 0.0,
        length_search_lm_weight: float = 0.0,
        logprob_threshold: float | None = None,
        prompt: str = DEFAULT_PROMPT,
        **kwargs: Any,
    ) -> None:
        for name, value, allowed in (
            ("adapter_type", adapter_type, get_args(AdapterType)),
            ("speech_embedding", speech_embedding, get_args(SpeechEmbedding)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if prompt.count("{speech}") != 1:
            raise ValueError(f"prompt must contain {{speech}} exactly once, got {prompt!r}")
        if plain_lora and plora is None:
            raise ValueError("plain_lora says where plora acts: give plora's options, not null")
        if token_scale <= 0:
            raise ValueError(f"token_scale must be positive, got {token_scale}")
        if token_spelling < 0:
            raise ValueError(f"token_spelling must be 0 or more, got {token_spelling}")
        for name, weight in (
            ("length_search", length_search),
            ("length_search_lm_weight", length_search_lm_weight),
        ):
            if weight < 0:
                raise ValueError(f"{name} must be 0 or more, got {weight}")
        if length_search_lm_weight and not length_search:
            raise ValueError(
                "length_search_lm_weight says how length_search scores a length: give "
                "length_search too"
            )
        if logprob_threshold is not None and logprob_threshold >= 0:
            raise ValueError(f"logprob_threshold must be below 0 or null, got {logprob_threshold}")
        for name, used, unused in (
            ("token_spelling", token_spelling > 0, "0"),
            ("length_search", length_search > 0, "0"),
            ("logprob_threshold", logprob_threshold is not None, "null"),
        ):
            if used and adapter_type != "cformer":
                raise ValueError(
                    f"{name} needs an adapter that makes one output per text token: set it to "
                    f"{unused}, or adapter_type to cformer"
                )
        self.encoder = encoder
        self.language_model = language_model
        self.encoder_fingerprint = encoder_fingerprint
        self.language_model_fingerprint = language_model_fingerprint
        self.adapter_type = adapter_type
        self.adapter = dict(adapter or {})
        self.plora = None if plora is None else dict(plora)
        self.plain_lora = plain_lora
        self.train_encoder = train_encoder
        self.full_window = full_window
        self.speech_embedding = speech_embedding
        self.token_scale = token_scale
        self.token_spelling = token_spelling
        self.length_search = length_search
        self.length_search_lm_weight = length_search_lm_weight
        self.logprob_threshold = logprob_threshold
        self.prompt = prompt
        super().__init__(**kwargs)

    @property
    def finds_lengths(self) -> bool:
        """Whether the number of tokens is more than the rounded sum of CIF's weights."""
        return bool(self.length_search) or self.logprob_threshold is not None
