"""Names of layers: how a path is matched by names, regular expressions, patterns and indices.

PEFT's rules, so that one configuration means the same layers there and here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

# What torch.compile, FSDP and checkpoint_wrapper call the module inside of them
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped(path: str) -> str:
    """`path` as it is without wrappers around modules of the model, such as regional compilation.

    Args:
        path: Of a module or parameter: ``layers.0._orig_mod.mlp`` is ``layers.0.mlp``.
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def matches(path: str, names: str | Sequence[str]) -> str | None:
    """What of `names` takes `path`, or None.

    Args:
        path: Of a layer, such as ``model.layers.0.mlp``.
        names: Names that a path equals or ends in after a dot; or, as one string, a regular
            expression for the whole of it.
    """
    if isinstance(names, str):
        return names if re.fullmatch(names, path) else None
    return next((name for name in names if path == name or path.endswith(f".{name}")), None)


def match_pattern(path: str, patterns: Iterable[str]) -> str | None:
    """The first of `patterns`, names or regular expressions, that `path` ends in, or None."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


def layer_index(path: str, lists: str | Sequence[str] | None) -> int | None:
    """The number of the layer that `path` is in: the first number, or the first one behind a list.

    Args:
        path: Such as ``model.layers.3.mlp.up_proj``.
        lists: Name or names of the module list; None for any.
    """
    for name in (lists,) if isinstance(lists, str) else lists or (r"[^.]*",):
        # with no list named, PEFT asks for something before it, so "layers.3" alone has no index
        start = r"(?:^|.*?\.)" if lists else r".*?\."
        found = re.match(rf"{start}{name}\.(\d+)\.", path)
        if found:
            return int(found[1])
    return None


def in_layers(
    path: str, chosen: int | Sequence[int] | None, lists: str | Sequence[str] | None
) -> bool:
    """Whether `path` is in one of the `chosen` layers; None chooses all."""
    if chosen is None:
        return True
    index = layer_index(path, lists)
    return index == chosen if isinstance(chosen, int) else index in chosen


def check_names(field: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple of names.

    Raises:
        TypeError: It is no list of strings.
        ValueError: A name is empty.
    """
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{field}: expected a list of names, got {value!r}")
    ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
    for name in ordered:
        if not isinstance(name, str):
            raise TypeError(f"{field}: expected names, got {name!r}")
        if not name.strip("."):
            raise ValueError(f"{field}: expected names, got the empty name {name!r}")
    return tuple(ordered)


def check_regex(field: str, value: str) -> None:
    """Raise ValueError if `value` is no regular expression, or looks like a name."""
    if not value or not set(value) & set(r"\.*+?[](){}|^$"):
        raise ValueError(
            f"{field}: a string is a regular expression for the whole path, got {value!r}; give "
            f"names as a list, such as [{value!r}]"
        )
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{field}: expected a regular expression, got {value!r} ({error})"
        ) from error


def check_pattern(field: str, value: object) -> Mapping[str, float]:
    """`value` as a mapping from names or regular expressions.

    Raises:
        TypeError: It is no mapping from strings.
        ValueError: A key is no regular expression.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{field}: expected a mapping from names to numbers, got {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{field}: expected names, got {key!r}")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                f"{field}: expected a name or regular expression, got {key!r} ({error})"
            ) from error
    return value
