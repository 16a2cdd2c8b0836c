"""`align`, the dense backend, and rows that keep their faults to themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cif import align, cif

TAILS = ["round", "threshold", "drop", "keep"]
MODES = [{"target_lengths": torch.tensor([4, 0, 9])}, *({"tail": tail} for tail in TAILS)]
LENGTHS = torch.tensor([4, 0, 9])


def example(dtype=torch.float64, size=0.7, width=3):
    """Alphas away from the edges at which a token more or less fires."""
    torch.manual_seed(3)
    hidden = torch.randn(3, 9, width, dtype=dtype)
    alphas = torch.rand(3, 9, dtype=dtype) * size + 0.01
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:], mask[1, :2], mask[2, 4] = False, False, False
    return hidden, alphas, mask


def rows_of(oracle, hidden, alphas, mask, *, target_lengths=None, **options):
    targets = [None] * len(hidden) if target_lengths is None else target_lengths.tolist()
    return [
        oracle(h, a, m, target=n, **options)
        for h, a, m, n in zip(hidden, alphas, mask, targets, strict=True)
    ]


@pytest.mark.parametrize("size", [0.7, 4.0], ids=["one a frame", "several a frame"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_weights_are_the_oracles(oracle, mode, size):
    hidden, alphas, mask = example(size=size)
    options = mode | {"threshold": 0.9}
    aligned = align(alphas, attention_mask=mask, **options)
    weights = aligned.weights()
    for b, row in enumerate(rows_of(oracle, hidden, alphas, mask, **options)):
        count = len(row.weights)
        torch.testing.assert_close(weights[b, :count], row.weights, rtol=0, atol=1e-9)
        assert not weights[b, count:].any()
        whole = count - (mode.get("tail") == "keep")
        sums = weights[b, :whole].sum(1)
        torch.testing.assert_close(sums, torch.full_like(sums, 0.9), rtol=0, atol=1e-9)
    out = cif(hidden, alphas, attention_mask=mask, **options)
    torch.testing.assert_close(weights @ hidden, out.hidden_states, rtol=1e-12, atol=1e-12)
    for name in ("lengths", "attention_mask", "alpha_sum", "fire_times"):
        assert torch.equal(getattr(aligned, name), getattr(out, name)), name


@pytest.mark.parametrize("size", [0.7, 4.0], ids=["one a frame", "several a frame"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_sparse_weights_are_the_dense_ones_that_are_not_zero(mode, size):
    _, alphas, mask = example(size=size)
    aligned = align(alphas, attention_mask=mask, **mode)
    weights, sparse = aligned.weights(), aligned.sparse_weights()
    places = torch.stack(sparse[:3], dim=1)
    assert torch.equal(places, weights.nonzero())  # sorted by row, token and frame
    torch.testing.assert_close(sparse.values, weights[weights != 0], rtol=1e-12, atol=1e-15)
    assert not sparse.values.requires_grad


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_delays_are_the_mean_place_of_a_tokens_weights(oracle, mode):
    hidden, alphas, mask = example()
    delays = align(alphas, attention_mask=mask, **mode).delays()
    for b, row in enumerate(rows_of(oracle, hidden, alphas, mask, **mode)):
        count, place = len(row.weights), torch.arange(1, 10, dtype=torch.float64)
        mean = (row.weights * place).sum(1) / row.weights.sum(1)
        torch.testing.assert_close(delays[b, :count], mean, rtol=0, atol=1e-9)
        assert not delays[b, count:].any()
    assert align(torch.tensor([[1.0, 1.0]])).delays().tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_delays_and_weights_have_the_gradients_of_finite_differences(mode, masked):
    _, alphas, mask = example()

    def outputs(alphas):
        aligned = align(alphas, attention_mask=mask if masked else None, threshold=0.9, **mode)
        return aligned.delays(), aligned.weights(), aligned.alpha_sum

    # the prefix is rounded to 2**-40, which a step of 1e-6 turns into 1e-6 of slope
    assert torch.autograd.gradcheck(outputs, alphas.requires_grad_(), eps=1e-6, atol=3e-5)


@pytest.mark.parametrize("size", [0.7, 4.0], ids=["one a frame", "several a frame"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_dense_backend_differentiates_twice(mode, size):
    hidden, alphas, mask = example(size=size, width=1)
    hidden, alphas, mask = hidden[:, :5], alphas[:, :5], mask[:, :5]
    leaves = hidden.clone().requires_grad_(), alphas.clone().requires_grad_()

    def outputs(hidden, alphas):
        options = mode | {"attention_mask": mask, "threshold": 0.9, "backend": "dense"}
        out = cif(hidden, alphas, **options)
        return out.hidden_states, out.alpha_sum

    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=3e-5)
    assert torch.autograd.gradgradcheck(outputs, leaves, eps=1e-6, atol=3e-5)


@st.composite
def problems(draw):
    """Any shape, empty ones too, alphas on a grid or not, NaN in padding."""
    batch, frames = draw(st.integers(0, 4)), draw(st.integers(0, 24))
    width = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 64, 65]))
    torch.manual_seed(draw(st.integers(0, 99)))
    alphas = torch.rand(batch, frames) * draw(st.sampled_from([0.1, 0.8, 3.0]))
    if draw(st.booleans()):
        alphas = (alphas * 8).round() / 8
    hidden = torch.randn(batch, frames, width)
    options = {"threshold": draw(st.sampled_from([1.0, 0.5, 1.3]))}
    if draw(st.booleans()):
        mask = torch.rand(batch, frames) < draw(st.sampled_from([0.0, 0.5, 0.9]))
        hidden = hidden.masked_fill(~mask[..., None], float("nan"))
        options["attention_mask"] = mask
    if draw(st.booleans()):
        options["target_lengths"] = torch.randint(0, 9, (batch,))
    else:
        options["tail"] = draw(st.sampled_from(TAILS))
    if draw(st.booleans()):
        options["max_tokens"] = draw(st.sampled_from([0, 3, 20]))
    return hidden, alphas, options


@settings(deadline=None, max_examples=80)
@given(problems())
def test_dense_is_torch(problem):
    hidden, alphas, options = problem
    results = {}
    for backend in ("torch", "dense"):
        leaves = hidden.clone().requires_grad_(), alphas.clone().requires_grad_()
        out = cif(*leaves, backend=backend, **options)
        # what comes back at places that hold no token may be anything
        fired = out.attention_mask[..., None]
        cotangent = out.hidden_states.detach().cos().masked_fill(~fired, float("nan"))
        torch.autograd.backward(
            (out.hidden_states, out.alpha_sum), (cotangent, torch.ones(len(hidden)))
        )
        results[backend] = *out[:5], *(leaf.grad for leaf in leaves)
    for mine, other in zip(*results.values(), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", [0, 1, 4])
@pytest.mark.parametrize("mode", [{"tail": tail} for tail in TAILS] + [{"targets": True}], ids=str)
def test_a_bad_frame_spoils_its_own_row_alone(mode, spoilt, bad, backend):
    torch.manual_seed(0)
    hidden, alphas = torch.randn(5, 12, 6), torch.rand(5, 12)
    mask = torch.arange(12) < torch.tensor([[12], [9], [12], [0], [11]])
    alphas[2] = 0  # rows 2 and 3 have nothing to integrate
    options = {"attention_mask": mask, "backend": backend}
    if "targets" in mode:
        options["target_lengths"] = torch.tensor([5, 3, 0, 0, 7])
    else:
        options |= mode

    def run(hidden):
        leaves = hidden.clone().requires_grad_(), alphas.clone().requires_grad_()
        out = cif(*leaves, **options)
        out.hidden_states.square().sum().backward()
        return *out[:5], *(leaf.grad for leaf in leaves)

    dirty = hidden.clone()
    dirty[spoilt, 3] = bad
    others = [b for b in range(5) if b != spoilt]
    for clean, found in zip(run(hidden), run(dirty), strict=True):
        assert torch.equal(clean[others], found[others])
        assert clean.isfinite().all()
    assert not run(dirty)[0][spoilt].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_a_bad_gradient_stays_in_its_row(backend):
    torch.manual_seed(0)
    hidden, alphas = torch.randn(3, 12, 6), torch.rand(3, 12)
    alphas[1] = 0
    alphas[0, 8] = 0
    mask = torch.arange(12) < torch.tensor([[10], [12], [12]])
    leaves = hidden.requires_grad_(), alphas.requires_grad_()
    out = cif(*leaves, attention_mask=mask, tail="drop", backend=backend)
    cotangent = torch.ones_like(out.hidden_states)
    cotangent[0] = float("nan")
    out.hidden_states.backward(cotangent)
    assert not hidden.grad[~mask].any()
    assert not alphas.grad[~mask].any()
    if backend == "torch":  # frames without weight get zeros, not zero times NaN
        assert not hidden.grad[alphas == 0].any()
    for leaf in leaves:
        assert leaf.grad[1:].isfinite().all()
    assert leaves[0].grad[0, 0].isnan().all()
