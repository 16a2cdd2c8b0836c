"""Gradient checkpointing: a layer that is computed again gets the mask of its first time back.

Recomputation happens in the backward pass: long after the ``with plora_mask`` block was left, after
other passes with other masks, and on CUDA on another thread. So the activation cannot be looked up
then; it has to travel with the function that is recomputed.

The place where that function is visible is the attribute ``_gradient_checkpointing_func`` that
``GradientCheckpointingLayer`` of transformers documents: every checkpointed layer calls it with the
function to run. Its name begins with an underscore, and this file alone knows it. There is no other
way in: hooks on a layer stay outside its checkpoint, tensors lose their attributes in a reentrant
one, and ``context_fn`` of `torch.utils.checkpoint` exists only for the other mode. Should a later
version of transformers drop the attribute, nothing goes wrong silently: `PLoRALinear` refuses to
be recomputed without an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plora.activation import Activation, current_activation, restored

_ATTRIBUTE = "_gradient_checkpointing_func"


class CarryingCheckpoint:
    """A checkpoint function that gives the function it runs the activation it was called under.

    Args:
        checkpoint: ``checkpoint(function, *args)``, such as `torch.utils.checkpoint.checkpoint`.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function`, bound to the activation of the pass that is running."""
        activation = current_activation()
        if activation is None:
            return self.checkpoint(function, *args, **kwargs)
        if activation.rows:
            args = _with_gradient(args)
        return self.checkpoint(_Bound(function, activation), *args, **kwargs)


class _Bound:
    """A function that always runs under one activation."""

    def __init__(self, function: Callable[..., Any], activation: Activation) -> None:
        self.function = function
        self.activation = activation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with restored(self.activation):
            return self.function(*args, **kwargs)


def carry_activations(decoder: nn.Module) -> None:
    """Make the checkpoints of all of `decoder`'s layers carry their activation; idempotent."""
    for module in decoder.modules():
        checkpoint = vars(module).get(_ATTRIBUTE)
        if checkpoint is not None and not isinstance(checkpoint, CarryingCheckpoint):
            setattr(module, _ATTRIBUTE, CarryingCheckpoint(checkpoint))


def restore_checkpoints(decoder: nn.Module) -> None:
    """Undo `carry_activations`."""
    for module in decoder.modules():
        checkpoint = vars(module).get(_ATTRIBUTE)
        if isinstance(checkpoint, CarryingCheckpoint):
            setattr(module, _ATTRIBUTE, checkpoint.checkpoint)


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, with the first floating tensor asking for a gradient if none does.

    A reentrant checkpoint none of whose inputs needs a gradient computes none for the parameters
    inside either. That is so in the first layer whenever nothing below the decoder is trained.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return args
    for index, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            return (*args[:index], arg.detach().requires_grad_(), *args[index + 1 :])
    return args
