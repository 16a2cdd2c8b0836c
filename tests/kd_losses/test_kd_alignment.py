"""The CIF alignment loss against a loop over tokens and frames."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_losses import cif_alignment_loss


def by_hand(alphas: list[list[float]], ends: list[list[float]], lengths: list[int]) -> list[float]:
    """What each token's stretch weighs, less one, frame by frame."""
    losses = []
    for row, row_ends, n in zip(alphas, ends, lengths, strict=True):
        bounds = [0.0, *row_ends[: n - 1], float(len(row))] if n else []
        for start, end in itertools.pairwise(bounds):
            mass = sum(a * max(0.0, min(t + 1, end) - max(t, start)) for t, a in enumerate(row))
            losses.append(abs(mass - 1))
    return losses


@st.composite
def clips(draw):
    frames = draw(st.integers(1, 9))
    columns = draw(st.integers(1, 5))
    rows = draw(st.integers(1, 3))
    unit = st.floats(0, 1, width=32)
    alphas = [[draw(unit) for _ in range(frames)] for _ in range(rows)]
    ends = [sorted(draw(unit) * frames for _ in range(columns)) for _ in range(rows)]
    lengths = [draw(st.integers(0, columns)) for _ in range(rows)]
    return alphas, ends, lengths


@settings(deadline=None, max_examples=60)
@given(clips())
def test_each_stretch_is_weighed_as_by_hand(clip):
    alphas, ends, lengths = clip
    losses = cif_alignment_loss(
        torch.tensor(alphas, dtype=torch.float64),
        torch.tensor(ends, dtype=torch.float64),
        torch.tensor(lengths),
        reduction="none",
    )
    torch.testing.assert_close(
        losses, torch.tensor(by_hand(alphas, ends, lengths), dtype=torch.float64)
    )


def test_a_perfect_alignment_costs_nothing_and_a_shifted_one_does():
    alphas = torch.tensor([[0.5, 0.5, 0.25, 0.75, 0.0]])
    ends = torch.tensor([[2.0, 4.0]])
    assert cif_alignment_loss(alphas, ends, torch.tensor([2])).item() == 0.0
    late = cif_alignment_loss(alphas, ends + 1, torch.tensor([2]), reduction="none")
    assert late.tolist() == [0.25, 0.25]


def test_the_threshold_is_the_unit():
    alphas = torch.tensor([[0.3, 0.3, 0.6]])
    loss = cif_alignment_loss(alphas, torch.tensor([[2.0, 3.0]]), torch.tensor([2]), threshold=0.6)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_gradients_and_what_follows_the_last_token():
    torch.manual_seed(0)
    alphas = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([[1.5, 3.2, math.nan], [0.7, 2.0, 4.9]], dtype=torch.float64)
    lengths = torch.tensor([2, 3])
    assert torch.autograd.gradcheck(
        lambda a: cif_alignment_loss(a, ends, lengths, reduction="sum"), alphas
    )
    loss = cif_alignment_loss(alphas, ends, lengths)
    assert loss.item() == pytest.approx(
        cif_alignment_loss(alphas, ends.nan_to_num(99.0), lengths).item()
    )


def test_no_token_at_all_gives_a_zero_that_is_connected():
    alphas = torch.rand(2, 4, requires_grad=True)
    loss = cif_alignment_loss(alphas, torch.zeros(2, 0), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0.0
    assert alphas.grad.abs().sum() == 0


def test_the_count_of_the_global_batch_divides():
    alphas, ends, lengths = torch.rand(1, 4), torch.tensor([[1.0, 4.0]]), torch.tensor([2])
    total = cif_alignment_loss(alphas, ends, lengths, reduction="sum")
    assert cif_alignment_loss(alphas, ends, lengths, num_items=8).item() == pytest.approx(
        total.item() / 8
    )


@pytest.mark.parametrize(
    ("alphas", "ends", "lengths", "options", "message"),
    [
        (torch.ones(2, 3), torch.ones(1, 2), torch.ones(2), {}, r"\(B, S\) and \(B, N\)"),
        (torch.ones(2, 3), torch.ones(2, 2), torch.ones(3), {}, "target_length"),
        (
            torch.ones(2, 3),
            torch.ones(2, 2),
            torch.tensor([1, 3]),
            {},
            "target_length: .*at most 2, .*got 3",
        ),
        (torch.ones(2, 3), torch.ones(2, 2), torch.ones(2), {"threshold": 0.0}, "threshold"),
        (torch.ones(2, 3), torch.ones(2, 2), torch.ones(2), {"reduction": "x"}, "reduction"),
    ],
)
def test_bad_input_is_named(alphas, ends, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        cif_alignment_loss(alphas, ends, lengths, **options)


def test_integers_are_no_weights():
    with pytest.raises(TypeError, match="alphas"):
        cif_alignment_loss(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 1), torch.ones(1))
