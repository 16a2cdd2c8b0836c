"""Every class of transformers' causal-LM mapping, as a small random model."""

from __future__ import annotations

import torch
from tests.decoders.exceptions import SPECIAL, Special
from tests.decoders.shrink import shrunk
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

_PLAIN = Special("")


def entries() -> dict[str, tuple[type, type]]:
    """Model type -> its configuration's class and the class of its causal LM."""
    found: dict[str, tuple[type, type]] = {}
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        if not config.__module__.startswith("transformers."):
            continue  # some code of its own, which another test in this process has run
        kinds = model if isinstance(model, (tuple, list)) else [model]
        found.setdefault(config.model_type, (config, kinds[0]))
    return found


def build(model_type: str) -> nn.Module:
    """A small random causal LM of `model_type`, float32, in evaluation mode; always the same."""
    config_class, model_class = entries()[model_type]
    special = SPECIAL.get(model_type, _PLAIN)
    default = config_class()
    torch.manual_seed(0)
    if special.part is not None:
        part = getattr(default, special.part)
        return model_class(type(part)(**shrunk(part.to_dict(), special.changes))).eval()
    config = config_class(**shrunk(default.to_dict(), special.changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
