"""Each wrong argument gets one error that names it, what was expected and what came."""

import pytest
import torch

from cif import CIF, cif

HIDDEN, ALPHAS = torch.randn(2, 5, 3), torch.rand(2, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": HIDDEN[0]}, ValueError, r"hidden_states: expected shape \(B, T, D\)"),
        ({"hidden_states": HIDDEN.long()}, TypeError, r"hidden_states: .* got torch.int64"),
        ({"alphas": ALPHAS.long()}, TypeError, r"alphas: .* got torch.int64"),
        ({"alphas": ALPHAS[:, :4]}, ValueError, r"alphas: .*\(2, 5\).*got \(2, 4\)"),
        ({"alphas": ALPHAS[..., None]}, ValueError, r"alphas: .*squeeze"),
        ({"attention_mask": ALPHAS}, TypeError, r"attention_mask: .* got torch.float32"),
        ({"attention_mask": ALPHAS[:1] > 0}, ValueError, r"attention_mask: .*got \(1, 5\)"),
        ({"target_lengths": torch.tensor([1.0, 2.0])}, TypeError, r"target_lengths: .*\.long"),
        ({"target_lengths": torch.tensor([1])}, ValueError, r"target_lengths: .*got \(1,\)"),
        ({"target_lengths": torch.tensor([1, -1])}, ValueError, r"target_lengths: .*got -1"),
        ({"alphas": ALPHAS.to("meta")}, ValueError, r"alphas: expected device cpu.*got meta"),
        ({"threshold": 0.0}, ValueError, r"threshold: .*got 0.0"),
        ({"threshold": float("nan")}, ValueError, r"threshold: .*got nan"),
        ({"tail": "rest"}, ValueError, r"tail: expected one of round, .*got 'rest'"),
        ({"tail_threshold": 0.0}, ValueError, r"tail_threshold: .*keep"),
        ({"tail_threshold": 1.5}, ValueError, r"tail_threshold: .*got 1.5"),
        ({"max_tokens": -1}, ValueError, r"max_tokens: .*got -1"),
        ({"backend": "cuda"}, ValueError, r"backend: expected one of auto, .*, got 'cuda'"),
    ],
)
def test_function(change, error, message):
    with pytest.raises(error, match=message):
        cif(**{"hidden_states": HIDDEN, "alphas": ALPHAS} | change)


def test_more_tokens_than_fit_on_the_axis():
    with pytest.raises(ValueError, match=r"fewer than 8388608 tokens .* got 8388608; split"):
        cif(HIDDEN[..., :0], ALPHAS, max_tokens=1 << 22)
    assert cif(HIDDEN[..., :0], ALPHAS, max_tokens=(1 << 22) - 1).lengths.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 1}, r"hidden_size: expected at least 2"),
        ({"alpha_head": "dense"}, r"alpha_head: expected one of last_channel.*got 'dense'"),
        ({"alpha_noise": -0.1}, r"alpha_noise: .*got -0.1"),
        ({"alpha_head": "conv", "kernel_size": 4}, r"kernel_size: .*odd.*got 4"),
        ({"output_size": 0}, r"output_size: .*got 0"),
        ({"threshold": -1.0}, r"threshold: .*got -1.0"),
        ({"tail": "none"}, r"tail: .*got 'none'"),
    ],
)
def test_layer(change, message):
    with pytest.raises(ValueError, match=message):
        CIF(**{"hidden_size": 4} | change)


def test_layer_names_the_width_it_was_made_for():
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \(B, T, 4\), got"):
        CIF(4)(HIDDEN)


@pytest.mark.parametrize("head", ["last_channel", "conv", "mlp"])
def test_layer_checks_the_mask_before_it_is_used(head):
    layer = CIF(HIDDEN.shape[-1], alpha_head=head)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, T\)"):
        layer(HIDDEN, torch.ones(HIDDEN.shape[0], HIDDEN.shape[1] - 1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attention_mask: expected bool or integer"):
        layer(HIDDEN, torch.zeros(HIDDEN.shape[:2]))
