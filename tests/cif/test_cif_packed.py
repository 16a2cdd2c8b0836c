"""Packed rows against the padded batch and against each row alone, bitwise."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cif import cif, cif_packed

TAILS = ["round", "threshold", "drop", "keep"]


def pack(lengths, width=3, scale=1.0, dtype=torch.float32):
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    frames = int(cu_seqlens[-1])
    return torch.randn(frames, width).to(dtype), torch.rand(frames) * scale, cu_seqlens


def pad(packed, cu_seqlens):
    rows = [packed[a:b] for a, b in pairwise(cu_seqlens)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.integers(0, 14), min_size=1, max_size=6))
    torch.manual_seed(draw(st.integers(0, 99)))
    hidden, alphas, cu_seqlens = pack(
        lengths, draw(st.sampled_from([1, 3, 33])), draw(st.sampled_from([0.1, 0.9, 3.0]))
    )
    if draw(st.booleans()):
        alphas = (alphas * 4).round() / 4
    options = {"threshold": draw(st.sampled_from([1.0, 0.7]))}
    if draw(st.booleans()):
        options["target_lengths"] = torch.randint(0, 7, (len(lengths),))
    else:
        options["tail"] = draw(st.sampled_from(TAILS))
    return hidden, alphas, cu_seqlens, options


def run(function, *leaves, **options):
    """The result with gradients that depend on the token's place within its row alone."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return function(*leaves, **options), leaves


@settings(deadline=None, max_examples=120)
@given(problems(), st.booleans())
def test_packed_is_padded(problem, told):
    hidden, alphas, cu_seqlens, options = problem
    frames = cu_seqlens.diff()
    mask = torch.arange(int(frames.max())) < frames[:, None]
    if mask.shape[1] == 0:
        padded, weights = torch.zeros(len(frames), 0, hidden.shape[1]), torch.zeros(mask.shape)
    else:
        padded, weights = pad(hidden, cu_seqlens), pad(alphas, cu_seqlens)
    whole, whole_leaves = run(cif, padded, weights, attention_mask=mask, **options)
    told = {"max_seqlen": mask.shape[1], "max_tokens": int(whole.lengths.sum())} if told else {}
    out, leaves = run(cif_packed, hidden, alphas, cu_seqlens=cu_seqlens, **options, **told)

    assert torch.equal(out.hidden_states, whole.hidden_states[whole.attention_mask])
    assert torch.equal(out.lengths, whole.lengths)
    assert out.cu_seqlens.dtype == torch.int32
    assert out.cu_seqlens.tolist() == [0, *whole.lengths.cumsum(0).tolist()]
    assert torch.equal(out.fire_times, whole.fire_times[whole.attention_mask])
    assert torch.equal(out.alpha_sum, whole.alpha_sum)

    cotangent = torch.randn_like(whole.hidden_states)
    for got, by in ((out, cotangent[whole.attention_mask]), (whole, cotangent)):
        torch.autograd.backward(
            (got.hidden_states, got.alpha_sum.square().sum()), (by, torch.tensor(1.0))
        )
    for mine, other in zip(leaves, whole_leaves, strict=True):
        torch.testing.assert_close(mine.grad, other.grad[mask], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [{"tail": t} for t in TAILS] + [{"targets": True}], ids=str)
def test_each_packed_row_is_bitwise_the_row_alone(mode, dtype):
    torch.manual_seed(0)
    lengths = torch.randint(0, 60, (32,)).tolist()
    hidden, alphas, cu_seqlens = pack(lengths, width=17, dtype=dtype)
    targets = torch.randint(0, 12, (32,)) if mode.get("targets") else None
    options = {} if mode.get("targets") else mode
    out = cif_packed(hidden, alphas, cu_seqlens, target_lengths=targets, **options)
    assert out.hidden_states.dtype == dtype
    for row, (start, stop) in enumerate(pairwise(cu_seqlens)):
        target = None if targets is None else targets[row : row + 1]
        alone = cif(
            hidden[None, start:stop], alphas[None, start:stop], target_lengths=target, **options
        )
        tokens = slice(*out.cu_seqlens[row : row + 2].tolist())
        assert torch.equal(out.hidden_states[tokens], alone.hidden_states[0])
        assert torch.equal(out.fire_times[tokens], alone.fire_times[0])
        assert torch.equal(out.alpha_sum[row], alone.alpha_sum[0])
        assert out.lengths[row] == alone.lengths[0]


@pytest.mark.parametrize("mode", [{"tail": t} for t in TAILS] + [{"targets": True}], ids=str)
def test_finite_differences(mode):
    torch.manual_seed(1)
    hidden, alphas, cu_seqlens = pack([4, 0, 7, 1], width=2, scale=1.5)
    targets = torch.tensor([3, 2, 4, 1]) if mode.get("targets") else None
    options = {} if mode.get("targets") else mode
    leaves = hidden.double().requires_grad_(), alphas.double().requires_grad_()

    def outputs(hidden, alphas):
        out = cif_packed(hidden, alphas, cu_seqlens, target_lengths=targets, **options)
        return out.hidden_states, out.alpha_sum

    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=3e-5)


@pytest.mark.parametrize("max_tokens", [0, 1, 5, 9, 40])
def test_max_tokens_cuts_off_the_end_or_leaves_room(max_tokens):
    torch.manual_seed(0)
    hidden, alphas, cu_seqlens = pack([9, 4, 8, 12], scale=1.2)
    full = cif_packed(hidden, alphas, cu_seqlens, tail="threshold")
    total = len(full.hidden_states)
    assert 9 < total < 40
    out, leaves = run(
        cif_packed, hidden, alphas, cu_seqlens=cu_seqlens, tail="threshold", max_tokens=max_tokens
    )
    kept = min(max_tokens, total)
    assert out.hidden_states.shape == (max_tokens, 3)
    assert torch.equal(out.hidden_states[:kept], full.hidden_states[:kept])
    assert torch.equal(out.fire_times[:kept], full.fire_times[:kept])
    assert not out.hidden_states[kept:].any()
    assert not out.fire_times[kept:].any()
    assert torch.equal(out.cu_seqlens, full.cu_seqlens.clamp(max=max_tokens))
    assert torch.equal(out.lengths, out.cu_seqlens.diff())
    assert torch.equal(out.alpha_sum, full.alpha_sum)
    cotangent = torch.ones_like(out.hidden_states)
    cotangent[kept:] = float("nan")  # what comes back at places that hold no token may be anything
    out.hidden_states.backward(cotangent)
    for leaf in leaves:
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("mode", [{"tail": "drop"}, {"tail": "round"}, {"targets": True}], ids=str)
def test_bad_rows_keep_to_themselves(mode):
    torch.manual_seed(0)
    hidden, alphas, cu_seqlens = pack([5, 2, 6, 3])
    targets = torch.tensor([2, 4, 3, 1]) if mode.get("targets") else None
    options = {"target_lengths": targets} if mode.get("targets") else mode
    clean, leaves = run(cif_packed, hidden, alphas, cu_seqlens=cu_seqlens, **options)
    dirty_alphas = alphas.clone()
    dirty_alphas[6] = float("nan")  # the second row, which is shorter than others
    dirty, dirty_leaves = run(cif_packed, hidden, dirty_alphas, cu_seqlens=cu_seqlens, **options)
    assert dirty.lengths[1] == (4 if mode.get("targets") else 1)
    for out in (clean, dirty):
        out.hidden_states.square().sum().backward()
    for row in range(4):
        tokens, frames = (
            slice(*cumulative[row : row + 2].tolist())
            for cumulative in (dirty.cu_seqlens, cu_seqlens)
        )
        if row == 1:
            assert dirty.hidden_states[tokens].isnan().all()
            continue
        same = slice(*clean.cu_seqlens[row : row + 2].tolist())
        assert torch.equal(dirty.hidden_states[tokens], clean.hidden_states[same])
        for mine, other in zip(leaves, dirty_leaves, strict=True):
            assert torch.equal(mine.grad[frames], other.grad[frames])


@pytest.mark.parametrize("mode", [{"tail": "threshold"}, {"targets": True}], ids=str)
def test_the_kernels_take_packed_rows(mode):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there, in Triton's interpreter
    hidden, alphas, cu_seqlens = (t.to(device) for t in pack([5, 0, 12, 3], width=5))
    targets = torch.tensor([2, 1, 5, 4], device=device) if mode.get("targets") else None
    options = {"target_lengths": targets} if mode.get("targets") else mode
    results = []
    for backend in ("triton", "torch"):
        out, leaves = run(
            cif_packed, hidden, alphas, cu_seqlens=cu_seqlens, backend=backend, **options
        )
        out.hidden_states.square().sum().backward()
        results.append((out, leaves))
    (mine, my_leaves), (other, other_leaves) = results
    torch.testing.assert_close(mine.hidden_states, other.hidden_states, rtol=1e-5, atol=1e-6)
    for name in ("cu_seqlens", "lengths", "alpha_sum", "fire_times"):
        assert torch.equal(getattr(mine, name), getattr(other, name))
    for a, b in zip(my_leaves, other_leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_nothing_packed(lengths, told, targets):
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    sizes = {"max_seqlen": 4, "max_tokens": 3} if told else {}
    wanted = torch.full((len(lengths),), 2) if targets else None
    hidden = torch.zeros(0, 5, requires_grad=True)
    out = cif_packed(hidden, torch.zeros(0), cu_seqlens, target_lengths=wanted, **sizes)
    count = 2 * len(lengths) if targets else 0
    assert out.hidden_states.shape == (3 if told else count, 5)
    assert not out.hidden_states.any()
    assert int(out.cu_seqlens[-1]) == (min(count, 3) if told else count)
    out.hidden_states.sum().backward()


def test_frames_past_max_seqlen_are_not_read():
    torch.manual_seed(0)
    hidden, alphas, cu_seqlens = pack([9, 4])
    hidden[4:9] = float("nan")
    out = cif_packed(hidden, alphas, cu_seqlens, max_seqlen=4, tail="keep")
    first, second = (
        cif(hidden[None, s], alphas[None, s], tail="keep") for s in (slice(4), slice(9, 13))
    )
    assert torch.equal(
        out.hidden_states, torch.cat([first.hidden_states[0], second.hidden_states[0]])
    )


def test_compiles_without_graph_breaks_or_reads():
    torch.manual_seed(0)
    hidden, alphas, cu_seqlens = pack([9, 4, 0, 12])

    def step(hidden, alphas, cu_seqlens):
        return cif_packed(hidden, alphas, cu_seqlens, max_seqlen=12, max_tokens=20)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    for mine, plain in zip(*(f(hidden, alphas, cu_seqlens) for f in (compiled, step)), strict=True):
        assert torch.equal(mine, plain)


HIDDEN, ALPHAS, CU = torch.randn(6, 3), torch.rand(6), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": HIDDEN[None]}, ValueError, r"hidden_states: .*\(F, D\).*cif\.cif"),
        ({"alphas": ALPHAS[:5]}, ValueError, r"alphas: .*\(6,\).*got \(5,\)"),
        ({"alphas": ALPHAS.long()}, TypeError, r"alphas: .*got torch.int64"),
        ({"cu_seqlens": CU.float()}, TypeError, r"cu_seqlens: expected int32 or int64, got"),
        ({"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens: .*got \(1, 3\)"),
        ({"cu_seqlens": CU[:1]}, ValueError, r"cu_seqlens: .*at least one row, got \(1,\)"),
        ({"cu_seqlens": CU[:2]}, ValueError, r"cu_seqlens: .*0 to the 6 frames.*got 0 to 2"),
        ({"cu_seqlens": CU[1:]}, ValueError, r"cu_seqlens: .*got 2 to 6"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, ValueError, r"cu_seqlens: .*length -1"),
        ({"cu_seqlens": CU[1:], "max_seqlen": 4}, ValueError, r"cu_seqlens: .*got 2 to 6"),
        ({"max_seqlen": 0}, ValueError, r"max_seqlen: .*got 0"),
        ({"target_lengths": torch.tensor([1, 2, 3])}, ValueError, r"target_lengths: .*got \(3,\)"),
        ({"target_lengths": torch.tensor([1, -2])}, ValueError, r"target_lengths: .*got -2"),
        ({"target_lengths": torch.tensor([1.0, 2.0])}, TypeError, r"target_lengths: .*\.long"),
        ({"backend": "dense"}, ValueError, r'backend: "dense" .*"auto"'),
        ({"max_tokens": -1}, ValueError, r"max_tokens: .*got -1"),
    ],
)
def test_errors(change, error, message):
    arguments = {"hidden_states": HIDDEN, "alphas": ALPHAS, "cu_seqlens": CU} | change
    with pytest.raises(error, match=message):
        cif_packed(**arguments)
