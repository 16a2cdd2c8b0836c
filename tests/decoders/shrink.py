"""The smallest random model of any class: its configuration, with every size made small.

A rule goes by a field's name and knows nothing of the model. What that cannot guess stands, with
its reason, in ``exceptions``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# The first pattern that is the whole name of a field decides. Sizes only become smaller, and a
# field without a number stays as it is, so that what is off or derived by default stays so.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", 64),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|swa_num_key_value_heads", 2),
    (r"linear_num_key_heads|index_n_heads|num_codebooks|n_mamba_heads", 2),
    (r"n_heads?|num_heads|.*attention_heads|linear_num_heads|linear_num_value_heads", 4),
    (r"mamba_n(um)?_heads", 8),
    (r"num_hidden_layers|n_layers?|num_layers|.*coder_layers", 2),
    (r"conf_num_hidden_layers|depth|num_global_layers|num_lstm_layers", 1),
    (r"(num|n|moe_num)_(local_|routed_)?experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|zero_expert_num", 2),
    (r"n_group|topk_group|num_expert_group|(mamba_)?n_?groups", 1),
    (r"first_k_dense_replace|num_dense_layers|(n|num|moe_num)_shared_experts", 1),
    (r"qk_head_dim", 16),
    (
        r".*head_?dim|kv_channels|d_head|dim_head|d_kv|attention_head_size|mamba_d_head|rotary_dim",
        8,
    ),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*_rank", 16),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|dim_ff|dff|feed_forward_size|n_inner", 48),
    (r"d_ff|mlp_dim", 48),
    (r".*hidden_size.*|d_model|n_embd|.*embedding_size|emb_dim|embedding_dim|hidden_dim", 32),
    (r"lru_width|d_inner|mamba_d_ssm|word_embed_proj_dim|.*embed_dim", 32),
    (r"d_rel|mamba_d_state|ssm_state_size|state_size|prompt_mid_dim", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 64),
    (r"max_(target|source)_positions|rel_extent", 64),
    (r"attention_chunk_size", 8),
    (r"sliding_window(_size)?|(attention_)?window_size|local_attention|.*chunk_size", 4),
    # all keys of a short sequence: which of several equal scores are the largest, rounding decides
    (r"index_topk", 32),
)
# A test compares runs, so nothing is drawn at random in any of them.
RANDOM = r".*dropout.*|.*_pdrop|.*layerdrop.*|.*jitter.*"
# Large enough that logits differ clearly
SCALES = r"initializer_range|init_std|embed_init_std"
SCALE = 0.2
# Padding, which takes part in nothing, is one more token, and generation never ends early.
ALWAYS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "is_decoder": True}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def shrunk(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make a small configuration out of one of the sizes a class has by default.

    Args:
        values: What ``to_dict`` of the default configuration gives.
        changes: Arguments that win over the rules; for a nested configuration, a mapping of them.
    """
    depth, kept = _kept_layers(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            inner = changes.get(name, {})
            small[name] = None if inner is None else {**value, **shrunk(value, inner)}
        elif name in changes:
            small[name] = changes[name]
        elif name in ALWAYS:
            small[name] = ALWAYS[name]
        elif name == "per_layer_config":
            small[name] = {
                kept.index(int(layer)): _consistent(
                    fields, {field: _small(field, v) for field, v in fields.items()}
                )
                for layer, fields in value.items()
                if int(layer) in kept
            }
        elif kept and _is_per_layer(value, depth):
            small[name] = [value[layer] for layer in kept]
        elif name in DEPTHS and kept:
            small[name] = len(kept)
        elif (new := _small(name, value)) != value:
            small[name] = new
    nested = {name for name, value in changes.items() if isinstance(value, Mapping)} & small.keys()
    return _consistent(values, small) | {k: v for k, v in changes.items() if k not in nested}


def _consistent(values: Mapping[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """`small`, with as many key-value heads as heads where it was so in `values`."""
    heads, shared = "num_attention_heads", "num_key_value_heads"
    if shared in small and heads in small and values.get(shared) == values.get(heads):
        small[shared] = small[heads]
    return small


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if re.fullmatch(RANDOM, name):
        return type(value)(0)
    if re.fullmatch(SCALES, name):
        return SCALE
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name) and isinstance(value, int):
            return min(size, value)
    return value


def _kept_layers(values: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """Number of layers, and which to keep: the first of each kind, where lists tell the kinds."""
    depth = next((values[name] for name in DEPTHS if name in values), None)
    lists = [value for value in values.values() if _is_per_layer(value, depth)]
    if not lists:
        return depth, []
    kinds = list(zip(*(map(str, one) for one in lists), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})
    return depth, kept if len(kept) > 1 else [0, 1]


def _is_per_layer(value: object, depth: int | None) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 3 and len(value) == depth
