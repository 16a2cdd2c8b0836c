"""What must not matter: the batch, the side and the content of padding, layout, tracing."""

import pytest
import torch

from cif import cif

MODES = [{"use_targets": True}, {"tail": "round"}, {"tail": "threshold"}, {"tail": "drop"}]


def run(hidden, alphas, *, mask=None, targets=None, **options):
    """Tokens, fire times, sum of alpha and the two gradients."""
    hidden, alphas = hidden.clone().requires_grad_(), alphas.clone().requires_grad_()
    if options.pop("use_targets", False):
        options["target_lengths"] = targets
    out = cif(hidden, alphas, attention_mask=mask, **options)
    # the cotangent depends on the token alone, so that it is the same in any batch
    position = torch.arange(out.hidden_states[0].numel()).view_as(out.hidden_states[0])
    loss = (out.hidden_states * (position * 0.37).sin()).sum() + out.alpha_sum.square().sum()
    loss.backward()
    return out, hidden.grad, alphas.grad


def ragged(dtype=torch.float32, rows=64, frames=90, width=33):
    torch.manual_seed(1)
    hidden = torch.randn(rows, frames, width).to(dtype)
    alphas = torch.rand(rows, frames) * torch.rand(rows, 1) * 2
    lengths = torch.randint(1, frames + 1, (rows,))
    targets = torch.randint(0, 20, (rows,))
    return hidden, alphas, lengths, targets


def assert_row_equal(batch, b, start, stop, alone):
    (out, d_hidden, d_alphas), (one, one_d_hidden, one_d_alphas) = batch, alone
    count = int(one.lengths[0])
    assert out.lengths[b] == count
    assert torch.equal(out.hidden_states[b, :count], one.hidden_states[0])
    assert torch.equal(out.fire_times[b, :count] - start * (count > 0), one.fire_times[0])
    assert torch.equal(out.alpha_sum[b], one.alpha_sum[0])
    assert torch.equal(d_hidden[b, start:stop], one_d_hidden[0])
    # not bitwise: BLAS adds up a dot product in an order that depends on where the vector lies
    torch.testing.assert_close(d_alphas[b, start:stop], one_d_alphas[0], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_row_in_a_batch_is_bitwise_the_row_alone(mode, dtype):
    hidden, alphas, lengths, targets = ragged(dtype)
    mask = torch.arange(hidden.shape[1]) < lengths[:, None]
    batch = run(hidden, alphas, mask=mask, targets=targets, **mode)
    for b, stop in enumerate(lengths.tolist()):
        alone = run(
            hidden[b : b + 1, :stop], alphas[b : b + 1, :stop], targets=targets[b : b + 1], **mode
        )
        assert_row_equal(batch, b, 0, stop, alone)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_left_padding_is_right_padding_is_padding_inside(mode):
    hidden, alphas, lengths, targets = ragged(rows=5, frames=16, width=4)
    for b, length in enumerate(lengths.tolist()):
        row, weight = hidden[b, :length], alphas[b, :length]
        places = [
            torch.arange(length),
            torch.arange(length) + 16 - length,
            torch.randperm(16)[:length].sort().values,
        ]
        results = []
        for place in places:
            h = torch.full((1, 16, 4), float("nan"))
            a = torch.full((1, 16), float("nan"))
            mask = torch.zeros(1, 16, dtype=torch.bool)
            h[0, place], a[0, place], mask[0, place] = row, weight, True
            out, d_hidden, d_alphas = run(h, a, mask=mask, targets=targets[b : b + 1], **mode)
            outside = ~mask[0]
            assert not d_hidden[0, outside].any()
            assert not d_alphas[0, outside].any()
            results.append((out.hidden_states, d_hidden[0, place], d_alphas[0, place]))
        for other in results[1:]:
            assert torch.equal(results[0][0], other[0])
            assert torch.equal(results[0][1], other[1])
            torch.testing.assert_close(results[0][2], other[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_stands_in_padding_does_not_matter(mode, poison):
    hidden, alphas, _, targets = ragged(rows=6, frames=20, width=3)
    mask = torch.rand(6, 20) > 0.4
    mask[0] = False
    mask[1, 0] = False
    dirty = torch.where(mask[..., None], hidden, poison), torch.where(mask, alphas, poison)
    out, d_hidden, d_alphas = run(*dirty, mask=mask, targets=targets, **mode)
    clean, clean_d_hidden, clean_d_alphas = run(hidden, alphas, mask=mask, targets=targets, **mode)
    for name in ("hidden_states", "lengths", "alpha_sum", "fire_times"):
        assert torch.equal(getattr(out, name), getattr(clean, name)), name
    assert torch.equal(d_hidden, clean_d_hidden)
    assert torch.equal(d_alphas, clean_d_alphas)


def test_a_frame_without_weight_is_not_read():
    hidden, alphas = torch.ones(1, 6, 2), torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.6, 0.4]])
    hidden[0, [0, 3]] = float("nan")
    assert torch.equal(cif(hidden, alphas).hidden_states, torch.ones(1, 2, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_bad_alpha_shows_and_stays_in_its_row(mode, bad):
    hidden, alphas, _, _ = ragged(rows=3, frames=10, width=2)
    alphas[1, 4] = bad
    targets = torch.tensor([3, 4, 5])
    out, d_hidden, d_alphas = run(hidden, alphas, targets=targets, **mode)
    assert out.hidden_states[1, : out.lengths[1]].isnan().all()
    assert out.lengths[1] == (4 if mode.get("use_targets") else 1)
    assert out.alpha_sum.isnan().tolist() == [False, True, False]
    for b in (0, 2):
        assert out.hidden_states[b].isfinite().all()
        assert d_hidden[b].isfinite().all()
        assert d_alphas[b].isfinite().all()


def test_layout_does_not_matter():
    hidden, alphas, _, targets = ragged(rows=3, frames=20, width=6)
    strided = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack([alphas, alphas], -1)[..., 0]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    plain = run(hidden, alphas, targets=targets, **MODES[0])
    other = run(strided, wide, targets=targets, **MODES[0])
    assert torch.equal(plain[0].hidden_states, other[0].hidden_states)
    assert torch.equal(plain[1], other[1])
    assert torch.equal(plain[2], other[2])


def test_compiles_without_graph_breaks():
    hidden, alphas, lengths, targets = ragged(rows=4, frames=30, width=5)
    mask = torch.arange(30) < lengths[:4, None]

    def step(hidden, alphas, mask, targets):
        out = cif(hidden, alphas, attention_mask=mask, target_lengths=targets, max_tokens=20)
        return out.hidden_states, out.alpha_sum, out.fire_times

    # without code generation, which takes a minute; a graph break is found while tracing
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
    leaves = [hidden.requires_grad_(), alphas.requires_grad_()]
    mine, plain = (run(*leaves, mask, targets[:4]) for run in (compiled, step))
    for a, b in zip(mine, plain, strict=True):
        assert torch.equal(a, b)
    grads = [
        torch.autograd.grad(out[0].square().sum() + out[1].sum(), leaves) for out in (mine, plain)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
