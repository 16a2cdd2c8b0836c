"""Linear layers inside a decoder that cannot be adapted, as far as that shows before any pass."""

from __future__ import annotations

from torch import nn

from plora.bases import linear_features
from plora.decoder import find_head


def left_out(model: nn.Module, decoder: nn.Module) -> dict[str, str]:
    """Path -> why, of the linear layers inside `decoder` that ``"all-linear"`` leaves alone."""
    others = bypassed(decoder)
    head = find_head(model)
    if head is not None:
        others[id(head)] = "it is the vocabulary head"
    for module in decoder.modules():
        reads = getattr(module, "main_input_name", "input_ids")  # of transformers' models
        if module is not decoder and reads not in ("input_ids", "inputs_embeds"):
            reason = f"it is inside a {type(module).__name__}, which reads {reads}"
            others |= {id(part): reason for part in module.modules()}
    inside = {id(module) for module in decoder.modules()}
    return {
        path: others[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in others and id(module) in inside and linear_features(module) is not None
    }


def bypassed(decoder: nn.Module) -> dict[int, str]:
    """Id -> why, of modules whose owner calls them in training and reads their weights otherwise.

    `torch.nn.TransformerEncoderLayer` does, on the fast path that it takes in evaluation mode.
    """
    found: dict[int, str] = {}
    for module in decoder.modules():
        # a subclass with a forward pass of its own is judged by the first masked pass
        if getattr(type(module), "forward", None) is nn.TransformerEncoderLayer.forward:
            reason = (
                f"it is inside a torch.nn.{nn.TransformerEncoderLayer.__name__}, which in "
                "evaluation mode reads its weight instead of calling it"
            )
            found |= {id(part): reason for part in module.modules()}
    return found
