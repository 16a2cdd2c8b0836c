"""``plora_mask`` as an argument of the model's own methods.

A model of transformers says by the signatures of its methods which arguments it takes: `generate`
refuses others, and ``Trainer`` drops the columns of a batch that ``forward`` does not name. So the
model gets, as attributes of its own, a ``forward`` and a ``generate`` that name ``plora_mask`` and
lay it around the method of its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from plora import mask as masks

ARGUMENT = "plora_mask"
_METHODS = ("forward", "generate")


class MaskedMethod:
    """A method of `model` that takes ``plora_mask`` besides its own arguments.

    Args:
        model: Whose method; the class of the model is asked for it at each call.
        name: Of the method.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        # what stood in the place of the class's method before, such as a wrapper of accelerate
        self.before: Callable[..., Any] | None = vars(model).get(name)

    def __call__(
        self,
        *args: Any,
        plora_mask: Tensor | Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The method, with `plora_mask` around it; None leaves the mask that is around the call."""
        if plora_mask is None:
            return self._method()(*args, **kwargs)
        with masks.plora_mask(plora_mask):
            return self._method()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's signature, with ``plora_mask`` in it."""
        signature = inspect.signature(self._method())
        own = inspect.Parameter(ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = [*signature.parameters.values(), own]
        # keyword-only parameters come before **kwargs
        return signature.replace(parameters=sorted(parameters, key=lambda one: one.kind))

    def _method(self) -> Callable[..., Any]:
        if self.before is not None:
            return self.before
        bound: Callable[..., Any] = getattr(type(self.model), self.name).__get__(self.model)
        return bound


def take_masks(model: nn.Module) -> None:
    """Let the methods of `model` take ``plora_mask``."""
    for name in _METHODS:
        if callable(getattr(model, name, None)):
            setattr(model, name, MaskedMethod(model, name))


def give_methods_back(model: nn.Module) -> None:
    """Undo `take_masks`."""
    for name in _METHODS:
        method = vars(model).get(name)
        if isinstance(method, MaskedMethod):
            delattr(model, name)
            if method.before is not None:
                setattr(model, name, method.before)
