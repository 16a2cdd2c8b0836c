"""FunASR's and BLSP-Emo's conventions against loops written from the published equations.

docs/cif.md says what was measured side by side with the two themselves.
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.cif.ragged import ROUNDING, batches, distance

from cif.compat import blsp_cif, funasr_cif, funasr_predictor


def peaks(alphas, threshold=1.0):
    """The accumulator of arXiv 1905.11235, one frame after the other, before it is emptied."""
    rows = []
    for row in alphas.double():
        level, row_peaks = 0.0, []
        for alpha in row.tolist():
            level += alpha
            row_peaks.append(level)
            while level >= threshold:
                level -= threshold
        rows.append(row_peaks)
    return torch.tensor(rows, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(batches(), st.sampled_from([1.0, 0.8]))
def test_funasr_without_target_lengths(oracle, batch, threshold):
    hidden, alphas, padding = batch
    alphas = alphas.masked_fill(padding, 0.0)
    level = alphas.double().cumsum(1) / threshold
    assume(min(distance(level), distance(level[:, -1] + 0.5)) > 1e-4)
    embeds, fires = funasr_cif(hidden, alphas, threshold)
    assert embeds.shape[1] == int(level[:, -1].max().round())
    torch.testing.assert_close(fires.double(), peaks(alphas, threshold), rtol=0, atol=ROUNDING)
    for row in range(len(hidden)):
        want = oracle(hidden[row], alphas[row], threshold=threshold, tail="drop").tokens
        torch.testing.assert_close(embeds[row, : len(want)].double(), want, rtol=0, atol=ROUNDING)
        assert not embeds[row, len(want) :].any()


@settings(deadline=None, max_examples=40)
@given(batches(), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_funasr_with_target_lengths(oracle, batch, targets):
    hidden, alphas, padding = batch
    targets = torch.tensor(targets[: len(hidden)])
    embeds, token_num, scaled, fires = funasr_predictor(hidden, alphas, ~padding, targets.float())
    alphas = alphas.masked_fill(padding, 0.0)
    torch.testing.assert_close(token_num, alphas.sum(1))
    torch.testing.assert_close(scaled.sum(1), targets.float())
    assert embeds.shape[1] == targets.max()
    for row, target in enumerate(targets.tolist()):
        walked = oracle(hidden[row], alphas[row], target=target)
        got = embeds[row, :target].double()
        torch.testing.assert_close(got, walked.tokens, rtol=0, atol=ROUNDING)
        assert not embeds[row, target:].any()
        done = torch.tensor(walked.times).ceil().long() - 1  # the frame that completes each token
        assert (fires[row] >= 1.0).nonzero().flatten().tolist() == done.unique().tolist()
    # scaled once more, they do not change: this is what FunASR's own line hands over
    again = funasr_cif(hidden, scaled, target_length=targets)
    torch.testing.assert_close(again[0], embeds, rtol=0, atol=ROUNDING)


def test_funasr_float_sums_lose_tokens_that_target_lengths_keep():
    torch.manual_seed(0)
    hidden, alphas = torch.ones(200, 100, 1), torch.rand(200, 100) * 0.5
    targets = torch.randint(5, 20, (200,))
    scaled = alphas * (targets / alphas.sum(1))[:, None]
    last = torch.arange(200), targets - 1
    assert (funasr_cif(hidden, scaled)[0][last] == 0).sum() > 20
    kept = funasr_cif(hidden, scaled, target_length=targets)[0][last]
    torch.testing.assert_close(kept, torch.ones(200, 1))


@settings(deadline=None, max_examples=40)
@given(batches(), st.booleans())
def test_funasr_tail(oracle, batch, masked):
    hidden, alphas, padding = batch
    if not masked:
        padding = torch.zeros_like(padding)
    end = 0.45
    sums = alphas.masked_fill(padding, 0.0).double().sum(1)
    assume(distance(sums + end) > 1e-4)
    embeds, token_num, out_alphas, peak = funasr_predictor(
        hidden, alphas, ~padding if masked else None, tail_threshold=end
    )
    assert torch.equal(token_num, (sums + end).floor().float())
    assert embeds.shape[1] == int(token_num.max())
    torch.testing.assert_close(peak.double(), peaks(out_alphas), rtol=0, atol=ROUNDING)
    for row, length in enumerate((~padding).sum(1).tolist()):
        weights = torch.cat([alphas[row, :length], torch.tensor([end])])
        frames = torch.cat([hidden[row, :length], torch.zeros(1, hidden.shape[2])])
        assert out_alphas[row, : length + 1].tolist() == weights.tolist()
        assert not out_alphas[row, length + 1 :].any()
        want = oracle(frames, weights, tail="drop").tokens
        torch.testing.assert_close(embeds[row, : len(want)].double(), want, rtol=0, atol=ROUNDING)
        assert not embeds[row, len(want) :].any()


def test_funasr_tail_does_not_read_padding():
    torch.manual_seed(0)
    hidden, alphas = torch.randn(2, 9, 3), torch.full((2, 9), 0.7)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    outs = []
    for content in (0.0, 5.0, float("nan")):
        filled = torch.where(mask[..., None], hidden, content)
        outs.append(funasr_predictor(filled, alphas, mask, tail_threshold=0.45)[0])
    assert outs[0][1, 2].any()  # the rest of the shorter row fires
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@settings(deadline=None, max_examples=40)
@given(batches(), st.lists(st.integers(0, 9), min_size=3, max_size=3), st.booleans())
def test_blsp_emo(oracle, batch, targets, given_lengths):
    hidden, alphas, padding = batch
    alphas = alphas.masked_fill(padding, 0.0)
    sums = alphas.double().sum(1)
    assume(distance(sums + 0.5) > 1e-4)
    lengths = torch.tensor(targets[: len(hidden)]) if given_lengths else None
    tokens, mask = blsp_cif(hidden, alphas, lengths)
    wanted = (sums.round() if lengths is None else lengths).clamp(min=1).long()
    assert mask.dtype == torch.int64
    assert mask.tolist() == (torch.arange(int(wanted.max())) < wanted[:, None]).long().tolist()
    for row, target in enumerate(wanted.tolist()):
        want = oracle(hidden[row], alphas[row], target=target).tokens
        torch.testing.assert_close(tokens[row, :target].double(), want, rtol=0, atol=ROUNDING)
        assert not tokens[row, target:].any()


def test_gradients_reach_frames_and_weights_through_every_function():
    torch.manual_seed(0)
    for function in (
        funasr_cif,
        blsp_cif,
        lambda h, a: funasr_predictor(h, a, tail_threshold=0.45),
    ):
        hidden = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
        alphas = (torch.rand(2, 20, dtype=torch.float64) * 0.6 + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(lambda h, a, f=function: f(h, a)[0], (hidden, alphas))


def test_half_precision_loses_no_token():
    hidden, alphas = torch.ones(1, 522, 2).bfloat16(), torch.full((1, 522), 0.5).bfloat16()
    assert funasr_cif(hidden, alphas)[0].shape[1] == 261
    assert blsp_cif(hidden, alphas)[1].sum() == 261
    embeds, token_num, *_ = funasr_predictor(hidden, alphas, tail_threshold=0.4)
    assert token_num.tolist() == [embeds.shape[1]] == [261]


def test_a_batch_without_rows():
    hidden, alphas = torch.ones(0, 5, 2), torch.ones(0, 5)
    assert funasr_cif(hidden, alphas)[0].shape == (0, 0, 2)
