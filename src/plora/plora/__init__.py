"""Partial LoRA for PyTorch: low-rank capacity on chosen positions, the base model elsewhere.

The base model is bit-identical wherever the mask is off, and whenever PLoRA is disabled.
"""

from plora.checkpoint import (
    load_plora,
    load_plora_state_dict,
    plora_state_dict,
    save_plora,
)
from plora.config import PLoRAConfig
from plora.convert import from_blsp_emo, from_internlm_xcomposer2
from plora.decoder import plora_disabled
from plora.layer import PLoRALinear
from plora.mask import plora_mask
from plora.positions import mask_from_embeddings, mask_from_ids, mask_from_spans
from plora.swap import apply_plora, remove_plora, unadapted_layers

__all__ = [
    "PLoRAConfig",
    "PLoRALinear",
    "apply_plora",
    "from_blsp_emo",
    "from_internlm_xcomposer2",
    "load_plora",
    "load_plora_state_dict",
    "mask_from_embeddings",
    "mask_from_ids",
    "mask_from_spans",
    "plora_disabled",
    "plora_mask",
    "plora_state_dict",
    "remove_plora",
    "save_plora",
    "unadapted_layers",
]
