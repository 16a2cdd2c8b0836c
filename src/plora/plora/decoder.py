"""The decoder's forward pass: where the ambient mask becomes an activation, once per pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plora.config import PLoRAConfig
from plora.layer import PLoRALinear
from plora.mask import (
    Activation,
    active_rows,
    ambient_mask,
    close_pass,
    disabled_modules,
    is_disabled,
    open_pass,
    set_activation,
)
from plora.recompute import carry_activations, restore_checkpoints

_SCOPE = "plora_scope"


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose forward pass sees the sequence: ``model.get_decoder()``, else `model`."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


class DecoderScope:
    """The hooks on one decoder, kept on it as an attribute.

    It holds no reference to the decoder, so that a copied or pickled model carries a working copy.

    Args:
        config: What was applied.
        trainable: Names of the model's parameters that required gradients before PLoRA was applied.
    """

    def __init__(self, config: PLoRAConfig, trainable: frozenset[str]) -> None:
        self.config = config
        self.trainable = trainable
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, decoder: nn.Module) -> None:
        """Register the hooks on `decoder`."""
        setattr(decoder, _SCOPE, self)
        self._handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            # always_call: the pass is closed also when the forward pass raises
            decoder.register_forward_hook(self._leave, always_call=True),
        ]

    def detach(self, decoder: nn.Module) -> None:
        """Take the hooks off `decoder` and leave nothing behind."""
        for handle in self._handles:
            handle.remove()
        restore_checkpoints(decoder)
        delattr(decoder, _SCOPE)

    def _enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Opened before anything can raise, because `_leave` runs in that case too
        open_pass(decoder)
        set_activation(_activation(decoder, args, kwargs))
        if decoder.training and torch.is_grad_enabled():
            carry_activations(decoder)

    def _leave(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        close_pass(decoder)


def find_scope(model: nn.Module) -> tuple[nn.Module, DecoderScope] | None:
    """The decoder inside `model` that carries PLoRA's hooks, with them, or None."""
    for module in model.modules():
        scope = vars(module).get(_SCOPE)
        if isinstance(scope, DecoderScope):
            return module, scope
    return None


@contextmanager
def plora_disabled(model: nn.Module) -> Iterator[None]:
    """`model` computes exactly what it did before `apply_plora`, whatever mask is around it.

    This is the teacher's side of distillation; it needs no mask, in training mode either. A model
    without PLoRA is left as it is.

    Args:
        model: The model given to `apply_plora`, or one that contains it.

    Raises:
        ValueError: `model` holds adapted layers but not the decoder they belong to.
    """
    modules = [
        module
        for module in model.modules()
        if isinstance(module, PLoRALinear) or _SCOPE in vars(module)
    ]
    if modules and all(isinstance(module, PLoRALinear) for module in modules):
        raise ValueError(
            f"model: expected the model given to apply_plora, got its part {type(model).__name__}; "
            "pass the whole model"
        )
    with disabled_modules(frozenset(map(id, modules))):
        yield


def _activation(decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    named = _named_arguments(decoder, args, kwargs) if args else kwargs
    batch, length, device = _positions(decoder, named)
    off = Activation(None, batch, length)
    if is_disabled(decoder):
        return off
    mask = ambient_mask()
    if mask is None:
        if decoder.training:
            raise ValueError(
                "plora_mask: expected a mask around a forward pass in training mode, got none, so "
                "A and B would learn nothing; write `with plora_mask(mask):` around the call, or "
                "`with plora_disabled(model):` for the plain base model"
            )
        return off
    learning = torch.is_grad_enabled()
    past = _past_length(named.get("past_key_values"))
    if past >= mask.shape[1] and not (decoder.training and learning):
        return off
    rows = active_rows(mask, batch=batch, length=length, past=past, device=device)
    # Without gradients nobody needs the zero rows that keep data-parallel replicas in step
    return off if rows.numel() == 0 and not learning else Activation(rows, batch, length)


def _named_arguments(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    return {**kwargs, **bound}


def _positions(decoder: nn.Module, named: Mapping[str, Any]) -> tuple[int, int, torch.device]:
    for name in ("input_ids", "inputs_embeds"):
        value = named.get(name)
        if isinstance(value, Tensor):
            return value.shape[0], value.shape[1], value.device
    for value in named.values():
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value.shape[0], value.shape[1], value.device
    raise ValueError(
        f"{type(decoder).__name__}: expected input_ids (batch, T) or inputs_embeds (batch, T, D), "
        f"got {sorted(named)}"
    )


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
