"""One forward pass of the decoder: from what it was called with to the rows to adapt."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plora.activation import Activation, active_rows, check_batch, dense_rows
from plora.config import DEFAULT
from plora.mask import Marked, ambient_masks, is_disabled
from plora.past import past_length
from plora.report import is_compiling

# What transformers' decoders call their sequence, as ids or as embeddings
_SEQUENCES = ("input_ids", "inputs_embeds")


def activation_of(
    decoder: nn.Module,
    named: Mapping[str, Any],
    modalities: Collection[str],
    given: Mapping[str, Marked] | None,
) -> Activation:
    """What a pass of `decoder` adapts.

    Args:
        decoder: The module that is called.
        named: The arguments of the call by name, without the mask.
        modalities: Names of those that the model has.
        given: The masks that came with the call; None for those of the block around it.

    Raises:
        ValueError: No mask reaches a pass in training mode, or one for a modality that the model
            does not have, or for another batch.
    """
    sequence = _sequence(named)
    batch, length = (0, 0) if sequence is None else (sequence.shape[0], sequence.shape[1])
    off = Activation({}, batch, length)
    if is_disabled(decoder):
        return off
    marked = ambient_masks() if given is None else given
    if marked is None:
        if decoder.training:
            raise ValueError(
                "plora_mask: expected a mask around a forward pass in training mode, got none, so "
                "A and B would learn nothing; write `with plora_mask(mask):` around the call, or "
                "give the call plora_mask=mask, or write `with plora_disabled(model):` for the "
                "plain base model"
            )
        return off
    if sequence is None:
        raise ValueError(
            f"{type(decoder).__name__}: expected input_ids (batch, T) or inputs_embeds (batch, T, "
            f"D), or any tensor of such a shape as its first one, got {sorted(named)}; give it one"
        )
    device = sequence.device
    marked = _by_modality(marked, modalities)
    learning = torch.is_grad_enabled()
    past = past_length(named)
    rows = {}
    for name in modalities:
        one = marked.get(name)
        if one is not None and past < one.mask.shape[1]:
            found = _rows(one, batch, length, past, device)
        elif decoder.training and learning:
            if one is not None:
                check_batch(one.mask, batch)
            found = torch.zeros(0, dtype=torch.int64, device=device)
        else:
            continue
        # Without gradients nobody needs the zero rows that keep data-parallel replicas in step
        if learning or found.numel():
            rows[name] = found
    cached = named.get("past_key_values") is not None
    masks = {name: one.mask for name, one in marked.items()} if cached else {}
    return Activation(rows, batch, length, masks, past, learning)


def named_arguments(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call of `decoder` by name, in the order of its signature.

    Those that it takes as ``*args`` are called ``args[0]`` and so on.
    """
    if not args and any(isinstance(kwargs.get(name), Tensor) for name in _SEQUENCES):
        return kwargs
    signature = inspect.signature(decoder.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}[{index}]": one for index, one in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def _rows(one: Marked, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """Rows of the pass: found before it if it is of the whole sequences, else found now."""
    known = one.rows is not None and past == 0 and tuple(one.mask.shape) == (batch, length)
    if is_compiling():
        if known and one.rows is not None:
            return one.rows.to(device, non_blocking=True)
        return dense_rows(one.mask, batch=batch, length=length, past=past, device=device)
    if known and one.rows is not None:
        return one.rows  # the activation takes them to the layers' device
    return active_rows(one.mask, batch=batch, length=length, past=past, device=one.mask.device)


def _by_modality(marked: Mapping[str, Marked], modalities: Collection[str]) -> Mapping[str, Marked]:
    """`marked`, where a mask without a name is that of the only modality."""
    unknown = [name for name in marked if name not in modalities]
    if not unknown:
        return marked
    if unknown == [DEFAULT] and len(marked) == len(modalities) == 1:
        (name,) = modalities
        return {name: marked[DEFAULT]}
    names = sorted(modalities)
    expected = "a mask without a name" if names == [DEFAULT] else f"masks by name, of {names}"
    got = "a mask without a name" if unknown == [DEFAULT] else f"one for {unknown[0]!r}"
    raise ValueError(
        f"plora_mask: expected {expected}, the modalities given to apply_plora, got {got}"
    )


def _sequence(named: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose first two dimensions are sequences and positions."""
    for name in _SEQUENCES:
        value = named.get(name)
        if isinstance(value, Tensor):
            return value
    tensors = (value for value in named.values() if isinstance(value, Tensor))
    return next((value for value in tensors if value.ndim >= 2), None)
