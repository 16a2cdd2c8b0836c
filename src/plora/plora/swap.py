"""Putting PLoRA into a model and taking it out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from plora.backends import Backend, check_backend
from plora.bases import linear_features
from plora.calls import give_methods_back, take_masks
from plora.config import ALL_LINEAR, DEFAULT, PLoRAConfig
from plora.decoder import DecoderScope, find_decoder, find_scopes
from plora.layer import PLoRALinear
from plora.left_out import bypassed, left_out
from plora.names import in_layers, matches, unwrapped

Model = TypeVar("Model", bound=nn.Module)


def apply_plora(
    model: Model,
    config: PLoRAConfig | Mapping[str, PLoRAConfig],
    *,
    backend: Backend = "auto",
) -> Model:
    """Wrap the linear layers of `model`'s decoder in `PLoRALinear`, in place.

    The decoder is ``model.get_decoder()`` where the model has that method, else the model itself;
    layers outside of it, such as the vocabulary head, are never touched. Calls of the whole model
    and of its decoder see the mask alike.

    Afterwards A and B are the only parameters of `model` that require gradients; what it had before
    is frozen, and `remove_plora` gives each parameter its former setting back. B is zero, so that
    the model computes what it did before until it is trained.

    In training mode a forward pass needs `plora_mask` or `plora_disabled` around it; in evaluation
    mode a pass without either is the base model's. ``model(...)``, its decoder and
    ``model.generate(...)`` also take the mask as an argument, ``plora_mask=mask``.

    Several modalities have A and B of their own each, on positions of their own: give one
    configuration for each by name, and masks by the same names.

    Args:
        model: Any model; with transformers' models, also generation and its caches are covered.
        config: What to adapt; or modality -> what to adapt for it.
        backend: What computes the update: ``"torch"``, ``"triton"``, or ``"auto"``, which takes
            the Triton kernels on a GPU for layers that are large enough and rows that are not a
            few spans known on the CPU. It is not saved.

    Returns:
        `model` itself.

    Raises:
        ValueError: The model has PLoRA or another adapter already, no layer fits the configuration,
            a layer to wrap is shared between two places, offloaded, or one whose weight is read
            instead, a modality's name is no identifier, or `backend` is unknown.
        TypeError: A name in `target_modules` belongs to something that is not a linear layer, or
            DoRA is asked for on a quantised one. The model is as it was then.
    """
    check_backend(backend)
    configs = _by_modality(config)
    if find_scopes(model):
        raise ValueError(
            f"model: {type(model).__name__} has PLoRA already; call remove_plora(model) first"
        )
    decoder = find_decoder(model)
    broad = any(one.target_modules == ALL_LINEAR for one in configs.values())
    skipped = left_out(model, decoder) if broad else {}
    targets: dict[str, nn.Module] = {}
    wanted: dict[str, dict[str, PLoRAConfig]] = {}
    for name, one in configs.items():
        found = _targets(model, decoder, one, skipped)
        targets |= found
        for path in found:
            wanted.setdefault(path, {})[name] = one.at(path)
    # All are made before one is put in its place, so that an error leaves the model alone
    wrapped = {
        path: PLoRALinear(base, wanted[path], backend=backend) for path, base in targets.items()
    }
    trainable = frozenset(
        unwrapped(name) for name, p in model.named_parameters() if p.requires_grad
    )
    model.requires_grad_(False)
    for path, layer in wrapped.items():
        _put(model, path, layer)
    inside = next(path for path, module in model.named_modules() if module is decoder)
    DecoderScope(configs, trainable, skipped, inside).attach(decoder)
    take_masks(model)
    return model


def remove_plora(model: Model) -> Model:
    """Take PLoRA out again, in place: the model is what it was before `apply_plora`.

    Modules, state_dict, values and ``requires_grad`` are restored; A and B are lost, see
    `save_plora`.

    Args:
        model: The model given to `apply_plora`.

    Returns:
        `model` itself.

    Raises:
        ValueError: The model has no PLoRA, or it was applied to another model around or inside it.
    """
    given, scope = require_scope(model)
    names = {unwrapped(name.replace(".base_layer.", ".")) for name, _ in model.named_parameters()}
    if given is not model or not scope.trainable <= names:
        raise ValueError(
            f"model: {type(model).__name__} is not the model that PLoRA was applied to, but has "
            f"its {scope.path or type(given).__name__!r} inside; pass that model"
        )
    layers = [(path, one) for path, one in model.named_modules() if isinstance(one, PLoRALinear)]
    for path, layer in layers:
        _put(model, path, layer.base_layer)
    scope.detach(model.get_submodule(scope.path))
    give_methods_back(model)
    for name, parameter in model.named_parameters():
        if unwrapped(name) in scope.trainable:
            parameter.requires_grad_()
    return model


def require_scope(model: nn.Module) -> tuple[nn.Module, DecoderScope]:
    """The model that PLoRA was applied to, which is `model` or inside of it, with its scope.

    It is inside where `model` is a wrapper, such as those of torch.compile and data parallelism.

    Raises:
        ValueError: The model has no PLoRA, or is only a part of one that has, or holds several.
    """
    found = find_scopes(model)
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no PLoRA; call apply_plora(model, config) first"
        )
    if len(found) > 1:
        raise ValueError(
            f"model: expected one model that PLoRA was applied to, got a {type(model).__name__} of "
            f"several, whose decoders are {sorted(found)}; pass one of them"
        )
    ((path, scope),) = found.items()
    if f".{path}".endswith(f".{scope.path}") or not scope.path:
        around = path.removesuffix(scope.path).removesuffix(".")
        return model.get_submodule(around), scope
    raise ValueError(
        f"model: expected the model that PLoRA was applied to, of which the decoder is "
        f"{scope.path!r}, got its part {type(model).__name__}; pass that model"
    )


def plora_layers(model: nn.Module) -> dict[str, PLoRALinear]:
    """The adapted layers of `model` by path, in the model's order; see `names.unwrapped`."""
    return {
        unwrapped(path): module
        for path, module in model.named_modules()
        if isinstance(module, PLoRALinear)
    }


def unadapted_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers inside the decoder that ``"all-linear"`` does not adapt, and why.

    Some are known when PLoRA is applied: encoders of other modalities inside the decoder, the
    vocabulary head, and `torch.nn.TransformerEncoderLayer`. Others show in the first masked pass,
    which then warns: layers that the model does not call, because it reads their weight, and layers
    that do not see the sequence. Those have A and B, which stay as they are;
    `PLoRAConfig.exclude_modules` spares them, as ``DistributedDataParallel`` without
    ``find_unused_parameters`` asks for.

    Args:
        model: A model with PLoRA.

    Returns:
        Path in the model given to `apply_plora` -> reason.

    Raises:
        ValueError: The model has no PLoRA.
    """
    given, scope = require_scope(model)
    found = {path: layer.left_out for path, layer in plora_layers(given).items()}
    return scope.left_out | {path: reason for path, reason in found.items() if reason}


def _targets(
    model: nn.Module, decoder: nn.Module, config: PLoRAConfig, skipped: Mapping[str, str]
) -> dict[str, nn.Module]:
    inside = {id(module) for module in decoder.modules()}
    beyond = bypassed(decoder)
    names = None if config.target_modules == ALL_LINEAR else config.target_modules
    targets: dict[str, nn.Module] = {}
    used: set[str] = set()
    first_path: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in inside or not path:
            continue
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"model: {path!r} is wrapped by another adapter, {type(module).__name__}; "
                "merge or unload that one first"
            )
        name = None if names is None else matches(path, names)
        is_linear = linear_features(module) is not None
        taken = is_linear if names is None else name is not None
        if name is not None:
            used.add(name)
        if not taken or path in skipped or matches(path, config.exclude_modules):
            continue
        if not in_layers(path, config.layers_to_transform, config.layers_pattern):
            continue
        if not is_linear:
            raise TypeError(
                f"target_modules: expected linear layers, but {name!r} matches {path!r}, a "
                f"{type(module).__name__}; name the linear layers inside it"
            )
        if id(module) in beyond:
            raise ValueError(
                f"target_modules: expected layers that the model calls, but {name!r} matches "
                f"{path!r}: {beyond[id(module)]}; put it in exclude_modules"
            )
        if id(module) in first_path:
            raise ValueError(
                f"target_modules: {path!r} and {first_path[id(module)]!r} are one and the same "
                "layer; shared layers are not supported, put both in exclude_modules"
            )
        first_path[id(module)] = path
        targets[path] = module
    asked = (names,) if isinstance(names, str) else names or ()
    missing = [name for name in asked if name not in used]
    if missing or not targets:
        what = f"{missing[0]!r} matches no layer" if missing else "no linear layer is left to adapt"
        raise ValueError(
            f"target_modules: {what} inside the decoder {type(decoder).__name__}; its linear "
            f"layers are called {_linear_names(decoder)}"
        )
    return targets


def _by_modality(config: PLoRAConfig | Mapping[str, PLoRAConfig]) -> dict[str, PLoRAConfig]:
    if isinstance(config, PLoRAConfig):
        return {DEFAULT: config}
    if not isinstance(config, Mapping) or not all(
        isinstance(one, PLoRAConfig) for one in config.values()
    ):
        raise TypeError(f"config: expected a PLoRAConfig or a mapping to some, got {config!r}")
    if not config:
        raise ValueError("config: expected at least one modality, got an empty mapping")
    for name in config:
        # they become parts of parameter names and of folder names
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"config: expected identifiers as modalities' names, got {name!r}")
    return dict(config)


def _linear_names(decoder: nn.Module) -> list[str]:
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in decoder.named_modules()
            if linear_features(module) is not None
        }
    )


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
