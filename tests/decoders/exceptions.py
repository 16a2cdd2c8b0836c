"""What the rules of ``shrink`` cannot guess, by model type: arguments that win, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Special:
    """Arguments of the small configuration that win over the rules, with the reason for them.

    Args:
        reason: Why there are any.
        changes: The arguments; those of a nested configuration in a mapping.
        part: Name of the nested configuration that the class is made from.
    """

    reason: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    part: str | None = None


_NO_DEFAULT = "the default configuration leaves sizes None that the model needs"
_ATTENTION = "no layer of the default's first few, or none at all, is an attention layer"
_NOTE = "the width of a head is that of its rotated and its other part"
_MUSICGEN = "the class is made from the decoder's part of the configuration"
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 32,
    "indexer_compress_ratio": 2,
}

SPECIAL: dict[str, Special] = {
    "bamba": Special(_ATTENTION, {"attn_layer_indices": [1]}),
    "blt": Special(
        "hash tables have a size of their own; its cache asks for a field that it lacks",
        {
            "encoder_hash_byte_group_vocab": 64,
            "use_cache": False,
            "encoder_hash_byte_group_size": [3, 4],
            "vocab_size": 260,
            "patcher_config": {"vocab_size": 260},
            "encoder_config": {"vocab_size": 260},
            "decoder_config": {"vocab_size": 260},
        },
    ),
    "cohere_compass_text": Special(
        _NO_DEFAULT,
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": _ROTARY},
        },
    ),
    "dbrx": Special(
        "the default of its attention has no rope_theta, which the model reads",
        {
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
        },
    ),
    "deepseek_v2": Special(_NO_DEFAULT, {"num_experts_per_tok": 2}),
    "dots1": Special(
        _NO_DEFAULT,
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "dots3_note": Special(
        _NOTE,
        {
            "text_config": {"head_dim": 16},
            "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        },
    ),
    "dots3_note_text": Special(_NOTE, {"head_dim": 16}),
    "gemma3n_text": Special(
        "layers that share keys and values come after one of each kind that has its own",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "granitemoehybrid": Special(
        _ATTENTION, {"layer_types": ["linear_attention", "full_attention"]}
    ),
    "hunyuan_v1_dense": Special(_NO_DEFAULT, {"head_dim": 8}),
    "hunyuan_v1_moe": Special(_NO_DEFAULT, {"head_dim": 8}),
    "jamba": Special(_ATTENTION, {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "lfm2_moe": Special(_NO_DEFAULT, {"layer_types": ["conv", "full_attention"]}),
    "mamba2": Special("its heads together are twice as wide as the hidden size", {"num_heads": 8}),
    "ministral": Special(_NO_DEFAULT, {"head_dim": 8}),
    "musicgen": Special(_MUSICGEN, part="decoder"),
    "musicgen_melody": Special(_MUSICGEN, part="decoder"),
    "nemotron": Special(_NO_DEFAULT, {"head_dim": 8, "num_key_value_heads": 2}),
    "qwen4_exp": Special(_NO_DEFAULT, {"text_config": _INDEXER}),
    "qwen4_exp_text": Special(_NO_DEFAULT, _INDEXER),
    "recurrent_gemma": Special(_ATTENTION, {"num_hidden_layers": 3}),
    "reformer": Special(
        "axial positions take one length only in training; layers come as a list of kinds",
        {
            "axial_pos_embds": False,
            "attn_layers": ["local", "lsh"],
            "num_hidden_layers": 2,
            "hash_seed": 0,
            "num_buckets": 2,
        },
    ),
    "xlstm": Special(
        "its widths are rounded up to multiples of 64", {"hidden_size": 128, "embedding_dim": 128}
    ),
    "xmod": Special(
        "it runs in one language, which the default does not choose", {"default_language": "en_XX"}
    ),
    "zamba": Special(
        _ATTENTION,
        {
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_hidden_layers": 3,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    "zamba2": Special(
        "the widths of its heads follow from the hidden size",
        {"mamba_headdim": 32, "attention_head_dim": 16, "attention_hidden_size": 64},
    ),
}
