"""Lengths, shapes, initialisation, options and errors of the adapters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_adapters import (
    AdapterOutput,
    CFormer,
    CFormerConfig,
    ConvSubsampler,
    ConvSubsamplerConfig,
    Transformer,
)

WIDTH, OUTPUT = 8, 12


def cformer(**options):
    torch.manual_seed(0)
    defaults = {"num_pre_layers": 1, "num_post_layers": 1, "num_heads": 2}
    return CFormer(
        CFormerConfig(input_size=WIDTH, output_size=OUTPUT, **{**defaults, **options})
    ).eval()


def conv(**options):
    torch.manual_seed(0)
    defaults = {"bottleneck_size": 8}
    return ConvSubsampler(
        ConvSubsamplerConfig(input_size=WIDTH, output_size=OUTPUT, **{**defaults, **options})
    ).eval()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    targets=st.lists(st.integers(0, 25), min_size=3, max_size=3),
    stacking=st.integers(1, 4),
)
def test_target_lengths_are_met_exactly(lengths, targets, stacking):
    adapter = cformer(frame_stacking=stacking)
    frames = torch.randn(len(lengths), max(lengths), WIDTH)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    wanted = torch.tensor(targets[: len(lengths)])
    out = adapter(frames, mask, target_lengths=wanted)
    assert out.hidden_states.shape == (len(lengths), wanted.max(), OUTPUT)
    expected = torch.arange(int(wanted.max())) < wanted[:, None]
    assert out.attention_mask.dtype == torch.bool
    assert out.attention_mask.equal(expected)
    assert out.hidden_states[expected].ne(0).any(dim=-1).all()
    assert out.hidden_states[~expected].eq(0).all()


@pytest.mark.parametrize("total", [0.3, 1.0, 1.49, 1.6, 7.4, 12.0])
def test_free_running_length_is_the_rounded_sum_of_alpha(total):
    """With the alpha channel's logit set by hand, every frame weighs total / T."""
    frames = 16
    adapter = cformer(num_pre_layers=0)
    alpha = total / frames
    with torch.no_grad():
        adapter.pre_cif.norm.weight[-1] = 0.0
        adapter.pre_cif.norm.bias[-1] = math.log(alpha / (1 - alpha))
    out = adapter(torch.randn(2, frames, WIDTH))
    tokens = max(1, math.floor(total + 0.5))
    assert out.attention_mask.shape == (2, tokens)
    assert out.attention_mask.all()
    torch.testing.assert_close(out.alpha_sum, torch.full((2,), total), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.alphas, torch.full((2, frames), alpha), atol=1e-5, rtol=1e-4)
    # evenly spread weights end their tokens at even distances
    ends = torch.arange(1, tokens + 1) * frames / tokens
    torch.testing.assert_close(out.fire_times, ends.expand(2, -1), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("stacking", [2, 3, 4, 5])
@pytest.mark.parametrize("length", [1, 4, 11, 12, 13])
def test_frames_that_do_not_fill_a_stack_are_kept(stacking, length):
    adapter = cformer(frame_stacking=stacking)
    frames = torch.randn(1, length, WIDTH)
    out = adapter(frames, target_lengths=torch.tensor([3]))
    assert out.alphas.shape == (1, math.ceil(length / stacking))
    assert out.alphas.gt(0).all()
    # times are counted in frames of the input, and none lies past the clip's end
    assert out.fire_times[0, -1] == length
    assert out.fire_times.diff(dim=1).ge(0).all()
    # the last frame is heard
    other = frames.clone()
    other[0, -1] += 1.0
    changed = adapter(other, target_lengths=torch.tensor([3]))
    assert not torch.allclose(out.hidden_states, changed.hidden_states, atol=1e-4)


def test_stacking_lays_neighbours_side_by_side():
    adapter = cformer(frame_stacking=2, hidden_size=16)
    seen = []
    adapter.input_projection.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    frames = torch.arange(3 * WIDTH, dtype=torch.float).view(1, 3, WIDTH)
    adapter(frames)
    expected = torch.stack([torch.cat([frames[0, 0], frames[0, 1]]), torch.zeros(2 * WIDTH)])
    expected[1, :WIDTH] = frames[0, 2]
    assert seen[0].equal(expected[None])


@pytest.mark.parametrize("length", range(1, 35))
@pytest.mark.parametrize("options", [{}, {"num_layers": 1}, {"kernel_size": 1}, {"kernel_size": 3}])
def test_conv_subsampler_length(length, options):
    adapter = conv(**options)
    factor = 2**adapter.config.num_layers
    out = adapter(torch.randn(1, length, WIDTH))
    assert out.hidden_states.shape == (1, math.ceil(length / factor), OUTPUT)
    assert out.attention_mask.all()
    padded = adapter(torch.randn(2, 34, WIDTH), torch.arange(34) < torch.tensor([[length], [34]]))
    assert padded.attention_mask.sum(1).tolist() == [
        math.ceil(length / factor),
        math.ceil(34 / factor),
    ]


def test_conv_subsampler_has_no_cif_fields():
    out = conv()(torch.randn(2, 20, WIDTH), target_lengths=torch.tensor([1, 2]), max_tokens=2)
    assert isinstance(out, AdapterOutput)
    assert out.alpha_sum is None
    assert out.fire_times is None
    assert out.alphas is None
    assert out.hidden_states.shape[1] == 3


def test_max_tokens_sets_the_output_length():
    adapter, frames = cformer(), torch.randn(2, 9, WIDTH)
    targets = torch.tensor([2, 5])
    wide = adapter(frames, target_lengths=targets, max_tokens=7)
    exact = adapter(frames, target_lengths=targets)
    assert wide.hidden_states.shape == (2, 7, OUTPUT)
    torch.testing.assert_close(wide.hidden_states[:, :5], exact.hidden_states, atol=1e-5, rtol=1e-4)
    assert wide.attention_mask[:, 5:].logical_not().all()


@pytest.mark.parametrize("adapter", [CFormer, ConvSubsampler])
@pytest.mark.parametrize("rms", [0.02, 3.0])
def test_output_rms_is_what_the_outputs_have_at_initialisation(adapter, rms):
    torch.manual_seed(0)
    config = CFormerConfig if adapter is CFormer else ConvSubsamplerConfig
    model = adapter(config(input_size=128, output_size=192, output_rms=rms)).eval()
    out = model(torch.randn(4, 60, 128), target_lengths=torch.full((4,), 15))
    measured = out.hidden_states[out.attention_mask].square().mean().sqrt().item()
    assert measured == pytest.approx(rms, rel=0.1)


def test_alpha_sum_counts_tokens_under_any_threshold():
    whole, half = cformer(), cformer(threshold=0.5)
    frames = torch.randn(2, 12, WIDTH)
    one, two = whole(frames), half(frames)
    torch.testing.assert_close(two.alpha_sum, 2 * one.alpha_sum)
    assert two.attention_mask.sum(1).tolist() == two.alpha_sum.add(0.5).floor().long().tolist()


def test_no_positions_beyond_distances():
    """Rotary positions: a clip shifted into padding comes out the same."""
    torch.manual_seed(0)
    transformer = Transformer(2, WIDTH, 2, 16).eval()
    frames = torch.randn(1, 6, WIDTH)
    shifted = torch.cat([torch.full((1, 5, WIDTH), float("nan")), frames], dim=1)
    early = transformer(frames, torch.ones(1, 6, dtype=torch.bool))
    late = transformer(shifted, torch.arange(11)[None] >= 5)
    torch.testing.assert_close(late[:, 5:], early, atol=1e-5, rtol=1e-4)
    assert late[:, :5].eq(0).all()


def test_order_of_frames_matters():
    transformer = Transformer(1, WIDTH, 2, 16).eval()
    frames, mask = torch.randn(1, 6, WIDTH), torch.ones(1, 6, dtype=torch.bool)
    assert not torch.allclose(transformer(frames, mask).flip(1), transformer(frames.flip(1), mask))


@pytest.mark.parametrize("make", [cformer, conv], ids=["cformer", "conv"])
@pytest.mark.parametrize(
    ("frames", "mask", "message"),
    [
        ((2, 5, WIDTH + 1), None, r"expected \(B, T, 8\), got \(2, 5, 9\).*input_size"),
        ((5, WIDTH), None, r"expected \(B, T, 8\), got \(5, 8\)"),
        ((2, 0, WIDTH), None, r"at least one frame"),
        ((2, 5, WIDTH), (2, 6), r"attention_mask: expected \(B, T\) = \(2, 5\), got \(2, 6\)"),
        ((2, 5, WIDTH), (5,), r"attention_mask"),
    ],
)
def test_wrong_shapes_are_named(make, frames, mask, message):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(frames), mask)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CFormerConfig, {"input_size": 0}, "input_size"),
        (CFormerConfig, {"output_size": -1}, "output_size"),
        (CFormerConfig, {"hidden_size": 0}, "hidden_size"),
        (CFormerConfig, {"ffn_size": 0}, "ffn_size"),
        (CFormerConfig, {"num_heads": 0}, "num_heads"),
        (CFormerConfig, {"frame_stacking": 0}, "frame_stacking"),
        (CFormerConfig, {"num_pre_layers": -1}, "num_pre_layers"),
        (CFormerConfig, {"num_post_layers": -1}, "num_post_layers"),
        (CFormerConfig, {"dropout": 1.0}, "dropout"),
        (CFormerConfig, {"output_rms": 0.0}, "output_rms"),
        (ConvSubsamplerConfig, {"input_size": 0}, "input_size"),
        (ConvSubsamplerConfig, {"num_layers": 0}, "num_layers"),
        (ConvSubsamplerConfig, {"kernel_size": 4}, "kernel_size"),
        (ConvSubsamplerConfig, {"bottleneck_size": 0}, "bottleneck_size"),
        (ConvSubsamplerConfig, {"output_rms": -1.0}, "output_rms"),
    ],
)
def test_impossible_configurations_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**{"input_size": WIDTH, "output_size": OUTPUT, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "hidden_size=8 must be a multiple of 2 \\* num_heads=6"),
        ({"alpha_head": "first_channel"}, "alpha_head"),
        ({"alpha_noise": -1.0}, "alpha_noise"),
        ({"tail": "wag"}, "tail"),
        ({"threshold": 0.0}, "threshold"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cformer(**options)
