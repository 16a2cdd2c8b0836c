"""The alpha heads: what each computes, chunk by chunk too, and noise on the logits."""

import math

import pytest
import torch

from cif import CIF
from cif.heads import alphas_from_logits

HEADS = ["last_channel", "conv", "mlp"]


def logits_by_hand(layer, frames):
    """One frame after the other, (T, D) to (T,), from the parameters alone."""
    if layer.alpha_head == "last_channel":
        return frames[:, -1]
    out = []
    for t in range(len(frames)):
        if layer.alpha_head == "conv":
            weight, reach = layer.alpha_conv.weight, layer.alpha_conv.weight.shape[-1] // 2
            inner = layer.alpha_conv.bias.clone()
            for k in range(-reach, reach + 1):
                if 0 <= t + k < len(frames):
                    inner = inner + weight[:, :, k + reach] @ frames[t + k]
            inner = inner.clamp(min=0)
        else:
            inner = layer.alpha_hidden.weight @ frames[t] + layer.alpha_hidden.bias
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        out.append(layer.alpha_linear.weight[0] @ inner + layer.alpha_linear.bias[0])
    return torch.stack(out)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("head", HEADS)
def test_each_head_computes_what_it_says(head, kernel_size):
    torch.manual_seed(0)
    layer = CIF(4, alpha_head=head, kernel_size=kernel_size)
    hidden = torch.randn(2, 9, 4)
    expected = torch.stack([logits_by_hand(layer, row) for row in hidden]).sigmoid()
    torch.testing.assert_close(layer.predict_alphas(hidden), expected)


@pytest.mark.parametrize("head", HEADS)
def test_chunks_with_their_neighbours_give_the_whole_row(head):
    torch.manual_seed(0)
    layer, hidden = CIF(4, alpha_head=head, kernel_size=5), torch.randn(2, 11, 4)
    reach = layer.alpha_context
    assert reach == (2 if head == "conv" else 0)
    padded = torch.nn.functional.pad(hidden, (0, 0, reach, reach))
    pieces = [
        layer.alpha_logits(padded[:, start : end + 2 * reach])
        for start, end in ((0, 1), (1, 6), (6, 7), (7, 11))
    ]
    whole = alphas_from_logits(torch.cat(pieces, dim=1))
    torch.testing.assert_close(whole, layer.predict_alphas(hidden))


@pytest.mark.parametrize("head", HEADS)
def test_low_precision_logits_become_float32_weights(head):
    layer = CIF(4, alpha_head=head).bfloat16()
    assert layer.predict_alphas(torch.randn(1, 5, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_noise_is_for_training_alone(head):
    torch.manual_seed(0)
    layer, hidden = CIF(4, alpha_head=head, alpha_noise=1.0), torch.randn(2, 9, 4)
    quiet = CIF(4, alpha_head=head)
    quiet.load_state_dict(layer.state_dict())
    assert torch.equal(quiet.predict_alphas(hidden), quiet.predict_alphas(hidden))
    assert not torch.equal(layer.predict_alphas(hidden), layer.predict_alphas(hidden))
    assert torch.equal(layer.eval().predict_alphas(hidden), quiet.predict_alphas(hidden))


def test_noise_has_the_deviation_asked_for_and_is_new_for_every_frame():
    torch.manual_seed(0)
    logits = torch.full((4, 5000), 0.3, dtype=torch.float64)
    added = alphas_from_logits(logits, noise=0.7).logit() - logits
    assert abs(float(added.mean())) < 0.02
    assert abs(float(added.std()) - 0.7) < 0.02
    assert added.unique().numel() == added.numel()


def test_noise_leaves_padding_without_weight_and_lets_gradients_through():
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    logits = torch.zeros(1, 7)
    logits[0, 4:] = float("nan")
    logits.requires_grad_()
    alphas = alphas_from_logits(logits, mask, noise=1.0)
    assert not alphas[~mask].any()
    alphas.sum().backward()
    real = alphas.detach()[mask]
    torch.testing.assert_close(logits.grad[mask], real * (1 - real))
    assert not logits.grad[~mask].any()


def test_noise_drives_weights_apart():
    """With noise, what fixes the sum of two frames no longer leaves the split between them open."""
    torch.manual_seed(0)

    def spread(noise):
        logits = torch.tensor([[0.5, -0.5]], requires_grad=True)
        optimiser = torch.optim.SGD([logits], lr=1.0)
        for _ in range(400):
            optimiser.zero_grad()
            alphas = alphas_from_logits(logits.expand(64, 2), noise=noise)
            (alphas.sum(1) - 1).square().mean().backward()
            optimiser.step()
        return float(logits.detach()[0, 0] - logits.detach()[0, 1])

    assert spread(0.0) == pytest.approx(1.0, abs=0.05)
    assert spread(1.0) > 4.0


@pytest.mark.parametrize("noise", [math.inf, math.nan])
def test_noise_without_a_deviation_is_refused(noise):
    with pytest.raises(ValueError, match="alpha_noise: expected a standard deviation"):
        CIF(4, alpha_noise=noise)
