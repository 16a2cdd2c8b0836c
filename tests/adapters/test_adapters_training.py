"""Gradients, precision and checkpoints of the adapters."""

import copy
from pathlib import Path

import pytest
import torch

from speech_adapters import CFormer, CFormerConfig, ConvSubsampler, ConvSubsamplerConfig

WIDTH, OUTPUT = 16, 24


def build(kind, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    if kind == "conv":
        config = ConvSubsamplerConfig(input_size=WIDTH, output_size=OUTPUT, bottleneck_size=8)
        return ConvSubsampler(config)
    config = CFormerConfig(
        input_size=WIDTH,
        output_size=OUTPUT,
        num_pre_layers=2,
        num_post_layers=2,
        num_heads=2,
        dropout=dropout,
        frame_stacking=2 if kind == "cformer-stacked" else 1,
        alpha_head="conv" if kind == "cformer-conv-alpha" else "last_channel",
        output_rms=0.5,
    )
    return CFormer(config)


def data():
    torch.manual_seed(3)
    frames = torch.randn(3, 20, WIDTH)
    mask = torch.arange(20) < torch.tensor([[20], [13], [6]])
    return frames, mask, torch.tensor([6, 4, 1])


ADAPTERS = ["cformer", "cformer-stacked", "cformer-conv-alpha", "conv"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_reach_every_parameter(kind):
    adapter = build(kind)
    frames, mask, targets = data()
    out = adapter(frames, mask, target_lengths=targets)
    loss = (out.hidden_states * torch.randn_like(out.hidden_states)).sum()
    if out.alpha_sum is not None:
        loss = loss + (out.alpha_sum - targets).abs().sum()
    loss.backward()
    silent = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("kind", ["cformer", "cformer-stacked", "cformer-conv-alpha"])
def test_the_sum_of_alpha_trains_what_predicts_alpha(kind):
    adapter = build(kind)
    frames, mask, targets = data()
    out = adapter(frames, mask, target_lengths=targets)
    # unscaled: the sum is not the target, or nothing would teach the length
    assert (out.alpha_sum - targets).abs().min() > 0.01
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    before = (out.alpha_sum - targets).abs().sum().item()
    for _ in range(40):
        optimizer.zero_grad()
        (adapter(frames, mask, target_lengths=targets).alpha_sum - targets).abs().sum().backward()
        optimizer.step()
    adapter.eval()
    free = adapter(frames, mask)
    assert (free.alpha_sum - targets).abs().sum().item() < 0.2 * before
    assert free.attention_mask.sum(1).tolist() == targets.tolist()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_bf16_autocast_stays_near_float32(kind):
    adapter = build(kind)
    frames, mask, targets = data()
    exact = adapter(frames, mask, target_lengths=targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = adapter(frames, mask, target_lengths=targets)
    assert rough.attention_mask.equal(exact.attention_mask)
    # bfloat16 keeps 8 bits: single entries err by a few of 2**-8 of the typical size
    scale = exact.hidden_states[exact.attention_mask].square().mean().sqrt()
    error = (rough.hidden_states.float() - exact.hidden_states).square().mean().sqrt()
    assert error < 0.05 * scale
    loss = rough.hidden_states.float().square().sum()
    if rough.alpha_sum is not None:
        assert rough.alpha_sum.dtype == torch.float32
        assert rough.fire_times.dtype == torch.float32
        torch.testing.assert_close(rough.alpha_sum, exact.alpha_sum, atol=0, rtol=0.02)
        loss = loss + rough.alpha_sum.sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_whole_adapter_in_bfloat16(kind):
    adapter = build(kind).bfloat16()
    frames, mask, targets = data()
    out = adapter(frames.bfloat16(), mask, target_lengths=targets)
    assert out.hidden_states.dtype == torch.bfloat16
    assert out.hidden_states.isfinite().all()
    out.hidden_states.float().sum().backward()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_state_dict_round_trip(kind, tmp_path: Path):
    frames, mask, targets = data()
    adapter, other = build(kind, seed=0).eval(), build(kind, seed=1).eval()
    wanted = adapter(frames, mask, target_lengths=targets).hidden_states
    assert not torch.allclose(other(frames, mask, target_lengths=targets).hidden_states, wanted)
    torch.save(adapter.state_dict(), tmp_path / "adapter.pt")
    other.load_state_dict(torch.load(tmp_path / "adapter.pt", weights_only=True), strict=True)
    got = other(frames, mask, target_lengths=targets).hidden_states
    assert got.equal(wanted)


def test_dropout_acts_in_training_only():
    adapter = build("cformer", dropout=0.3)
    frames, mask, targets = data()
    first, second = (adapter(frames, mask, target_lengths=targets) for _ in range(2))
    assert not first.hidden_states.equal(second.hidden_states)
    adapter.eval()
    first, second = (adapter(frames, mask, target_lengths=targets) for _ in range(2))
    assert first.hidden_states.equal(second.hidden_states)


def test_gradient_of_a_whole_cformer_is_the_slope():
    """A finite difference in float64 along random directions, through both Transformers and CIF."""
    adapter = build("cformer").double()
    frames, mask, targets = (t.double() if t.is_floating_point() else t for t in data())
    weights = torch.randn(3, 6, OUTPUT, dtype=torch.double)

    def loss(model):
        out = model(frames, mask, target_lengths=targets)
        return (out.hidden_states * weights).sum() + out.alpha_sum.sum()

    loss(adapter).backward()
    for seed in range(4):
        torch.manual_seed(seed)
        step, slope = 1e-6, 0.0
        ahead, behind = copy.deepcopy(adapter), copy.deepcopy(adapter)
        with torch.no_grad():
            for p, a, b in zip(
                adapter.parameters(), ahead.parameters(), behind.parameters(), strict=True
            ):
                direction = torch.randn_like(p)
                slope += (p.grad * direction).sum().item()
                a += step * direction
                b -= step * direction
            measured = (loss(ahead) - loss(behind)).item() / (2 * step)
        assert measured == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_noise_on_the_firing_weights_is_for_training_alone():
    torch.manual_seed(0)
    config = CFormerConfig(
        input_size=WIDTH,
        output_size=OUTPUT,
        num_pre_layers=0,
        num_post_layers=0,
        num_heads=2,
        dropout=0.0,
        alpha_noise=1.0,
    )
    adapter, (frames, mask, _) = CFormer(config), data()
    assert not torch.equal(adapter(frames, mask).alphas, adapter(frames, mask).alphas)
    adapter.eval()
    assert torch.equal(adapter(frames, mask).alphas, adapter(frames, mask).alphas)
