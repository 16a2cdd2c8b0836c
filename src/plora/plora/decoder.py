"""The decoder's forward pass: where the ambient mask becomes an activation, once per pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plora.config import PLoRAConfig
from plora.layer import PLoRALinear, linear_features
from plora.mask import (
    Activation,
    active_rows,
    ambient_mask,
    close_pass,
    current_activation,
    disabled_modules,
    is_disabled,
    open_pass,
    set_activation,
)
from plora.past import count_pass, past_length
from plora.recompute import carry_activations, restore_checkpoints
from plora.report import FirstPass, is_compiling, tell

_SCOPE = "plora_scope"


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose forward pass sees the sequence: ``model.get_decoder()``, else `model`.

    Some models of transformers answer with themselves, head and all, or with their head, if that is
    called ``decoder``. There it is the part below the head that reads tokens.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if not isinstance(decoder, nn.Module):
        return model
    head = find_head(model)
    if decoder is not model and decoder is not head:
        return decoder
    parts = [part for part in model.children() if part is not head and _reads_tokens(part)]
    return parts[0] if head is not None and len(parts) == 1 else model


def find_head(model: nn.Module) -> nn.Module | None:
    """The vocabulary head of a model of transformers, or None."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


def _reads_tokens(module: nn.Module) -> bool:
    takes = inspect.signature(module.forward).parameters
    return "input_ids" in takes and any(linear_features(part) for part in module.modules())


class DecoderScope:
    """The hooks on one decoder, kept on it as an attribute.

    It holds no reference to the decoder, so that a copied or pickled model carries a working copy.

    Args:
        config: What was applied.
        trainable: Names of the model's parameters that required gradients before PLoRA was applied.
        left_out: Path -> why, of the linear layers inside the decoder that are not wrapped.
    """

    def __init__(
        self, config: PLoRAConfig, trainable: frozenset[str], left_out: Mapping[str, str]
    ) -> None:
        self.config = config
        self.trainable = trainable
        self.left_out = dict(left_out)
        self._settled = False
        self._first_pass: FirstPass | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, decoder: nn.Module) -> None:
        """Register the hooks on `decoder`."""
        setattr(decoder, _SCOPE, self)
        self._handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            # always_call: the pass is closed also when the forward pass raises
            decoder.register_forward_hook(self._leave, always_call=True, with_kwargs=True),
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
        activation = _activation(decoder, _named_arguments(decoder, args, kwargs))
        set_activation(activation)
        if decoder.training and torch.is_grad_enabled():
            carry_activations(decoder)
        if activation.rows is not None and not self._settled and not is_compiling():
            self._first_pass = FirstPass(decoder)

    def _leave(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        activation = current_activation()
        close_pass(decoder)
        first_pass, self._first_pass = self._first_pass, None
        if output is None or activation is None:  # the forward pass raised
            if first_pass is not None:
                first_pass.stop()
            return
        if not is_compiling():
            count_pass(_named_arguments(decoder, args, kwargs), output, activation.length)
        if first_pass is not None:
            first_pass.finish(decoder)
            self._settled = True
            tell(decoder)


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


def _activation(decoder: nn.Module, named: Mapping[str, Any]) -> Activation:
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
    past = past_length(named)
    rows = None
    if past < mask.shape[1] or (decoder.training and learning):
        rows = active_rows(mask, batch=batch, length=length, past=past, device=device)
        # Without gradients nobody needs the zero rows that keep data-parallel replicas in step
        if rows.numel() == 0 and not learning:
            rows = None
    cached = None if named.get("past_key_values") is None else mask
    return Activation(rows, batch, length, cached, past, learning)


def _named_arguments(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    if not args:
        return kwargs
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
