"""`cif.compat.torch_cif` against the installed torch-cif, and where it deliberately differs."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.cif.ragged import ROUNDING, batches, distance
from torch_cif import cif_function

from cif.compat import torch_cif

EPS = 1e-4  # torch-cif scales alpha to a sum of beta * N + EPS
# The edges of a token then lie up to EPS of weight too early, one at either end, and the weights
# within it are up to a factor 1 + EPS / (beta * N) too large: at most 3 * EPS of weight in all.
MOVED = 3 * EPS


@settings(deadline=None, max_examples=60)
@given(batches(), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.sampled_from([1.0, 0.6]))
def test_torch_cif_with_target_lengths(batch, targets, beta):
    hidden, alphas, padding = batch
    targets = torch.tensor(targets[: len(hidden)])
    theirs, ours = (
        function(hidden, alphas, beta, 0.5, padding, targets)
        for function in (cif_function, torch_cif)
    )
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["cif_lengths"][0], theirs["cif_lengths"][0])
    assert ours["tail_weights"] == theirs["tail_weights"] == []
    mine = torch.arange(int(targets.max())) < targets[:, None]
    atol = MOVED * float(hidden.abs().max()) + ROUNDING
    close = {"rtol": 0, "atol": atol}
    torch.testing.assert_close(ours["cif_out"][0][mine], theirs["cif_out"][0][mine], **close)
    atol = MOVED * alphas.shape[1] / beta + 1e-3 * ROUNDING
    torch.testing.assert_close(
        ours["delays"][0][mine], theirs["delays"][0][mine], rtol=1e-5, atol=atol
    )
    for name in ("alpha_sum", "scaled_alpha", "cumsum_alpha"):
        atol = ROUNDING + (0 if name == "alpha_sum" else EPS)
        torch.testing.assert_close(ours[name][0], theirs[name][0], rtol=1e-5, atol=atol)


@settings(deadline=None, max_examples=80)
@given(batches(), st.sampled_from([(1.0, 0.5), (0.6, 0.5), (0.3, 0.1), (0.6, 0.9)]))
def test_torch_cif_without_target_lengths(batch, thresholds):
    hidden, alphas, padding = batch
    beta, tail_thres = thresholds
    level = alphas.masked_fill(padding, 0.0).double().cumsum(1) / beta
    # float32 sums may fall on the other side of a threshold
    assume(distance(level) > 1e-4)
    assume(((level[:, -1] % 1) * beta - tail_thres).abs().min() > 1e-4)
    theirs, ours = (
        function(hidden, alphas, beta, tail_thres, padding)
        for function in (cif_function, torch_cif)
    )
    assert ours.keys() == theirs.keys()
    whole = torch.arange(ours["delays"][0].shape[1]) < level[:, -1:].floor()
    for name, (value,) in theirs.items():
        assert ours[name][0].dtype == value.dtype
        got, want = ours[name][0], value
        if name == "delays":  # of the tail: a test of its own
            got, want = got[whole], want[whole]
        scale = 1 / (tail_thres if name == "cif_out" else 1)
        rtol = 1e-4 if name == "delays" else 1e-5
        torch.testing.assert_close(got, want, rtol=rtol, atol=ROUNDING * scale)


@pytest.mark.parametrize("targets", [None, torch.tensor([4, 7])])
def test_torch_cif_gradients(targets):
    torch.manual_seed(0)
    hidden, alphas = torch.randn(2, 40, 3), torch.rand(2, 40) * 0.4
    weights = torch.randn(2, 20, 3)
    grads = []
    for function in (cif_function, torch_cif):
        leaves = hidden.clone().requires_grad_(), alphas.clone().requires_grad_()
        # no tail fires: see below
        out = function(*leaves, 1.0, 2.0, target_lengths=targets)
        tokens, lengths = out["cif_out"][0], out["cif_lengths"][0]
        mine = torch.arange(tokens.shape[1]) < lengths[:, None]
        loss = (tokens * weights[:, : tokens.shape[1]])[mine].sum()
        loss = loss + out["delays"][0][mine].square().sum() + out["alpha_sum"][0].square().sum()
        for name in ("scaled_alpha", "tail_weights"):
            loss = loss + sum((t * torch.arange(1, 1 + t.shape[-1])).sum() for t in out[name])
        grads.append(torch.autograd.grad(loss, leaves))
    largest = float(weights.abs().max())
    (theirs_h, theirs_a), (ours_h, ours_a) = grads
    torch.testing.assert_close(ours_h, theirs_h, rtol=0, atol=MOVED * largest)
    torch.testing.assert_close(ours_a, theirs_a, rtol=2e-3, atol=2e-3 * float(ours_a.abs().max()))


def test_torch_cif_leaves_the_surplus_in_rows_of_padding():
    hidden, alphas = torch.ones(2, 50, 1), torch.full((2, 50), 0.3)
    targets = torch.tensor([3, 6])
    theirs, ours = (
        function(hidden, alphas, target_lengths=targets)["cif_out"][0][0, :, 0]
        for function in (cif_function, torch_cif)
    )
    assert theirs[3] == pytest.approx(EPS, rel=0.05)
    assert ours[3:].tolist() == [0.0, 0.0, 0.0]


def test_torch_cif_fails_where_a_row_has_no_weight():
    hidden, alphas = torch.randn(2, 6, 3), torch.zeros(2, 6)
    alphas[0] = 0.5
    targets = torch.tensor([3, 5])
    with pytest.raises(RuntimeError, match="index"):
        cif_function(hidden, alphas, target_lengths=targets)
    ours = torch_cif(hidden, alphas, target_lengths=targets)
    assert ours["cif_lengths"][0].tolist() == [3, 5]
    assert not ours["cif_out"][0][1].any()
    assert not any(value[0].isnan().any() for value in ours.values() if value)


def test_torch_cif_refuses_left_padding():
    torch.manual_seed(0)
    hidden, alphas = torch.randn(1, 12, 3), torch.rand(1, 12)
    left, targets = torch.arange(12)[None] < 4, torch.tensor([5])
    with pytest.raises(AssertionError, match="right-padded"):
        cif_function(hidden, alphas, padding_mask=left, target_lengths=targets)
    ours, moved = (
        torch_cif(*args, target_lengths=targets)
        for args in ((hidden, alphas, 1.0, 0.5, left), (hidden[:, 4:], alphas[:, 4:]))
    )
    assert torch.equal(ours["cif_out"][0], moved["cif_out"][0])
    torch.testing.assert_close(ours["delays"][0], moved["delays"][0] + 4)


def test_the_delay_of_a_tail_lies_after_the_token_before_it():
    hidden, alphas = torch.ones(1, 9, 1), torch.full((1, 9), 0.4)  # three tokens and 0.6
    theirs, ours = (
        function(hidden, alphas)["delays"][0][0] for function in (cif_function, torch_cif)
    )
    torch.testing.assert_close(ours, torch.tensor([1.8, 4.2, 6.8, (0.2 * 8 + 0.4 * 9) / 0.6]))
    torch.testing.assert_close(theirs[:3], ours[:3])
    assert theirs[3] < theirs[2] < ours[3]


def test_the_gradient_of_a_tail_is_that_of_what_is_returned():
    """A token that is only a tail is made whole, so scaling its alphas changes nothing."""
    torch.manual_seed(0)
    slopes = []
    for function in (cif_function, torch_cif):
        alphas = torch.full((1, 4), 0.2, requires_grad=True)
        tokens = function(torch.ones(1, 4, 1), alphas)["cif_out"][0]
        torch.testing.assert_close(tokens, torch.ones(1, 1, 1))
        (gradient,) = torch.autograd.grad(tokens.sum(), alphas)
        slopes.append(float((gradient * alphas).sum().detach()))
    assert slopes[0] == pytest.approx(1.0)
    assert slopes[1] == pytest.approx(0.0, abs=1e-6)


def test_bfloat16_loses_no_more_than_the_output_is_rounded():
    torch.manual_seed(1)
    hidden, alphas = torch.randn(1, 500, 8).bfloat16(), (torch.rand(1, 500) * 0.5).bfloat16()
    targets = torch.tensor([40])
    truth = torch_cif(hidden.double(), alphas.double(), target_lengths=targets)["cif_out"][0]
    theirs, ours = (
        float(
            (f(hidden, alphas, target_lengths=targets)["cif_out"][0].double() - truth).abs().max()
        )
        for f in (cif_function, torch_cif)
    )
    assert ours <= float((truth - truth.bfloat16().double()).abs().max()) + 1e-6
    assert ours < theirs


def test_torch_cif_of_bad_values_and_options():
    hidden, alphas = torch.ones(2, 5, 1), torch.full((2, 5), 0.5)
    alphas[1, 2] = float("nan")
    out = torch_cif(hidden, alphas)
    assert out["cif_out"][0][1].isnan().any()
    assert not out["cif_out"][0][0].isnan().any()
    assert not out["right_indices"][0][1].any()
    assert torch_cif(hidden[:, :0], alphas[:, :0])["cif_lengths"][0].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"tail_thres: expected above 0, got 0\.0"):
        torch_cif(hidden, alphas, tail_thres=0.0)
    with pytest.raises(ValueError, match="threshold: expected a finite number above 0"):
        torch_cif(hidden, alphas, beta=0.0)
