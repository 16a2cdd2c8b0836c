"""The time of a call outside of the frozen layer's own two products, by the clock.

One product of a 2048 x 2048 layer with 2,048 positions takes 80 ms on one core, and one differs
from the next by more than an adapter adds. So the products are timed within each call and taken
out: the forward one around `torch.nn.functional.linear`, the backward one by hooks on its node in
autograd's graph. Nothing else is watched: a profiler would add its own time to each small operation
of an adapter, of which one has more than another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch.nn.functional as F
from torch import Tensor

from benchmarks import memory

_linear = F.linear
_FEW_FAULTS = 64  # pages: 0.25 MiB, less than any matrix that is timed


class Products:
    """What the products with one weight took in a call.

    Attributes:
        seconds: Of all of them.
        count: How many there were.
    """

    def __init__(self, weight: Tensor) -> None:
        self.seconds, self.count = 0.0, 0
        self._weight, self._start = weight, 0.0

    def linear(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.linear`, timed if it is with that weight."""
        if weight is not self._weight:
            return _linear(values, weight, bias)
        self._begin()
        output = _linear(values, weight, bias)
        self._end()
        node = output.grad_fn
        while node is not None and "mm" not in node.name().lower():
            node = node.next_functions[0][0]
        assert node is not None, "the product has a node in autograd's graph"
        node.register_prehook(self._begin)
        node.register_hook(self._end)
        return output

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.count += 1


def seconds_outside(call: Callable[[], object], weight: Tensor) -> float:
    """The seconds of a forward and backward pass without its two products with `weight`."""
    products = Products(weight)
    with mock.patch.object(F, "linear", products.linear):
        start = time.perf_counter()
        call()
        total = time.perf_counter() - start
    assert products.count == 2, f"expected 2 products with the layer's weight, {products.count} ran"
    return total - products.seconds


def _without_faults(call: Callable[[], object], weight: Tensor) -> float:
    """`seconds_outside` of a call that found its memory in use, of the last of six if none does.

    A freed block is sometimes too small for its successor; new pages for one of PEFT's matrices
    cost as much as all that it computes.
    """
    for _ in range(6):
        start = memory.page_faults()
        seconds = seconds_outside(call, weight)
        if memory.page_faults() - start <= _FEW_FAULTS:
            break
    return seconds


def added_ms(
    turns: dict[str, Callable[[], object]], weight: Tensor, *, repeats: int, limit_s: float
) -> dict[str, dict[str, float]]:
    """What each call adds to the first one, in ms outside of the layer's own products.

    The calls take turns, in memory that is in use, and a turn's differences are taken within the
    turn. After `limit_s` seconds no further turn begins, but five are timed in any case.

    Args:
        turns: Name -> a forward and backward pass; the first is the layer alone.
        weight: (N, K), the layer's.
        repeats: Timed turns.
        limit_s: In seconds.

    Returns:
        Name -> the median over the turns and their 20th and 80th percentiles.
    """
    memory.recycled()
    found: dict[str, list[float]] = {name: [] for name in turns}
    begin = time.perf_counter()
    for turn in range(repeats + 1):  # the first warms up
        if turn > 5 and time.perf_counter() - begin > limit_s:
            break
        outside = {name: _without_faults(call, weight) for name, call in turns.items()}
        first = next(iter(outside.values()))
        if turn:
            for name, value in outside.items():
                found[name].append((value - first) * 1e3)
    return {
        name: {
            "added_ms": statistics.median(values),
            "added_p20_ms": sorted(values)[round(0.2 * (len(values) - 1))],
            "added_p80_ms": sorted(values)[round(0.8 * (len(values) - 1))],
        }
        for name, values in found.items()
    }
