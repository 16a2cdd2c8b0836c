"""Which layers got A and B but do not use them, and why: found out by the passes themselves."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from plora.layer import PLoRALinear

NOT_CALLED = "the model did not call it in its first masked pass; it may read its weight instead"


class FirstPass:
    """Watches one pass of a decoder for adapted layers that it never calls.

    Args:
        decoder: Whose layers to watch, until `finish`.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._called: set[int] = set()
        self._handles = [
            module.register_forward_pre_hook(self._note)
            for module in decoder.modules()
            if isinstance(module, PLoRALinear)
        ]

    def finish(self, decoder: nn.Module) -> None:
        """Stop watching, and mark the layers that were not called."""
        self.stop()
        for module in decoder.modules():
            if isinstance(module, PLoRALinear) and id(module) not in self._called:
                module.left_out = NOT_CALLED

    def stop(self) -> None:
        """Stop watching; nothing is concluded."""
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, _: object) -> None:
        self._called.add(id(module))


def tell(decoder: nn.Module) -> None:
    """Warn of the layers that the first pass left out, and raise if that are all.

    Raises:
        ValueError: No adapted layer saw the positions of the pass, so that the mask had no effect.
    """
    layers = {
        path: module for path, module in decoder.named_modules() if isinstance(module, PLoRALinear)
    }
    reasons = {path: layer.left_out for path, layer in layers.items() if layer.left_out}
    if len(reasons) == len(layers):
        path, reason = next(iter(reasons.items()))
        raise ValueError(
            f"{type(decoder).__name__}: none of its {len(layers)} adapted layers sees the "
            f"positions of the decoder pass, so the mask has no effect; {path!r}: {reason}"
        )
    for layer in layers.values():
        layer.settled = True
    if reasons:
        path, reason = next(iter(reasons.items()))
        warnings.warn(
            f"plora: {len(reasons)} of {len(layers)} layers are not adapted, such as {path!r}: "
            f"{reason}. plora.unadapted_layers(model) lists them; exclude_modules spares their A "
            "and B",
            stacklevel=2,
        )


def is_compiling() -> bool:
    """Whether torch.compile is tracing this pass; what comes and goes would make it do so again."""
    return torch.compiler.is_compiling()
