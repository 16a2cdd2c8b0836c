"""An adapter that fits between a speech encoder and a language model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from speech_adapters import CFormer, CFormerConfig, ConvSubsampler, ConvSubsamplerConfig

from .configuration import BlspKDConfig


def build_adapter(
    config: BlspKDConfig, *, encoder_width: int, embedding_weight: Tensor
) -> CFormer | ConvSubsampler:
    """A fresh adapter of the configured type.

    Its outputs start with the root mean square of the language model's embeddings, and are as wide
    as these and a spelling code together.

    Args:
        config: names the type and its options.
        encoder_width: D, what the adapter reads.
        embedding_weight: (V, H), the space it writes into.

    Raises:
        ValueError: for options that the adapter does not have, or sizes that do not fit.
    """
    sizes: dict[str, Any] = {
        "input_size": encoder_width,
        "output_size": embedding_weight.shape[1] + config.token_spelling,
        "output_rms": float(embedding_weight.float().pow(2).mean().sqrt()),
    }
    options = {**sizes, **config.adapter}
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
    module, adapter_config = kinds[config.adapter_type]
    try:
        adapter: CFormer | ConvSubsampler = module(adapter_config(**options))
    except TypeError as error:
        raise ValueError(f"adapter: {error}; see {adapter_config.__name__}") from error
    return adapter


def token_keys(embedding_weight: Tensor, spelling: Tensor | None = None) -> Tensor:
    """What an adapter output is compared with, by cosine, to tell which token it is.

    Args:
        embedding_weight: (V, H), the text embeddings.
        spelling: (V, W) unit rows, or None. They count as much as the embeddings.

    Returns:
        (V, H + W) float32 unit rows: each token's embedding, its spelling beside it.
    """
    keys = F.normalize(embedding_weight.float(), dim=-1)
    if spelling is None:
        return keys
    return torch.cat([keys, spelling.float()], dim=-1) / math.sqrt(2)


def soft_embeddings(
    vectors: Tensor, keys: Tensor, embedding_weight: Tensor, scale: float
) -> Tensor:
    """Means of the text embeddings, weighted by the softmax of scaled cosines.

    Args:
        vectors: (B, N, H + W), any floating dtype.
        keys: (V, H + W), see :func:`token_keys`.
        embedding_weight: (V, H).
        scale: factor on the cosines.

    Returns:
        (B, N, H) in the dtype of ``embedding_weight``.
    """
    dtype = embedding_weight.dtype
    share = (_cosines(vectors, keys.to(dtype)) * scale).softmax(dim=-1)
    return share.to(dtype) @ embedding_weight


def token_log_probs(vectors: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Which token each adapter output is, by the log-softmax of scaled cosines.

    Args:
        vectors: (B, N, H + W), any floating dtype.
        keys: (V, H + W), see :func:`token_keys`.
        scale: factor on the cosines.

    Returns:
        (B, N, V) float32.
    """
    return (_cosines(vectors, keys) * scale).log_softmax(dim=-1)


def _cosines(vectors: Tensor, keys: Tensor) -> Tensor:
    """(B, N, V) float32, multiplied in the dtype of the keys, which are unit rows."""
    queries = F.normalize(vectors.float(), dim=-1).to(keys.dtype)
    return F.linear(queries, keys).float()


def check_head(language_model: PreTrainedModel) -> None:
    """Refuse heads that are more than a matrix: the fused losses would be wrong, silently.

    Raises:
        ValueError: if logits are scaled, capped or biased.
    """
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        value = getattr(language_model.config, name, None)
        if value not in (None, 0, 1, 1.0):
            raise ValueError(
                f"language models with {name}={value} are not supported: the losses read the head "
                "as a plain matrix"
            )
    if getattr(language_model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("language models with a bias in their head are not supported")
