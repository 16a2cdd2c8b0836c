"""The decoder's forward pass: where the ambient mask becomes an activation, once per pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from plora.activation import close_pass, current_activation, open_pass, set_activation
from plora.bases import linear_features
from plora.calls import ARGUMENT
from plora.config import PLoRAConfig
from plora.layer import PLoRALinear
from plora.mask import disabled_modules, marked
from plora.passes import activation_of, named_arguments
from plora.past import count_pass, forget_reset
from plora.recompute import carry_activations, restore_checkpoints
from plora.report import is_compiling, settle, tell

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
        configs: What was applied, by modality.
        trainable: Names of the model's parameters that required gradients before PLoRA was applied.
        left_out: Path -> why, of the linear layers inside the decoder that are not wrapped.
        path: Of the decoder inside the model that PLoRA was applied to, by which that is known
            again.
    """

    def __init__(
        self,
        configs: Mapping[str, PLoRAConfig],
        trainable: frozenset[str],
        left_out: Mapping[str, str],
        path: str,
    ) -> None:
        self.configs = dict(configs)
        self.trainable = trainable
        self.left_out = dict(left_out)
        self.path = path
        self._settled = False
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

    def _enter(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Opened before anything can raise, because `_leave` runs in that case too
        open_pass(decoder)
        kwargs = dict(kwargs)
        mask = kwargs.pop(ARGUMENT, None)
        given = None if mask is None else marked(mask)
        named = named_arguments(decoder, args, kwargs)
        if not is_compiling():
            forget_reset(named)
        activation = activation_of(decoder, named, self.configs.keys(), given)
        if activation.rows and not self._settled and not is_compiling():
            activation = replace(activation, watched={})
        set_activation(activation)
        if decoder.training and torch.is_grad_enabled():
            carry_activations(decoder)
        return args, kwargs

    def _leave(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        activation = current_activation()
        close_pass(decoder)
        if output is None or activation is None:  # the forward pass raised
            return
        if not is_compiling():
            count_pass(named_arguments(decoder, args, kwargs), output, activation.length)
        if activation.watched is not None and not self._settled:
            settle(decoder, activation.watched)
            self._settled = True
            tell(decoder)


def find_scopes(model: nn.Module) -> dict[str, DecoderScope]:
    """Path of each decoder inside `model` that carries PLoRA's hooks -> them."""
    found = {path: vars(module).get(_SCOPE) for path, module in model.named_modules()}
    return {path: scope for path, scope in found.items() if isinstance(scope, DecoderScope)}


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
