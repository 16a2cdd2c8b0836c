"""`cif` against the sequential oracle, and the promises about the number of tokens."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cif import cif
from cif.prefix import ONE, fixed_point_prefix, scale_prefix

TAILS = ["round", "threshold", "drop", "keep"]


@st.composite
def batches(draw):
    """A ragged batch whose alphas lie on a grid, so that ends of frames and tokens often meet."""
    batch, frames = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    most = draw(st.sampled_from([16, 64, 300]))  # in 64ths: below one token, about one, several
    cell = st.integers(0, most).map(lambda k: k / 64)
    alphas = torch.tensor([[draw(cell) for _ in range(frames)] for _ in range(batch)])
    mask = torch.tensor(
        [[draw(st.integers(0, 4)) > 0 for _ in range(frames)] for _ in range(batch)]
    )
    torch.manual_seed(draw(st.integers(0, 9)))
    return torch.randn(batch, frames, draw(st.integers(1, 5))), alphas, mask


def check(out, rows, hidden):
    for b, row in enumerate(rows):
        count = row.tokens.shape[0]
        assert out.lengths[b] == count
        assert out.attention_mask[b].tolist() == [n < count for n in range(len(out.fire_times[b]))]
        torch.testing.assert_close(
            out.hidden_states[b, :count].double(), row.tokens, rtol=1e-5, atol=1e-5
        )
        assert not out.hidden_states[b, count:].any()
        torch.testing.assert_close(
            out.fire_times[b, :count].double(), torch.tensor(row.times).double(), rtol=0, atol=1e-5
        )
        assert not out.fire_times[b, count:].any()


@settings(deadline=None, max_examples=60)
@given(
    batches(),
    st.sampled_from(TAILS),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([1.0, 0.5, 0.8, 1.3]),
)
def test_free_lengths_match_the_oracle(oracle, batch, tail, tail_threshold, threshold):
    hidden, alphas, mask = batch
    options = {"threshold": threshold, "tail": tail, "tail_threshold": tail_threshold}
    rows = [oracle(h, a, m, **options) for h, a, m in zip(hidden, alphas, mask, strict=True)]
    if threshold in (0.8, 1.3):  # alpha / threshold is rounded, and the oracle's is not
        assume(all(row.margin > 1e-9 for row in rows))
    check(cif(hidden, alphas, attention_mask=mask, **options), rows, hidden)


def edges_meet(alphas, mask, count):
    """Whether a token ends, to rounding, where a frame does before the last one that counts."""
    levels = (alphas.double() * mask).cumsum(0)
    levels = levels * count / levels[-1].clamp(min=1e-9)
    inside = (levels > 1e-9) & (levels < count - 1e-9)
    return bool((inside & ((levels - levels.round()).abs() < 1e-9)).any())


@settings(deadline=None, max_examples=60)
@given(batches(), st.lists(st.integers(0, 9), min_size=3, max_size=3), st.sampled_from([1.0, 0.7]))
def test_target_lengths_match_the_oracle(oracle, batch, targets, threshold):
    hidden, alphas, mask = batch
    targets = torch.tensor(targets[: len(hidden)])
    if (
        threshold == 0.7
    ):  # alpha / threshold is rounded: the next frame with weight may end the token
        assume(not any(map(edges_meet, alphas, mask, targets)))
    out = cif(
        hidden, alphas, attention_mask=mask.long(), target_lengths=targets, threshold=threshold
    )
    rows = [
        oracle(h, a, m, target=int(n), threshold=threshold)
        for h, a, m, n in zip(hidden, alphas, mask, targets, strict=True)
    ]
    check(out, rows, hidden)


def test_known_values():
    # Frame 1 is shared between two tokens; frame 3 ends one and makes two whole ones.
    hidden = torch.eye(4)[None]
    out = cif(hidden, torch.tensor([[0.5, 0.75, 0.25, 2.5]]), tail="drop")
    expected = torch.tensor(
        [[0.5, 0.5, 0, 0], [0, 0.25, 0.25, 0.5], [0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float32
    )
    assert torch.equal(out.hidden_states[0], expected)
    torch.testing.assert_close(out.fire_times[0], torch.tensor([1 + 2 / 3, 3.2, 3.6, 4.0]))
    assert out.alpha_sum.tolist() == [4.0]


@pytest.mark.parametrize(("tail", "last"), [("keep", 0.6), ("threshold", 1.0)])
def test_the_rest_is_kept_or_made_whole(tail, last):
    out = cif(torch.ones(1, 4, 1), torch.full((1, 4), 0.4), tail=tail)
    torch.testing.assert_close(out.hidden_states.flatten(), torch.tensor([1.0, last]))
    assert out.fire_times[0, 1] == 4.0


def test_every_row_of_thousands_fires_exactly_its_target():
    torch.manual_seed(0)
    rows, frames = 4000, 400
    targets = torch.randint(1, 80, (rows,))
    alphas = torch.rand(rows, frames) * torch.rand(rows, 1)
    out = cif(torch.ones(rows, frames, 1), alphas, target_lengths=targets)
    assert torch.equal(out.lengths, targets)
    # alpha * (N / sum), summed again, fails this in nearly half of the rows
    prefix = scale_prefix(fixed_point_prefix(alphas, 1.0), targets)
    assert torch.equal(prefix[:, -1], targets * ONE)
    assert (prefix.diff() >= 0).all()
    # Each token is whole, the last one included: where one is lost, its sum is 0 or a fraction.
    mass = out.hidden_states[..., 0]
    torch.testing.assert_close(mass[out.attention_mask], torch.ones(int(targets.sum())))
    assert not mass[~out.attention_mask].any()


def test_no_drift_over_twenty_thousand_frames():
    torch.manual_seed(0)
    frames = 20_000
    alphas = torch.rand(1, frames) * 0.4
    position = torch.arange(frames, dtype=torch.float64)[None, :, None]
    out = cif(position, alphas, tail="drop")
    exact = alphas.double().cumsum(1)[0]  # 40 bits behind the point would not fit into float32
    level = torch.arange(1, int(exact[-1]) + 1, dtype=torch.float64)
    frame = torch.searchsorted(exact, level)
    time = frame + 1 - (exact[frame] - level) / alphas.double()[0, frame]
    assert out.lengths.tolist() == [len(level)]
    torch.testing.assert_close(out.fire_times[0].double(), time, rtol=0, atol=1e-3)
    low = torch.cat([exact[:1] * 0, exact[:-1]])
    for n in (0, 1, 1999, len(level) - 1):
        weights = (exact.clamp(max=n + 1) - low.clamp(min=n)).clamp(min=0)
        torch.testing.assert_close(
            out.hidden_states[0, n, 0], weights @ position[0, :, 0], rtol=1e-9, atol=1e-6
        )


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_to_integrate_fires_nothing(tail):
    hidden = torch.randn(3, 5, 2)
    alphas = torch.tensor([[0.0] * 5, [0.7] * 5, [0.7] * 5])
    mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    out = cif(hidden, alphas, attention_mask=mask, tail=tail)
    assert out.lengths.tolist()[:2] == [0, 0]
    assert out.lengths[2] > 0
    assert not out.hidden_states[:2].any()
    assert out.alpha_sum.tolist()[:2] == [0.0, 0.0]


def test_targets_are_met_by_zeros_where_there_is_nothing_to_integrate():
    alphas = torch.tensor([[0.0] * 4, [0.5] * 4])
    mask = torch.tensor([[True] * 4, [False] * 4])
    out = cif(
        torch.full((2, 4, 3), float("nan")),
        alphas,
        attention_mask=mask,
        target_lengths=torch.tensor([5, 2]),
    )
    assert out.lengths.tolist() == [5, 2]
    assert out.attention_mask.sum(1).tolist() == [5, 2]
    assert torch.equal(out.hidden_states, torch.zeros(2, 5, 3))


def test_a_little_weight_still_makes_one_token():
    out = cif(torch.ones(1, 3, 1), torch.full((1, 3), 1e-4))
    assert out.lengths.tolist() == [1]
    torch.testing.assert_close(out.hidden_states.flatten(), torch.ones(1))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("targets", [False, True])
def test_empty_axes(shape, targets):
    hidden = torch.randn(shape, requires_grad=True)
    alphas = torch.rand(shape[:2], requires_grad=True)
    wanted = torch.full(shape[:1], 2) if targets else None
    out = cif(hidden, alphas, target_lengths=wanted)
    assert out.hidden_states.shape[::2] == shape[::2]
    (out.hidden_states.sum() + out.alpha_sum.sum()).backward()
    assert hidden.grad.shape == shape
    assert torch.equal(alphas.grad, torch.ones(shape[:2]))


def test_max_tokens_sets_the_length_and_cuts_off():
    hidden, alphas = torch.randn(2, 9, 3), torch.rand(2, 9)
    targets = torch.tensor([6, 2])
    full = cif(hidden, alphas, target_lengths=targets)
    cut = cif(hidden, alphas, target_lengths=targets, max_tokens=4)
    assert cut.lengths.tolist() == [4, 2]
    assert torch.equal(cut.hidden_states, full.hidden_states[:, :4])
    assert torch.equal(cut.fire_times, full.fire_times[:, :4])
    longer = cif(hidden, alphas, target_lengths=targets, max_tokens=8)
    assert longer.hidden_states.shape == (2, 8, 3)
    assert torch.equal(longer.hidden_states[:, :6], full.hidden_states)
    assert cif(hidden, alphas, max_tokens=0).hidden_states.shape == (2, 0, 3)


def test_no_rest_fires_nothing_however_low_the_bar():
    alphas = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    out = cif(torch.ones(2, 2, 1), alphas, tail="threshold", tail_threshold=1e-13)
    assert out.lengths.tolist() == [0, 2]
