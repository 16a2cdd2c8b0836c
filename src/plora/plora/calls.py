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


class MaskedFunction:
    """The function of a method that takes ``plora_mask`` besides its own arguments.

    Args:
        owner: The class of the model.
        name: Of the method.
        before: What stood in the place of the class's method, such as a wrapper; or None.
    """

    def __init__(self, owner: type, name: str, before: Callable[..., Any] | None) -> None:
        self.owner = owner
        self.name = name
        self.before = before

    def __call__(
        self,
        model: nn.Module,
        /,
        *args: Any,
        plora_mask: Tensor | Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The method, with `plora_mask` around it; None leaves the mask that is around the call."""
        if self.before is None:
            # the class of now: sharding puts another one in the place of the owner
            method: Callable[..., Any] = getattr(type(model), self.name).__get__(model)
        else:
            method = self.before
        if plora_mask is None:
            return method(*args, **kwargs)
        with masks.plora_mask(plora_mask):
            return method(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature with the model in front, and with ``plora_mask``."""
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        if self.before is None:
            parameters = [*inspect.signature(getattr(self.owner, self.name)).parameters.values()]
            first, parameters = parameters[0], parameters[1:]
        else:
            parameters = [*inspect.signature(self.before).parameters.values()]
        own = inspect.Parameter(ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=None)
        # keyword-only parameters come before **kwargs
        rest = sorted([*parameters, own], key=lambda one: one.kind)
        return inspect.Signature([first, *rest])


class MaskedMethod:
    """A `MaskedFunction` bound to `model`, as a method would be.

    No method, because a pickled one is looked up by its name, in the class. accelerate takes
    ``__func__`` apart from the model to wrap it, and binds it again.
    """

    def __init__(self, function: MaskedFunction, model: nn.Module) -> None:
        self.__func__ = function
        self.__self__ = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the model."""
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's signature, without the model."""
        signature = inspect.signature(self.__func__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


def take_masks(model: nn.Module) -> None:
    """Let the methods of `model` take ``plora_mask``."""
    for name in _METHODS:
        if callable(getattr(model, name, None)):
            function = MaskedFunction(type(model), name, vars(model).get(name))
            setattr(model, name, MaskedMethod(function, model))


def give_methods_back(model: nn.Module) -> None:
    """Undo `take_masks`."""
    for name in _METHODS:
        function = getattr(vars(model).get(name), "__func__", None)
        if isinstance(function, MaskedFunction):
            delattr(model, name)
            if function.before is not None:
                setattr(model, name, function.before)
