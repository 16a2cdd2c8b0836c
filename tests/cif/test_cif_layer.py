import pytest
import torch

from cif import CIF, CIFOutput, cif

HEADS = ["last_channel", "conv", "mlp"]


@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_fields(head):
    layer = CIF(8, alpha_head=head, output_size=5)
    hidden = torch.randn(3, 20, 8)
    mask = torch.arange(20) < torch.tensor([[20], [7], [0]])
    out = layer(hidden, mask, target_lengths=torch.tensor([6, 2, 0]))
    assert isinstance(out, CIFOutput)
    assert out.hidden_states.shape == (3, 6, 5)
    assert out.lengths.tolist() == [6, 2, 0]
    assert not out.hidden_states[~out.attention_mask].any()
    assert out.alphas.shape == (3, 20)
    assert out.alphas.dtype == torch.float32
    assert not out.alphas[~mask].any()
    assert ((out.alphas[mask] > 0) & (out.alphas[mask] < 1)).all()
    torch.testing.assert_close(out.alphas.sum(1), out.alpha_sum)
    free = layer(hidden, mask)
    assert free.lengths[2] == 0
    assert layer(hidden, mask, max_tokens=4).hidden_states.shape == (3, 4, 5)


def test_last_channel_is_the_papers_layout():
    layer, hidden = CIF(6, threshold=0.9, tail="keep"), torch.randn(2, 15, 6)
    out = layer(hidden)
    alphas = hidden[..., -1].sigmoid()
    expected = cif(hidden[..., :-1].contiguous(), alphas, threshold=0.9, tail="keep")
    projected = layer.projection(expected.hidden_states)
    torch.testing.assert_close(
        out.hidden_states[out.attention_mask], projected[expected.attention_mask]
    )
    assert torch.equal(out.alphas, alphas)
    assert sum(p.numel() for p in layer.parameters()) == 6 * 5 + 6


def test_conv_integrates_every_channel():
    layer, hidden = CIF(4, alpha_head="conv", kernel_size=5), torch.randn(1, 15, 4)
    out = layer(hidden)
    expected = cif(hidden, layer.predict_alphas(hidden))
    assert torch.equal(out.hidden_states, layer.projection(expected.hidden_states))
    assert layer.alpha_conv.kernel_size == (5,)


@pytest.mark.parametrize("head", HEADS)
def test_padding_does_not_matter(head):
    torch.manual_seed(0)
    layer, row = CIF(4, alpha_head=head), torch.randn(7, 4)
    alone = layer(row[None])
    for start in (0, 3, 5):
        hidden = torch.full((1, 12, 4), float("nan"))
        hidden[0, start : start + 7] = row
        mask = torch.zeros(1, 12, dtype=torch.long)
        mask[0, start : start + 7] = 1
        hidden.requires_grad_()
        out = layer(hidden, mask)
        assert out.lengths.tolist() == alone.lengths.tolist()
        torch.testing.assert_close(out.hidden_states, alone.hidden_states)
        torch.testing.assert_close(out.fire_times - start, alone.fire_times)
        layer.zero_grad()
        (out.hidden_states.sum() + out.alpha_sum.sum()).backward()
        assert hidden.grad.isfinite().all()
        assert not hidden.grad[0, mask[0] == 0].any()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_finite_differences(head):
    torch.manual_seed(0)
    layer = CIF(3, alpha_head=head).double()
    hidden = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)

    def outputs(hidden):
        out = layer(hidden, target_lengths=torch.tensor([2, 3]))
        return out.hidden_states, out.alpha_sum, out.alphas

    assert torch.autograd.gradcheck(outputs, hidden, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_it_learns_to_count(head):
    """The quantity loss alone brings the number of tokens to what the frames say."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8), CIF(8, alpha_head=head))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    frames = torch.randn(64, 24, 4)
    frames[..., 0] = (torch.rand(64, 24) < 0.3).float() * 4 - 2
    wanted = (frames[..., 0] > 0).sum(1)

    def exact():
        return float((layer(frames).lengths == wanted).float().mean())

    before = exact()
    for _ in range(150):
        optimiser.zero_grad()
        loss = (layer(frames).alpha_sum - wanted).abs().mean()
        loss.backward()
        optimiser.step()
    assert before < 0.3
    assert exact() > 0.8


@pytest.mark.parametrize("head", HEADS)
def test_state_dict_round_trip_and_repr(head):
    first, second = CIF(4, alpha_head=head), CIF(4, alpha_head=head)
    second.load_state_dict(first.state_dict())
    hidden = torch.randn(1, 9, 4)
    assert torch.equal(first(hidden).hidden_states, second(hidden).hidden_states)
    assert f"alpha_head='{head}'" in repr(first)


@pytest.mark.parametrize(
    ("head", "parameters"),
    [
        ("last_channel", {"projection"}),
        ("conv", {"projection", "alpha_conv", "alpha_linear"}),
        ("mlp", {"projection", "alpha_hidden", "alpha_linear"}),
    ],
)
def test_parameter_names_stay_those_of_saved_models(head, parameters):
    expected = {f"{name}.{kind}" for name in parameters for kind in ("weight", "bias")}
    assert set(CIF(4, alpha_head=head).state_dict()) == expected


@pytest.mark.parametrize("head", ["last_channel", "conv", "mlp"])
def test_no_frames_make_no_token(head):
    layer = CIF(6, alpha_head=head)
    out = layer(torch.randn(2, 0, 6), torch.ones(2, 0, dtype=torch.bool))
    assert out.hidden_states.shape == (2, 0, 6)
    assert out.alphas.shape == (2, 0)
    assert out.alphas.dtype == torch.float32
    assert out.alpha_sum.tolist() == out.lengths.tolist() == [0, 0]
