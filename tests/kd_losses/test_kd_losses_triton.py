"""The Triton kernel: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kd_losses import kl_div_with_logits, linear_kl_div

pytest.importorskip("triton")
# numpy's, in the interpreter: a kernel computes both sides of a choice and throws one away
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"
)

# How much further from float64 than the torch backend the kernel may be, relative to the norm.
TOLERANCE = {
    torch.float32: 2e-6,  # the order of the sums differs
    torch.bfloat16: 2e-3,
}
# Triton's interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
CUT_OFF = 2**-7


def problem(device, dtype, *, rows=5, words=1003, closeness=0.3, scale=0.4, seed=0):
    made = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(words, 8, generator=made)
    teacher = torch.randn(rows, 8, generator=made)
    student = teacher + closeness * torch.randn(rows, 8, generator=made)
    return [x.to(device, dtype) for x in (student, weight, teacher)]


def run(student, weight, teacher, own=None, **options):
    leaf = student.clone().requires_grad_()
    losses = linear_kl_div(leaf, weight, teacher, own, reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach().double(), gradient.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", ["shared", "shared with bias", "two", "two with biases"])
@pytest.mark.parametrize("words", [3, 4096, 5003])
def test_as_exact_as_the_torch_backend(device, dtype, heads, words):
    student, weight, teacher = problem(device, dtype, words=words)
    own = weight.flip(0) if heads.startswith("two") else None
    options = {"temperature": 1.7, "chunk_size": 3}
    if "bias" in heads:
        options["linear_bias"] = torch.linspace(-1, 1, words, device=device, dtype=dtype)
    if heads == "two with biases":
        options["teacher_linear_bias"] = options["linear_bias"].flip(0)
    ours, theirs = (
        run(student, weight, teacher, own, backend=name, **options) for name in ("triton", "torch")
    )
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    own = None if own is None else own.double()
    truth = run(student.double(), weight.double(), teacher.double(), own, **wide)
    cut_off = CUT_OFF if dtype == torch.bfloat16 and device == "cpu" else 0
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        allowed = (other - true).norm() + (TOLERANCE[dtype] + cut_off) * true.norm()
        assert (mine - true).norm() <= allowed


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_close_and_equal_distributions(device, dtype, own):
    student, weight, teacher = problem(device, dtype, closeness=5e-3)
    head = weight.clone() if own else None
    ours = run(student, weight, teacher, head, backend="triton")
    theirs = run(student, weight, teacher, head, backend="torch")
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 2e-2 * other.norm()
    for value in run(teacher, weight, teacher, head, backend="triton"):
        assert torch.equal(value, torch.zeros_like(value))


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.floats(-8, 4), st.floats(-3, 3), st.integers(0, 10**6), st.booleans())
def test_never_negative_never_nan(difference, scale, seed, own):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, weight, teacher = problem(
        device, torch.float32, words=101, closeness=10**difference, scale=10**scale, seed=seed
    )
    head = weight.clone() if own else None
    losses, gradient = run(student, weight, teacher, head, backend="triton")
    assert losses.min() >= 0
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    expected, expected_gradient = run(student, weight, teacher, head, backend="torch")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    size = expected_gradient.abs().max()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-4 * size + 1e-6)


def test_words_that_one_or_neither_can_say(device):
    student, weight, teacher = problem(device, torch.float32, words=12)
    bias, teacher_bias = torch.zeros(12, device=device), torch.zeros(12, device=device)
    bias[[3, 7]] = -torch.inf
    teacher_bias[[3, 5]] = -torch.inf
    for biases in ((bias, bias), (torch.zeros_like(bias), bias), (bias, teacher_bias)):
        options = {"linear_bias": biases[0], "teacher_linear_bias": biases[1]}
        ours, theirs = (
            run(student, weight, teacher, weight.clone(), backend=name, **options)
            for name in ("triton", "torch")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_a_gradient_and_without_rows(device):
    student, weight, teacher = problem(device, torch.float32)
    with torch.no_grad():
        loss = linear_kl_div(student, weight, teacher, backend="triton")
    expected = kl_div_with_logits(student @ weight.T, teacher @ weight.T)
    torch.testing.assert_close(loss, expected)
    leaf = student[:0].requires_grad_()
    linear_kl_div(leaf, weight, teacher[:0], backend="triton").backward()
    assert leaf.grad.shape == (0, 8)


def test_what_the_kernel_cannot_do_is_an_error_that_says_so(monkeypatch):
    student, weight, teacher = problem("cpu", torch.float32)
    cases = [
        ({"softcap": 2.0}, "soft cap"),
        ({}, "not torch.float64"),
    ]
    for options, reason in cases:
        args = [x.double() for x in (student, weight, teacher)] if not options else [
            student, weight, teacher
        ]  # fmt: skip
        with pytest.raises(ValueError, match=f'"triton" cannot run here: .*{reason}'):
            linear_kl_div(*args, backend="triton", **options)
    with pytest.raises(ValueError, match="wants a gradient"):
        linear_kl_div(student, weight.requires_grad_(), teacher, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="its kernels need a GPU"):
        linear_kl_div(student, weight.detach(), teacher, backend="triton")


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_gpu_and_every_run_is_the_same(gpu):
    inputs = problem(gpu, torch.bfloat16, words=50_000, rows=300)
    runs = [run(*inputs, backend=name) for name in ("auto", "triton", "triton")]
    for other in runs[1:]:
        for mine, again in zip(runs[0], other, strict=True):
            assert torch.equal(mine, again)
