"""Where in the sequence a pass starts: after what its cache holds.

A cache of keys and values knows its length. One with only recurrent states (Mamba, xLSTM, RWKV)
does not: what passes have written into it is counted here, from outside. The tuples of keys and
values that stood for a cache in older code are as long as their keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# What transformers' decoders call a cache, or the states that stand for one
_CACHES = ("past_key_values", "cache_params", "past_buckets_states", "state")

# Cache without a length of its own, by id -> (it, positions it has seen). Not kept per model: a
# weak reference can be neither copied nor pickled with one.
_seen: dict[int, tuple[weakref.ref[Any], int]] = {}


def past_length(named: Mapping[str, Any]) -> int:
    """Positions before the first one of a pass.

    Args:
        named: The arguments of the decoder's forward pass by name.

    Raises:
        ValueError: A cache holds states, but of how many positions it does not know, and no pass of
            an adapted decoder wrote them.
    """
    cache = _cache_of(named)
    if cache is None:
        return 0
    length = _own_length(cache)
    if length is not None:
        return length
    if _is_fresh(cache):
        return 0
    counted = _counted(cache)
    if counted is None:
        raise ValueError(
            f"plora_mask: the position at which this pass continues is unknown, because its "
            f"{type(cache).__name__} does not know its length and was filled elsewhere or copied; "
            "run the whole sequence with this model, without a cache from outside"
        )
    return counted


def forget_reset(named: Mapping[str, Any]) -> None:
    """Before a pass: drop what was counted of its cache if that was emptied since (``reset``).

    Args:
        named: The arguments of the pass by name.
    """
    cache = _cache_of(named)
    if cache is not None and _counted(cache) is not None and _is_fresh(cache):
        _seen.pop(id(_holder(cache)), None)


def count_pass(named: Mapping[str, Any], output: Any, length: int) -> None:
    """Remember that a pass of `length` positions went into its cache, if that does not know it.

    Args:
        named: The arguments of the pass by name.
        output: What it returned; a cache that it made itself is an attribute of that.
        length: Positions of the pass.
    """
    cache = _cache_of(named)
    if cache is None:
        cache = _cache_of(vars(output) if hasattr(output, "__dict__") else {})
    if cache is None or _own_length(cache) is not None:
        return
    holder, before = _holder(cache), _counted(cache) or 0
    key = id(holder)
    try:
        # Forgotten before the id can be another object's; other threads may be at `_seen` meanwhile
        one = weakref.ref(holder, lambda _: _seen.pop(key, None))
    except (
        TypeError
    ):  # a dict, or a tuple of other things: a masked pass that goes on from it raises
        return
    _seen[key] = (one, before + length)


def _cache_of(named: Mapping[str, Any]) -> Any:
    return next((named[name] for name in _CACHES if named.get(name) is not None), None)


def _own_length(cache: Any) -> int | None:
    get_seq_length = getattr(cache, "get_seq_length", None)
    if not callable(get_seq_length):
        return _keys_length(cache)
    try:
        length = get_seq_length()
    except ValueError:  # what a cache of transformers raises that has no attention layer
        return None
    return None if length is None else int(length)


def _keys_length(cache: Any) -> int | None:
    """Of ``((keys, values), ...)``, one pair for each layer, keys being (..., positions, K)."""
    first = cache[0] if isinstance(cache, (list, tuple)) and cache else None
    keys = first[0] if isinstance(first, (list, tuple)) and first else None
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.ndim > 2 else None


def _holder(cache: Any) -> Any:
    """What stands for a cache: RWKV's is a list, which cannot be referred to weakly."""
    if isinstance(cache, (list, tuple)):
        return next((one for one in cache if isinstance(one, Tensor)), cache)
    return cache


def _counted(cache: Any) -> int | None:
    holder = _holder(cache)
    one, length = _seen.get(id(holder), (None, 0))
    return length if one is not None and one() is holder else None


def _is_fresh(cache: Any) -> bool:
    has_previous_state = getattr(cache, "has_previous_state", None)
    return callable(has_previous_state) and not has_previous_state()
