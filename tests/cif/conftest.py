"""An oracle that shares nothing with the package: exact fractions, one frame after the other."""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch


class Walk(NamedTuple):
    tokens: torch.Tensor  # (N, D) float64
    times: list[float]
    weights: torch.Tensor  # (N, T) float64
    margin: float  # how near the number of tokens came to being another one


def count_tokens(total: Fraction, tail: str, tail_threshold: float) -> int:
    whole = total.numerator // total.denominator
    rest = total - whole
    if tail == "round":
        return 0 if total == 0 else max(1, whole + (rest >= Fraction(1, 2)))
    if tail == "threshold":
        return whole + (rest >= Fraction(tail_threshold))
    if tail == "keep":
        return whole + (rest > 0)
    assert tail == "drop"
    return whole


def walk(
    hidden: torch.Tensor,
    alphas: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    target: int | None = None,
    threshold: float = 1.0,
    tail: str = "round",
    tail_threshold: float = 0.5,
) -> Walk:
    """Walk over the frames of one row, (T, D) and (T,), filling and firing one token at a time."""
    frames = hidden.shape[0]
    real = [True] * frames if mask is None else [bool(m) for m in mask]
    filled = [Fraction(a.item()) / Fraction(threshold) if r else Fraction(0)
              for a, r in zip(alphas.double(), real, strict=True)]  # fmt: skip
    total = sum(filled, Fraction(0))
    count = target if target is not None else count_tokens(total, tail, tail_threshold)
    if (target is not None or tail == "round") and total > 0:
        filled = [f * count / total for f in filled]
    nearest = {
        "round": Fraction(1, 2), "threshold": Fraction(tail_threshold), "keep": 0, "drop": 0
    }[tail]  # fmt: skip
    margin = abs((total - nearest + Fraction(1, 2)) % 1 - Fraction(1, 2))

    weights: list[dict[int, Fraction]] = []
    times: list[float] = []
    current: dict[int, Fraction] = {}
    level = Fraction(0)
    for t, amount in enumerate(filled):
        left = amount
        while left > 0:
            part = min(left, 1 - level)
            current[t] = part
            level += part
            left -= part
            if level == 1:
                weights.append(current)
                times.append(float(t + (amount - left) / amount))
                current, level = {}, Fraction(0)
    if len(weights) < count and level > 0:
        factor = 1 / level if tail == "threshold" and target is None else Fraction(1)
        weights.append({t: w * factor for t, w in current.items()})
        times.append(float(max(current) + 1))
    dense = torch.zeros(count, frames, dtype=torch.float64)
    for n, token in enumerate(weights[:count]):
        for t, w in token.items():
            dense[n, t] = float(w * Fraction(threshold))
    tokens = torch.zeros(count, hidden.shape[1], dtype=torch.float64)
    for n in range(count):
        for t in range(frames):
            if dense[n, t] > 0:
                tokens[n] += dense[n, t] * hidden[t].double()
    return Walk(tokens, (times + [0.0] * count)[:count], dense, float(margin))


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Walk]:
    return walk
