"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cif import CIF, cif
from cif.alignment import build_alignment
from cif.backends import triton_align
from cif.backends.triton_integrate import _integrate, _integrate_backward
from cif.prefix import Rule

pytest.importorskip("triton")

MODES = [
    {"target_lengths": torch.tensor([6, 0, 31])},
    {"tail": "round"},
    {"tail": "threshold", "tail_threshold": 0.3},
    {"tail": "drop"},
    {"tail": "keep"},
]
# How much further from float64 than the torch backend the kernels may be, relative to the largest
# value.
TOLERANCE = {
    torch.float64: 1e-11,  # the gradient of alpha takes the prefix as it is rounded, to 2**-40
    torch.float32: 1e-6,  # the order of the sums differs
    torch.float16: 2e-4,
    torch.bfloat16: 2e-3,
}
# Triton's interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
CUT_OFF = 2**-7


def batch(device, *, frames=19, width=5, dtype=torch.float32, size=1.0, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, frames, width, generator=generator).to(device, dtype)
    alphas = (torch.rand(3, frames, generator=generator) * size).to(device)
    if dtype == torch.float64:
        alphas = alphas.double()
    mask = (torch.rand(3, frames, generator=generator) > 0.3).to(device) if masked else None
    return hidden, alphas, mask


def run(hidden, alphas, mask, *, backend, cotangent_dtype=None, **options):
    """Output, dh, dalpha, and the lengths and fire times."""
    hidden, alphas = hidden.detach().requires_grad_(), alphas.detach().requires_grad_()
    out = cif(hidden, alphas, attention_mask=mask, backend=backend, **options)
    tokens = out.hidden_states
    cotangent = torch.arange(tokens[0].numel(), device=tokens.device).view_as(tokens[0]).sin()
    loss = (tokens.double() * cotangent).sum() + out.alpha_sum.double().square().sum()
    loss.backward()
    return out, hidden.grad, alphas.grad


def assert_as_good(ours, theirs, truth, dtype):
    cut_off = dtype == torch.bfloat16 and not ours[0].is_cuda
    tolerance = CUT_OFF if cut_off else TOLERANCE[dtype]
    for name, mine, other, true in zip(("out", "dh", "dalpha"), ours, theirs, truth, strict=True):
        mine, other, true = (t.detach().double() for t in (mine, other, true))
        scale = true.abs().max() if true.numel() else 0
        error = (mine - true).abs().max() if true.numel() else 0
        allowed = ((other - true).abs().max() if true.numel() else 0) + tolerance * scale
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [0.3, 3.5], ids=["one a frame", "several a frame"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_as_exact_as_the_torch_backend(device, poisoned, mode, size, dtype):
    inputs = batch(device, dtype=dtype, size=size, width=37)
    ours, theirs = (run(*inputs, backend=name, **mode) for name in ("triton", "torch"))
    hidden, alphas, mask = inputs
    truth = run(hidden.double(), alphas.double(), mask, backend="dense", **mode)
    for name in ("lengths", "attention_mask", "fire_times", "alpha_sum"):
        mine, other = getattr(ours[0], name), getattr(theirs[0], name)
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other), name
    assert ours[0].hidden_states.dtype == ours[1].dtype == dtype
    pairs = ((r[0].hidden_states, *r[1:]) for r in (ours, theirs, truth))
    assert_as_good(*pairs, dtype)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 127, 513, 1280, 4096])
def test_every_width(device, poisoned, width):
    inputs = batch(device, frames=6, width=width)
    ours, theirs = (run(*inputs, backend=name) for name in ("triton", "torch"))
    hidden, alphas, mask = inputs
    truth = run(hidden.double(), alphas.double(), mask, backend="dense")
    pairs = ((r[0].hidden_states, *r[1:]) for r in (ours, theirs, truth))
    assert_as_good(*pairs, torch.float32)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
@pytest.mark.parametrize("targets", [None, 2])
def test_empty_axes(device, poisoned, shape, targets):
    hidden = torch.randn(shape, device=device, requires_grad=True)
    alphas = torch.rand(shape[:2], device=device, requires_grad=True)
    wanted = None if targets is None else torch.full(shape[:1], targets, device=device)
    results = []
    for name in ("triton", "torch"):
        out = cif(hidden, alphas, target_lengths=wanted, backend=name)
        grads = torch.autograd.grad(out.hidden_states.sum() + out.alpha_sum.sum(), (hidden, alphas))
        results.append((out.hidden_states, out.lengths, *grads))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 4),
    st.integers(1, 25),
    st.sampled_from([0.02, 0.4, 1.0, 2.7, 9.0]),
    st.sampled_from([1.0, 0.7, 0.9, 3.1]),
    st.sampled_from(["targets", "round", "threshold", "drop", "keep"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_scan_is_bitwise_that_of_the_torch_backend(
    rows, frames, size, threshold, mode, masked, seed
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    alphas = (torch.rand(rows, frames, generator=generator) * size).to(device)
    alphas[torch.rand(rows, frames, generator=generator).to(device) < 0.1] = 0.0
    mask = None
    if masked:
        mask = (torch.rand(rows, frames, generator=generator) > 0.3).to(device)
    targets = torch.randint(0, 12, (rows,), generator=generator) if mode == "targets" else None
    rule = Rule(threshold, "round" if mode == "targets" else mode, 0.4)
    expected = build_alignment(alphas, mask, targets, rule, max_tokens=None)
    on_device = None if targets is None else targets.to(device)
    got = triton_align.align(alphas, mask, on_device, rule, num_tokens=expected.num_tokens)
    spans = expected.spans()
    for name in ("starts", "ends", "limits", "units"):
        assert torch.equal(getattr(got.spans, name), getattr(spans, name)), name
    for name in ("lengths", "attention_mask", "alpha_sum", "fire_times"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    base = torch.arange(rows, device=device).repeat_interleave(frames) * expected.num_tokens
    levels = torch.stack([spans.starts, spans.ends]).double() / 2**40 - base
    torch.testing.assert_close(got.spans.levels.double(), levels, rtol=1e-6, atol=1e-6)


def test_rows_in_a_batch_are_bitwise_the_rows_alone(device):
    rows, frames = (64, 90) if device == "cuda" else (10, 24)
    torch.manual_seed(1)
    hidden, alphas = torch.randn(rows, frames, 33), torch.rand(rows, frames)
    hidden, alphas = hidden.to(device), alphas.to(device)
    lengths = torch.randint(1, frames + 1, (rows,), device=device)
    targets = torch.randint(0, 20, (rows,), device=device)
    mask = torch.arange(frames, device=device) < lengths[:, None]
    whole = run(hidden, alphas, mask, backend="triton", target_lengths=targets)
    for b, stop in enumerate(lengths.tolist()):
        alone = run(
            hidden[b : b + 1, :stop],
            alphas[b : b + 1, :stop],
            None,
            backend="triton",
            target_lengths=targets[b : b + 1],
        )
        count = int(targets[b])
        assert torch.equal(whole[0].hidden_states[b, :count], alone[0].hidden_states[0])
        assert torch.equal(whole[1][b, :stop], alone[1][0])
        torch.testing.assert_close(whole[2][b, :stop], alone[2][0], rtol=1e-6, atol=1e-6)


def test_one_token_of_many_frames(device):
    frames = 30_000 if device == "cuda" else 1500
    hidden = torch.randn(1, frames, 3, device=device)
    alphas = torch.full((1, frames), 1 / frames, device=device)
    targets = torch.tensor([1], device=device)
    ours, theirs = (
        run(hidden, alphas, None, backend=name, target_lengths=targets)
        for name in ("triton", "torch")
    )
    truth = run(hidden.double(), alphas.double(), None, backend="dense", target_lengths=targets)
    pairs = ((r[0].hidden_states, *r[1:]) for r in (ours, theirs, truth))
    assert_as_good(*pairs, torch.float32)


def test_layout_does_not_matter(device):
    hidden, alphas, _ = batch(device, width=6)
    strided = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat([hidden, hidden], -1)[..., :6]
    wide = torch.stack([alphas, alphas], -1)[..., 0]
    plain = run(hidden, alphas, None, backend="triton")
    for inputs in ((strided, wide), (sliced, alphas)):
        other = run(*inputs, None, backend="triton")
        assert torch.equal(plain[0].hidden_states, other[0].hidden_states)
        assert torch.equal(plain[1], other[1])
        assert torch.equal(plain[2], other[2])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_stands_in_padding_does_not_matter(device, mode):
    hidden, alphas, mask = batch(device)
    mask[0], mask[1, 0] = False, False
    dirty = torch.where(mask[..., None], hidden, torch.nan), torch.where(mask, alphas, torch.nan)
    ours, clean = (run(h, a, mask, backend="triton", **mode) for h, a in (dirty, (hidden, alphas)))
    assert torch.equal(ours[0].hidden_states, clean[0].hidden_states)
    assert torch.equal(ours[1], clean[1])
    assert torch.equal(ours[2], clean[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_alpha_shows_and_stays_in_its_row(device, bad):
    hidden, alphas, _ = batch(device)
    alphas[0, 4] = bad
    out, d_hidden, d_alphas = run(hidden, alphas, None, backend="triton")
    assert out.lengths[0] == 1
    assert out.hidden_states[0, 0].isnan().all()
    assert out.alpha_sum.isnan().tolist() == [True, False, False]
    assert d_hidden[1:].isfinite().all()
    assert d_alphas[1:].isfinite().all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_finite_differences(device, mode):
    hidden, alphas, mask = batch(device, frames=7, width=2, dtype=torch.float64, size=1.4)
    alphas = alphas + 0.01

    def outputs(hidden, alphas):
        out = cif(hidden, alphas, attention_mask=mask, backend="triton", threshold=0.9, **mode)
        return out.hidden_states, out.alpha_sum

    leaves = hidden.requires_grad_(), alphas.requires_grad_()
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=3e-5, fast_mode=True)


def test_a_second_derivative_is_refused(device):
    hidden, alphas, _ = batch(device)
    out = cif(hidden.requires_grad_(), alphas, backend="triton").hidden_states
    (grad,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="dense"):
        grad.sum().backward()


def test_operators_keep_their_contracts(device):
    hidden, alphas, mask = batch(device)
    alphas.requires_grad_()
    for targets in (None, torch.tensor([3, 0, 9], device=device)):
        arguments = (alphas, mask, targets, 9, 1.0, "keep", 0.5)
        torch.library.opcheck(triton_align._align, arguments)
    with torch.no_grad():
        scan = triton_align.Scan(*triton_align._align(*arguments))
    spans = (scan.starts, scan.ends, scan.limits, mask.flatten(), scan.units)
    for dtype in (torch.float32, torch.bfloat16):
        frames = hidden.flatten(0, 1).to(dtype)
        grad = torch.randn(27, 5, device=device, dtype=dtype)
        torch.library.opcheck(_integrate_backward, (grad, frames, *spans))
        leaves = frames.clone().requires_grad_(), scan.levels.clone().requires_grad_()
        torch.library.opcheck(_integrate, (*leaves, *spans, dtype))
    sums = torch.randn(3, device=device)
    saved = (mask, scan.ends, scan.totals, scan.slopes, 9, 1.0, True)
    torch.library.opcheck(
        triton_align._align_backward, (scan.levels, sums, alphas.detach(), *saved)
    )


def test_compiles_without_graph_breaks_and_with_dynamic_shapes(device):
    layer = CIF(8, backend="triton").to(device)

    def step(hidden, mask, targets):
        out = layer(hidden, mask, target_lengths=targets, max_tokens=9)
        return out.hidden_states, out.alpha_sum

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, frames in ((3, 17), (2, 30)):
        hidden = torch.randn(rows, frames, 8, device=device, requires_grad=True)
        mask = torch.rand(rows, frames, device=device) > 0.2
        targets = torch.randint(0, 9, (rows,), device=device)
        results = []
        for function in (compiled, step):
            tokens, sums = function(hidden, mask, targets)
            grads = torch.autograd.grad(
                tokens.square().sum() + sums.sum(), [hidden, *layer.parameters()]
            )
            results.append((tokens, sums, *grads))
        for mine, plain in zip(*results, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_exports_with_dynamic_shapes(device):
    class Inference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cif = CIF(8, backend="triton")

        def forward(self, hidden, mask):
            out = self.cif(hidden, mask, max_tokens=9)
            return out.hidden_states, out.lengths, out.fire_times

    def inputs(rows, frames):
        hidden = torch.randn(rows, frames, 8, device=device)
        return hidden, torch.rand(rows, frames, device=device) > 0.2

    module = Inference().to(device).eval()
    axes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("T", min=2)}
    program = torch.export.export(
        module, inputs(3, 17), dynamic_shapes={"hidden": axes, "mask": axes}
    )
    for shape in ((3, 17), (2, 30), (5, 4)):
        given = inputs(*shape)
        for mine, plain in zip(program.module()(*given), module(*given), strict=True):
            assert torch.equal(mine, plain)


def test_autocast_changes_nothing(device):
    hidden, alphas, mask = batch(device)
    plain = cif(hidden, alphas, attention_mask=mask, backend="triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = cif(hidden, alphas, attention_mask=mask, backend="triton")
    for a, b in zip(plain[:5], cast[:5], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu_and_every_run_is_the_same(gpu):
    inputs = batch(gpu, frames=300, width=257)
    runs = [run(*inputs, backend=name) for name in ("auto", "triton", "triton")]
    for other in runs[1:]:
        assert torch.equal(runs[0][0].hidden_states, other[0].hidden_states)
        assert torch.equal(runs[0][1], other[1])
        assert torch.equal(runs[0][2], other[2])


@pytest.mark.gpu
def test_fires_on_a_gpu_are_bitwise_those_on_a_cpu(gpu):
    torch.manual_seed(0)
    alphas = torch.rand(64, 1500)
    for threshold in (1.0, 0.9, 0.37):
        for options in ({"tail": "round"}, {"tail": "keep"}):
            hidden = torch.ones(64, 1500, 1)
            here = cif(hidden, alphas, threshold=threshold, backend="torch", **options)
            there = cif(
                hidden.to(gpu), alphas.to(gpu), threshold=threshold, backend="triton",
                **options,
            )  # fmt: skip
            assert torch.equal(here.lengths, there.lengths.cpu())
            assert torch.equal(here.fire_times, there.fire_times.cpu())
            assert torch.equal(here.alpha_sum, there.alpha_sum.cpu())


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_when_the_length_is_given(gpu):
    hidden, alphas, mask = batch(gpu)
    hidden, alphas = hidden.requires_grad_(), alphas.requires_grad_()
    targets = torch.tensor([4, 0, 9], device=gpu)
    for options in ({"target_lengths": targets}, {"tail": "threshold"}, {"tail": "round"}):
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = cif(hidden, alphas, attention_mask=mask, max_tokens=9, **options)
                (out.hidden_states.sum() + out.alpha_sum.sum()).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
