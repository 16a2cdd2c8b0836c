"""Linear layers that can be wrapped, and what has to be known of them."""

from __future__ import annotations

from torch import Tensor, device, nn


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(input, output) features of a module that `PLoRALinear` can wrap, or None for any other.

    Those are `torch.nn.Linear` with its subclasses, the transposed ``Conv1D`` of GPT-2, which is
    known by its name and its ``(nx, nf)`` weight because this package does not import
    transformers, and any other module without parts of its own that says ``in_features`` and
    ``out_features``, as the linear layers of quantisation packages do.
    """
    if is_conv1d(module):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            return weight.shape[0], weight.shape[1]
        return None
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    alone = isinstance(module, nn.Linear) or not any(True for _ in module.children())
    if alone and isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's transposed linear layer."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def device_of(module: nn.Module) -> device | None:
    """Where the values of `module` are; None if it has none."""
    for values in (*module.parameters(), *module.buffers()):
        return values.device
    return None


def check_present(module: nn.Module) -> None:
    """Raise ValueError where the values of `module` come and go with its calls.

    accelerate's offloading leaves parameters on the meta device and puts another ``forward`` in the
    place of the class's, that fetches them. A and B, made on that device, would never have values.
    A module that is on the meta device for now, as before it is loaded, passes.
    """
    device = device_of(module)
    if device is not None and device.type == "meta" and "forward" in vars(module):
        raise ValueError(
            f"model: expected {type(module).__name__} to hold its values, got one on the meta "
            "device whose forward was replaced, as offloading (accelerate) does; apply or load "
            "PLoRA first and offload then, or put what is offloaded in exclude_modules"
        )


def dense_weight(module: nn.Module) -> Tensor | None:
    """(N, K) floating weight of a layer, or None if it is quantised or kept otherwise."""
    weight = getattr(module, "weight", None)
    # a quantised weight may be a subclass of Tensor that says it is floating
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
        return None
    if not weight.is_floating_point() or weight.ndim != 2:
        return None
    return weight.T if is_conv1d(module) else weight


# Attributes of torch.nn.Module, in every model that was ever pickled. There is no public way to ask
# whether a module has hooks.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody but the caller sees the output of `module`, and the gradient of its input.

    So it is with linear layers that compute as their class does and have no hooks: both are made
    anew, by a matrix product, and may be written into.
    """
    own = vars(module)
    if "forward" in own or any(own.get(name) for name in _HOOKS):
        return False
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"
