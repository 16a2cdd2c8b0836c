"""Batches for the tests of `cif.compat`, and how near they come to firing otherwise."""

import torch
from hypothesis import strategies as st

ROUNDING = 2e-5  # float32 sums over up to 60 frames, several tokens long


@st.composite
def batches(draw):
    """Ragged batches, right-padded, alphas in (0, 1) or, if wanted, above."""
    batch, frames = draw(st.integers(1, 3)), draw(st.integers(1, 60))
    torch.manual_seed(draw(st.integers(0, 999)))
    hidden = torch.randn(batch, frames, draw(st.integers(1, 4)))
    alphas = torch.rand(batch, frames) * draw(st.sampled_from([0.1, 0.5, 1.0]))
    lengths = torch.tensor([draw(st.integers(1, frames)) for _ in range(batch)])
    padding = torch.arange(frames) >= lengths[:, None]
    return hidden, alphas, padding


def distance(values):
    """How near the nearest whole number is."""
    return float((values - values.round()).abs().min())
