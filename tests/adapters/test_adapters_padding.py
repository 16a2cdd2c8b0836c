"""Padding must not matter: not its amount, not its content, not to values and not to gradients."""

import pytest
import torch

from speech_adapters import (
    CFormer,
    CFormerConfig,
    ConvSubsampler,
    ConvSubsamplerConfig,
    Transformer,
)

WIDTH, OUTPUT = 16, 24
ADAPTERS = ["cformer", "cformer-stacked", "cformer-conv-alpha", "cformer-mlp-alpha", "conv"]


def build(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "conv":
        config = ConvSubsamplerConfig(input_size=WIDTH, output_size=OUTPUT, bottleneck_size=8)
        return ConvSubsampler(config).eval()
    heads = {"cformer-conv-alpha": "conv", "cformer-mlp-alpha": "mlp"}
    config = CFormerConfig(
        input_size=WIDTH,
        output_size=OUTPUT,
        num_pre_layers=2,
        num_post_layers=1,
        num_heads=2,
        frame_stacking=3 if kind == "cformer-stacked" else 1,
        alpha_head=heads.get(kind, "last_channel"),
    )
    return CFormer(config).eval()


def batch(lengths, total=None, seed=1):
    """Clips side by side, with noise in the padding."""
    torch.manual_seed(seed)
    total = total or max(lengths)
    frames = torch.randn(len(lengths), total, WIDTH)
    return frames, torch.arange(total) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("known", [True, False], ids=["target-lengths", "free-running"])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_batch_equals_single(kind, known, extra):
    adapter = build(kind)
    lengths, targets = [23, 8, 1, 14], torch.tensor([5, 2, 1, 6])
    frames, mask = batch(lengths, total=max(lengths) + extra)
    together = adapter(frames, mask, target_lengths=targets if known else None)
    for row, length in enumerate(lengths):
        target = targets[row : row + 1] if known else None
        alone = adapter(frames[row : row + 1, :length], target_lengths=target)
        count = alone.attention_mask.sum()
        assert together.attention_mask[row].sum() == count
        torch.testing.assert_close(
            together.hidden_states[row, :count],
            alone.hidden_states[0, :count],
            atol=2e-5,
            rtol=1e-4,
        )
        assert together.hidden_states[row, count:].eq(0).all()
        if kind != "conv":
            torch.testing.assert_close(together.alpha_sum[row], alone.alpha_sum[0])
            torch.testing.assert_close(
                together.fire_times[row, :count], alone.fire_times[0, :count], atol=1e-3, rtol=1e-4
            )


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_stands_in_padding_is_not_read(kind, poison):
    adapter = build(kind)
    frames, mask = batch([11, 4])
    targets = torch.tensor([3, 2])
    clean = adapter(frames, mask, target_lengths=targets)

    poisoned_frames = frames.masked_fill(~mask[..., None], poison).requires_grad_()
    poisoned = adapter(poisoned_frames, mask, target_lengths=targets)
    torch.testing.assert_close(poisoned.hidden_states, clean.hidden_states, atol=0, rtol=0)

    loss = poisoned.hidden_states.square().sum()
    if poisoned.alpha_sum is not None:
        loss = loss + poisoned.alpha_sum.sum()
    loss.backward()
    assert poisoned_frames.grad.isfinite().all()
    assert poisoned_frames.grad[~mask].eq(0).all()
    assert poisoned_frames.grad[mask].ne(0).any(dim=-1).all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("known", [True, False], ids=["target-lengths", "free-running"])
def test_a_row_of_padding_alone_gives_zeros_and_finite_gradients(kind, known):
    adapter = build(kind).train()
    frames, mask = batch([9, 0])
    frames.requires_grad_()
    out = adapter(frames, mask, target_lengths=torch.tensor([4, 0]) if known else None)
    assert not out.attention_mask[1].any()
    assert out.hidden_states[1].eq(0).all()
    assert out.hidden_states[0].ne(0).any()
    loss = out.hidden_states.square().sum()
    if out.alpha_sum is not None:
        assert out.alpha_sum[1] == 0
        loss = loss + out.alpha_sum.sum()
    loss.backward()
    assert frames.grad[1].eq(0).all()
    assert frames.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_whole_batch_of_padding_is_no_fault(kind):
    adapter = build(kind)
    out = adapter(torch.full((2, 6, WIDTH), float("nan")), torch.zeros(2, 6, dtype=torch.bool))
    assert not out.attention_mask.any()
    assert out.hidden_states.eq(0).all()
    out.hidden_states.sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_integer_masks_mean_what_bool_masks_mean(kind):
    adapter = build(kind)
    frames, mask = batch([11, 4])
    targets = torch.tensor([3, 2])
    as_bool = adapter(frames, mask, target_lengths=targets)
    as_int = adapter(frames, mask.long(), target_lengths=targets)
    torch.testing.assert_close(as_int.hidden_states, as_bool.hidden_states, atol=0, rtol=0)
    torch.testing.assert_close(as_int.attention_mask, as_bool.attention_mask)


def test_transformer_equals_attention_over_the_real_positions_alone():
    """The oracle is PyTorch's own attention with neither mask nor padding, rotated by hand."""
    torch.manual_seed(0)
    heads, width, length = 2, 16, 5
    transformer = Transformer(1, width, heads, 32).double().eval()
    frames = torch.randn(1, length + 4, width, dtype=torch.double)
    ours = transformer(frames, torch.arange(length + 4)[None] < length)[0, :length]

    layer, x = transformer.layers[0], frames[0, :length]
    q, k, v = layer.attention.qkv(layer.attention_norm(x)).chunk(3, dim=-1)
    size = width // heads
    mixed = torch.zeros(length, width, dtype=torch.double)
    for head in range(heads):
        channels = slice(head * size, (head + 1) * size)
        scores = torch.zeros(length, length, dtype=torch.double)
        for i in range(length):
            for j in range(length):
                for c in range(size // 2):
                    # as complex numbers, the pairs of channels turn by the distance i - j
                    a = torch.complex(q[i, channels][c], q[i, channels][c + size // 2])
                    b = torch.complex(k[j, channels][c], k[j, channels][c + size // 2])
                    turn = torch.tensor((i - j) * 10000.0 ** (-2 * c / size))
                    scores[i, j] += (a * b.conj() * torch.polar(torch.ones(()), turn)).real
        mixed[:, channels] = (scores / size**0.5).softmax(-1) @ v[:, channels]
    x = x + layer.attention.out(mixed)
    x = x + layer.ffn(layer.ffn_norm(x))
    torch.testing.assert_close(ours, transformer.norm(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_additive_mask_is_refused(kind):
    adapter, frames = build(kind), torch.randn(1, 8, WIDTH)
    with pytest.raises(TypeError, match=r"attention_mask: expected bool or integer.*mask == 0"):
        adapter(frames, torch.zeros(1, 8))


def test_fire_times_lie_within_the_clip_on_either_side_of_padding():
    adapter = build("cformer")
    torch.manual_seed(0)
    clip, padding = torch.randn(1, 30, WIDTH), torch.zeros(1, 20, WIDTH)
    real = torch.arange(50)[None]
    alone = adapter(clip).fire_times
    right = adapter(torch.cat([clip, padding], 1), real < 30).fire_times
    left = adapter(torch.cat([padding, clip], 1), real >= 20).fire_times
    torch.testing.assert_close(right, alone)
    torch.testing.assert_close(left, alone + 20)
