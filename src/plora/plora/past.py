"""Where in the sequence a pass starts: after what its cache holds.

A cache of keys and values knows its length. One with only recurrent states (Mamba, xLSTM, RWKV)
does not: what passes have written into it is counted here, from outside.
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
    counted = _counted(cache)
    if counted is not None:
        return counted
    if not _is_fresh(cache):
        raise ValueError(
            f"plora_mask: the position at which this pass continues is unknown, because its "
            f"{type(cache).__name__} does not know its length and was filled elsewhere or copied; "
            "run the whole sequence with this model, without a cache from outside"
        )
    return 0


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
    before = _counted(cache) or 0
    for key in [key for key, (one, _) in _seen.items() if one() is None]:
        del _seen[key]
    holder = _holder(cache)
    _seen[id(holder)] = (weakref.ref(holder), before + length)


def _cache_of(named: Mapping[str, Any]) -> Any:
    return next((named[name] for name in _CACHES if named.get(name) is not None), None)


def _own_length(cache: Any) -> int | None:
    get_seq_length = getattr(cache, "get_seq_length", None)
    if not callable(get_seq_length):
        return None
    try:
        length = get_seq_length()
    except ValueError:  # what a cache of transformers raises that has no attention layer
        return None
    return None if length is None else int(length)


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
