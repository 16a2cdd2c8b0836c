"""A second device without a second device: what runs on it runs on the CPU, but must not mix.

Its tensors call themselves `meta`, a device that every build of torch knows and that owns no
memory; here each of them holds a CPU tensor with the values. As on a GPU, an operation that takes
tensors of both devices is an error, with the same exceptions: scalars, copies, indices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

NAME = "meta"
_ops = torch.ops.aten
COPIES = {_ops._to_copy.default, _ops.copy_.default}
INDEXINGS = {
    _ops.index.Tensor,
    _ops.index_put.default,
    _ops.index_put_.default,
    _ops._index_put_impl_.default,
}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


class OtherDeviceTensor(Tensor):
    """A tensor there: `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OtherDeviceTensor:
        """A tensor of the same shape, strides and type that says it is elsewhere."""
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=NAME,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None) -> str:
        """Its place and shape."""
        return f"OtherDeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        """Its values, which any device hands out."""
        return self.held.tolist()


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Tensors made of Python numbers are put in their place before operations are looked at."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if function in FROM_PYTHON and device is not None and torch.device(device).type == NAME:
            del kwargs["device"]
            return function(*args, **kwargs).to(NAME)
        if function is Tensor.new_tensor and isinstance(args[0], OtherDeviceTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(NAME)
        if function in (torch.where, Tensor.where):
            args = tuple(torch.tensor(x) if isinstance(x, int | float) else x for x in args)
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            tensor, index, *value = args
            parts = index if isinstance(index, tuple) else (index,)
            parts = tuple(torch.tensor(x) if isinstance(x, list) else x for x in parts)
            return function(tensor, parts, *value)
        return function(*args, **kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    assert not any(type(x) is Tensor and x.is_meta for x in tensors), "a tensor without values"
    there = [x for x in tensors if isinstance(x, OtherDeviceTensor)]
    here = [x for x in tensors if not isinstance(x, OtherDeviceTensor) and x.dim() > 0]
    if function in INDEXINGS:
        # indices may lie on the CPU; what is indexed and what is written must lie together
        indexed = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor) and x.dim() > 0]
        mixed = len({isinstance(x, OtherDeviceTensor) for x in indexed}) > 1
        mixed |= bool(there) and not isinstance(args[0], OtherDeviceTensor)
    else:
        mixed = bool(there and here) and function not in COPIES
    if mixed:
        raise RuntimeError(
            f"{function} takes tensors of two devices: there {[tuple(x.shape) for x in there]}, "
            f"on the CPU {[tuple(x.shape) for x in here]}"
        )
    target = kwargs.get("device")
    goes_there = bool(there) if target is None else torch.device(target).type == NAME
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    found = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    # what was written in place stays the tensor that it is
    known = {id(x.held): x for x in there}

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OtherDeviceTensor) or not goes_there:
            return x
        return known.get(id(x)) if id(x) in known else OtherDeviceTensor(x)

    return tree_map(placed, found)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OtherDeviceTensor) else x


@contextlib.contextmanager
def pretended_device(monkeypatch: Any) -> Iterator[torch.device]:
    """Inside, `meta` is a device that computes.

    Autocast and fused optimisers, which do not know it, are off there.
    """
    enabled, autocast, adamw = torch.is_autocast_enabled, torch.autocast, torch.optim.AdamW.__init__

    def is_autocast_enabled(device: str | None = None) -> bool:
        return device != NAME and (enabled() if device is None else enabled(device))

    def autocast_or_none(device: str, *args: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device == NAME else autocast(device, *args, **options)

    def unfused(self: Any, *args: Any, **options: Any) -> None:
        adamw(self, *args, **{**options, "fused": False})

    monkeypatch.setattr(torch, "is_autocast_enabled", is_autocast_enabled)
    monkeypatch.setattr(torch, "autocast", autocast_or_none)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", unfused)
    with _Operations(), _Functions():
        yield torch.device(NAME)
