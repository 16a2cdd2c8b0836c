"""A configuration read: defaults < `base` files < YAML file < `key=value` on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import TrainConfig
from .windows import FractionSection, LossSection


def load_config(path: Path, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and lay ``key=value`` pairs over it.

    A file's key ``base`` names another one, by its path from there, which it is laid over: what it
    does not say is as the other has it, but for the run's name.

    Args:
        path: the YAML file.
        overrides: such as ``optim.learning_rate=1e-4``; values are YAML, keys are dotted.

    Raises:
        ValueError: naming the unknown key and the nearest one, or the value and what it should be.
    """
    values = _read(path)
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {pair!r}")
        place = values
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = yaml.safe_load(text)
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A configuration from a nested mapping, such as :func:`as_dict` gives."""
    config: TrainConfig = _build(TrainConfig, values, "")
    return config


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration, as it is written into the run's folder."""
    return dataclasses.asdict(config)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's mapping, laid over those of the files that it is based on.

    Args:
        path: the YAML file.
        above: the files that are based on it, the nearest last.
    """
    asked_by = f" (the base of {above[-1]})" if above else ""
    try:
        own = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ValueError(
            f"cannot read the configuration {path}{asked_by}: {error.strerror}"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(own).__name__}")
    own.setdefault("name", path.stem)
    if "base" not in own:
        return own
    base = own.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the path of another file, got {base!r}")
    chain = (*above, path)
    if any((path.parent / base).resolve() == one.resolve() for one in chain):
        raise ValueError(f"{path}: its base {base} is based on it: a file cannot lie over itself")
    return _laid_over(_read(path.parent / base, chain), own)


def _laid_over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value that is no mapping, it is ``own``'s."""
    both = dict(base)
    for key, value in own.items():
        under = base.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            value = _laid_over(under, value)
        both[key] = value
    return both


def _build(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from a mapping, with every key and value checked."""
    plain = isinstance(values, (int, float)) and not isinstance(values, bool)
    if plain and kind in (LossSection, FractionSection):
        values = {"weight" if kind is LossSection else "fraction": values}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
            raise ValueError(f"unknown configuration key {path!r}; {hint}")
        arguments[key] = _convert(hints[key], value, path)
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    """A YAML value as the type a field declares."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{path}: expected one of {', '.join(options)}; got {value!r}")
        return value
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            pass
    kind = origin or hint
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path}: expected {kind.__name__}, got {value!r}")
    return value
