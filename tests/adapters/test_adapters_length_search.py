"""The length under which outputs look most like tokens."""

import pytest
import torch

from speech_adapters import CFormer, CFormerConfig, search_length

WIDTH, OUTPUT = 8, 12


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    config = CFormerConfig(
        input_size=WIDTH, output_size=OUTPUT, num_pre_layers=1, num_post_layers=1, num_heads=2
    )
    return CFormer(config).eval()


def clips():
    torch.manual_seed(1)
    return torch.randn(3, 20, WIDTH), torch.arange(20) < torch.tensor([[20], [9], [14]])


def sure_at(length):
    """Outputs are tokens where there are so many of them (padding counts as one here)."""
    return lambda outputs: torch.full(outputs.shape[:2], 0.0 if outputs.shape[1] == length else -9)


def test_without_weight_the_length_is_the_rounded_sum(adapter):
    frames, mask = clips()
    found = search_length(adapter, frames, mask, confidence=sure_at(1), weight=0.0)
    wanted = adapter(frames, mask)
    assert found.attention_mask.sum(1).equal(found.alpha_sum.round().long())
    for name in ("hidden_states", "attention_mask", "alpha_sum", "fire_times", "alphas"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
def test_the_surest_length_within_reach_is_taken(adapter, offset):
    frames, _ = clips()
    predicted = adapter(frames[:1]).attention_mask.sum()
    wanted = int(predicted) + offset
    found = search_length(adapter, frames[:1], confidence=sure_at(wanted), weight=10.0)
    expected = adapter(frames[:1], target_lengths=torch.tensor([wanted]))
    for name in ("hidden_states", "attention_mask", "alpha_sum", "fire_times", "alphas"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    beyond = search_length(adapter, frames[:1], confidence=sure_at(wanted), weight=10.0, radius=0)
    assert beyond.attention_mask.sum() == predicted


def test_distance_from_the_sum_counts_against_confidence(adapter):
    frames, _ = clips()
    out = adapter(frames[:1])
    predicted, total = int(out.attention_mask.sum()), out.alpha_sum[0].item()
    costs = (predicted + 1 - total) ** 2 - (predicted - total) ** 2
    for weight, wanted in ((costs / 9 * 0.99, predicted), (costs / 9 * 1.01, predicted + 1)):
        found = search_length(adapter, frames[:1], confidence=sure_at(predicted + 1), weight=weight)
        assert found.attention_mask.sum() == wanted


def test_a_clip_has_the_same_length_alone_and_in_a_batch(adapter):
    frames, mask = clips()
    table = torch.nn.functional.normalize(torch.randn(50, OUTPUT), dim=-1)

    def confidence(outputs):
        return (
            (30 * torch.nn.functional.normalize(outputs, dim=-1) @ table.T).log_softmax(-1).amax(-1)
        )

    together = search_length(adapter, frames, mask, confidence=confidence, weight=20.0)
    lengths = together.attention_mask.sum(1).tolist()
    assert lengths != adapter(frames, mask).attention_mask.sum(1).tolist()
    assert together.hidden_states[~together.attention_mask].eq(0).all()
    for i, length in enumerate(lengths):
        frame_count = int(mask[i].sum())
        alone = search_length(
            adapter, frames[i : i + 1, :frame_count], confidence=confidence, weight=20.0
        )
        assert alone.attention_mask.sum() == length
        torch.testing.assert_close(
            alone.hidden_states[0], together.hidden_states[i, :length], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(alone.fire_times[0], together.fire_times[i, :length])


def test_no_length_is_below_one_and_no_weight_gives_no_token(adapter):
    frames, _ = clips()
    for confidence in (sure_at(1), sure_at(100)):  # the latter would like no outputs at all
        found = search_length(
            adapter, frames[:1, :2], confidence=confidence, weight=100.0, radius=5
        )
        assert found.attention_mask.sum() == 1
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    found = search_length(adapter, frames[:1, :4], nothing, confidence=sure_at(1), weight=1.0)
    assert found.hidden_states.shape == (1, 0, OUTPUT)


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"weight": 1.0, "radius": -1}])
def test_negative_options_are_refused(adapter, options):
    with pytest.raises(ValueError, match="weight and radius must not be negative"):
        search_length(adapter, clips()[0], confidence=sure_at(1), **options)


def test_of_equal_scores_the_predicted_length_is_taken(adapter, monkeypatch):
    def halfway(frames, mask=None):
        return torch.full(frames.shape[:2], 0.125)

    frames = torch.randn(1, 20, WIDTH)
    monkeypatch.setattr(adapter.cif, "predict_alphas", halfway)
    # 2.5 tokens are rounded up, and 2 are as near
    assert adapter(frames).attention_mask.sum() == 3
    found = search_length(adapter, frames, confidence=sure_at(1), weight=0.0)
    assert found.attention_mask.sum() == 3
