"""Checkpoints of other Partial LoRA code: a configuration and a state dict from their names.

Both hold A and B beside the base model's weights, and not the scale, which their code fixes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plora.config import PLoRAConfig
from plora.peft_format import PREFIX

# InternLM-XComposer2's code has alpha 256 for its rank 256 and alpha 16 for its rank 8 (the fused
# q, k, v of the 4KHD model)
_XCOMPOSER_ALPHA = {256: 256, 8: 16}


def from_internlm_xcomposer2(
    state_dict: Mapping[str, Tensor], *, lora_alpha: float | None = None
) -> tuple[PLoRAConfig, dict[str, Tensor]]:
    """What an InternLM-XComposer2 checkpoint has for `apply_plora` and `load_plora_state_dict`.

    Its names are ``model.layers.<i>.attention.wqkv.Plora_A.weight`` and the like; everything that
    is not a LoRA is skipped. Its update is for the positions of images.

    Args:
        state_dict: Of the whole model, or of any part of it.
        lora_alpha: Numerator of the scale. None takes that of its code: 256 at rank 256, 16 at
            rank 8.

    Returns:
        The configuration, whose targets are the layers found, and A and B under the names of
        `plora_state_dict`.

    Raises:
        ValueError: There is no LoRA of that code, or another one as well, or half of one, or a rank
            whose alpha is not known.
    """
    found = _pairs(state_dict, r"(?P<path>.+)\.Plora_(?P<kind>[AB])\.weight", "Plora_A.weight")
    return _result(found, None if lora_alpha is None else float(lora_alpha))


def from_blsp_emo(
    state_dict: Mapping[str, Tensor], *, lora_config: Mapping[str, Any] | None = None
) -> tuple[PLoRAConfig, dict[str, Tensor]]:
    """What a BLSP-Emo checkpoint has for `apply_plora` and `load_plora_state_dict` on its Qwen.

    Its names are ``qwen_model.model.transformer.h.<i>.attn.c_attn.lora_A.default.weight`` and the
    like; paths here count from its language model, ``transformer.h.<i>.attn.c_attn``. Everything
    that is not a LoRA is skipped. Its scale is ``lora_alpha / r``.

    Args:
        state_dict: Of the whole model.
        lora_config: The field of this name in its config.json, for alpha and dropout; None takes
            the alpha of its training script, 16.

    Returns:
        As `from_internlm_xcomposer2`.

    Raises:
        ValueError: There is no LoRA of that code, or another one as well, or half of one, or its
            rank is not that of `lora_config`.
    """
    given = {"lora_alpha": 16, "lora_dropout": 0.0, **(lora_config or {})}
    found = _pairs(
        state_dict,
        r"(?:qwen_model\.model\.)?(?P<path>.+)\.lora_(?P<kind>[AB])\.default\.weight",
        "qwen_model.model.<path>.lora_A.default.weight",
    )
    config, values = _result(found, float(given["lora_alpha"]), given["lora_dropout"])
    if given.get("r") not in (None, config.r) or config.rank_pattern:
        ranks = {config.r, *config.rank_pattern.values()}
        raise ValueError(f"lora_config: expected r to be the rank {ranks}, got {given.get('r')}")
    return config, values


def _pairs(
    state_dict: Mapping[str, Tensor], pattern: str, example: str
) -> dict[str, dict[str, Tensor]]:
    """Path -> its A and B."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state_dict.items():
        match = re.fullmatch(pattern, name)
        if match:
            found.setdefault(match["path"], {})[match["kind"]] = value
        elif "lora" in name.lower():
            raise ValueError(
                f"state_dict: {name!r} is a LoRA under a name that is not known here; expected "
                f"names as {example!r}. Leave it out if it is not wanted"
            )
    if not found:
        raise ValueError(f"state_dict: expected names as {example!r}, got none of them")
    for path, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[-1]:
            shapes = {kind: tuple(value.shape) for kind, value in pair.items()}
            raise ValueError(
                f"state_dict: expected A (r, K) and B (N, r) for {path!r}, got {shapes}"
            )
    return found


def _result(
    found: Mapping[str, Mapping[str, Tensor]], lora_alpha: float | None, dropout: float = 0.05
) -> tuple[PLoRAConfig, dict[str, Tensor]]:
    ranks = {path: pair["A"].shape[0] for path, pair in found.items()}
    alphas = {}
    for path, rank in ranks.items():
        alpha = _XCOMPOSER_ALPHA.get(rank) if lora_alpha is None else lora_alpha
        if alpha is None:
            raise ValueError(
                f"lora_alpha: expected it beside rank {rank} at {path!r}, for which it is not "
                f"known; known are {_XCOMPOSER_ALPHA}"
            )
        alphas[path] = alpha
    rank = Counter(ranks.values()).most_common(1)[0][0]
    usual = Counter(alphas.values()).most_common(1)[0][0]
    config = PLoRAConfig(
        r=rank,
        lora_alpha=usual,
        lora_dropout=dropout,
        target_modules=_names(found),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, usual),
    )
    values = {
        f"{PREFIX}{path}.lora_{kind}.weight": value
        for path, pair in found.items()
        for kind, value in pair.items()
    }
    return config, values


def _names(paths: Mapping[str, object]) -> tuple[str, ...]:
    """The paths; or how they end, if every numbered layer has all of these ends."""
    split = [re.fullmatch(r"(.+\.\d+)\.(.+)", path) for path in paths]
    pairs = {(one[1], one[2]) for one in split if one}
    layers, ends = {layer for layer, _ in pairs}, {end for _, end in pairs}
    whole = len(pairs) == len(paths) == len(layers) * len(ends)
    return tuple(sorted(ends if whole else paths))


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """Path -> its value, for those that differ from the usual one."""
    return {re.escape(path): value for path, value in values.items() if value != usual}
