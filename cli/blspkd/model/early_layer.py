"""The language model up to one of its first layers, and what that layer says.

Shapes: B batch, S spliced length, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def decoder_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a decoder's layers, and the name it has there.

    Args:
        decoder: a causal LM's ``get_decoder()``.

    Raises:
        ValueError: if no one list of modules holds as many as the configuration has layers.
    """
    config: Any = decoder.config
    count = config.get_text_config().num_hidden_layers
    found = [
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(decoder).__name__}: expected one list of its {count} layers, found "
            f"{len(found)}: the layer losses cannot be used with it"
        )
    return found[0]


def check_layer(decoder: nn.Module, layer: int) -> None:
    """Refuse a layer that a decoder does not have.

    Raises:
        ValueError: if ``layer`` is not one of 1 to the number of layers.
    """
    count = len(decoder_layers(decoder)[1])
    if not 1 <= layer <= count:
        raise ValueError(
            f"losses.layer: the language model has layers 1 to {count}, got layer {layer}"
        )


class EarlyLayer:
    """What one pass of a decoder shows of one of its layers.

    Attributes:
        output: (B, S, H), the layer's output, before any norm: ``hidden_states[layer]`` of a pass
            with ``output_hidden_states=True``, the last layer excepted.
    """

    def __init__(self, *, is_last: bool) -> None:
        self.is_last = is_last
        self.output: Tensor | None = None
        self.last_output: Tensor | None = None
        self.norm: nn.Module | None = None

    def readout(self, last_hidden_state: Tensor) -> Tensor:
        """The layer's output as the head would read it, the decoder's final norm applied.

        Args:
            last_hidden_state: (B, S, H), what the pass returned.

        Returns:
            (B, S, H).

        Raises:
            ValueError: if the pass went on to later layers and the final norm cannot be told.
        """
        assert self.output is not None
        if self.is_last:
            return last_hidden_state
        if self.norm is not None:
            normed: Tensor = self.norm(self.output)
            return normed
        if last_hidden_state is self.last_output:
            return self.output
        raise ValueError(
            "this language model does not show what it does to its last layer's output, which "
            "losses.layer_kl would do to an earlier one: let no other loss of the language model "
            "count while layer_kl does, or use layer_hidden"
        )


@contextmanager
def watched_layer(decoder: nn.Module, layer: int, *, stop: bool) -> Iterator[EarlyLayer]:
    """Watch a layer in the pass of ``decoder`` that is made within the block.

    With ``stop``, the decoder consists of its first layers alone meanwhile: everything before and
    after them (masks, rotary embeddings, the cache, the final norm) stays the decoder's own work,
    and the layers, with whatever wraps them, are the very same modules. Not for a decoder that
    another thread is running.

    Args:
        decoder: a causal LM's ``get_decoder()``.
        layer: which, from 1.
        stop: run no layer after it.
    """
    check_layer(decoder, layer)
    name, layers = decoder_layers(decoder)
    seen = EarlyLayer(is_last=stop or layer == len(layers))

    def note_layer(module: nn.Module, args: Any, output: Any) -> None:
        seen.output = output[0] if isinstance(output, tuple) else output

    def note_last(module: nn.Module, args: Any, output: Any) -> None:
        seen.last_output = output[0] if isinstance(output, tuple) else output

    def note_norm(module: nn.Module, args: Any) -> None:
        if args and args[0] is seen.last_output and seen.last_output is not None:
            seen.norm = module

    handles = [layers[layer - 1].register_forward_hook(note_layer)]
    if not seen.is_last:
        handles.append(layers[-1].register_forward_hook(note_last))
        handles += [
            child.register_forward_pre_hook(note_norm)
            for child in decoder.children()
            if child is not layers
        ]
    if stop:
        setattr(decoder, name, layers[:layer])
    try:
        yield seen
    finally:
        if stop:
            setattr(decoder, name, layers)
        for handle in handles:
            handle.remove()
