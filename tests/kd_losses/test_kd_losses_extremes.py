"""Equal inputs, extreme and infinite logits, padded vocabularies."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_losses import (
    kl_div_with_logits,
    linear_cross_entropy,
    linear_divergence,
    linear_kl_div,
    linear_kl_div_cross_entropy,
    linear_topk_kl_div,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl_and_gradient(student, weight, teacher, teacher_weight=None, **options):
    student = student.clone().requires_grad_()
    losses = linear_kl_div(student, weight, teacher, teacher_weight, reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    return losses.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("two_heads", [False, True])
def test_equal_inputs_give_exactly_zero(dtype, temperature, two_heads):
    hidden, weight = 3 * randn(9, 16).to(dtype), randn(301, 16, seed=1).to(dtype)
    bias = randn(301, seed=2).to(dtype)
    losses, gradient = kl_and_gradient(
        hidden,
        weight,
        hidden,
        weight.clone() if two_heads else None,
        linear_bias=bias,
        teacher_linear_bias=bias if two_heads else None,
        temperature=temperature,
    )
    assert torch.equal(losses, torch.zeros_like(losses))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    logits = (hidden @ weight.T).float()
    losses = kl_div_with_logits(logits, logits, temperature=temperature, reduction="none")
    assert torch.equal(losses, torch.zeros_like(losses))


@settings(max_examples=60, deadline=None)
@given(st.floats(-8, 4), st.floats(-3, 3.5), st.integers(0, 10**6))
def test_kl_is_never_negative(difference, scale, seed):
    teacher = 10**scale * randn(5, 8, seed=seed)
    student = teacher + 10**difference * randn(5, 8, seed=seed + 1)
    weight = randn(101, 8, seed=seed + 2)
    for teacher_weight in (None, weight.clone()):
        losses, gradient = kl_and_gradient(student, weight, teacher, teacher_weight)
        assert losses.min() >= 0
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("size", [1, 29, 49, 51, 87, 90, 300, 1e3, 1e4])
def test_extreme_differences_are_right(dtype, two_heads, size):
    # width 1 and weights +-1, 0: the logits are the hidden state, its negative, and zeros
    weight = torch.tensor([[1.0], [-1.0], [0.0], [0.0]], dtype=dtype)
    teacher = torch.tensor([[size], [0.0], [size], [-size]], dtype=dtype)
    student = torch.tensor([[0.0], [size], [-size], [size]], dtype=dtype)
    log_p = (teacher.double() @ weight.double().T).log_softmax(-1)
    log_q = (student.double() @ weight.double().T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected_gradient = (log_q.exp() - log_p.exp()) @ weight.double()
    losses, gradient = kl_and_gradient(
        student, weight, teacher, weight.clone() if two_heads else None
    )
    torch.testing.assert_close(losses.double(), expected, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-5)


def test_rows_beyond_the_guard_leave_the_others_alone():
    weight = randn(50, 8)
    teacher = randn(6, 8, seed=1)
    student = teacher + 0.1 * randn(6, 8, seed=2)
    alone = kl_and_gradient(student, weight, teacher)
    student[3] = -500 * teacher[3]
    mixed = kl_and_gradient(student, weight, teacher)
    others = torch.tensor([0, 1, 2, 4, 5])
    for before, after in zip(alone, mixed, strict=True):
        assert torch.equal(before[others], after[others])
    assert mixed[0][3] > 100


@pytest.mark.parametrize("two_heads", [False, True])
def test_words_masked_on_both_sides_count_for_nothing(two_heads):
    weight, teacher = randn(12, 4), randn(5, 4, seed=1)
    student = randn(5, 4, seed=2)
    bias = torch.zeros(12)
    bias[[3, 7]] = -INF
    keep = bias.isfinite()
    got = kl_and_gradient(
        student,
        weight,
        teacher,
        weight.clone() if two_heads else None,
        linear_bias=bias,
        teacher_linear_bias=bias if two_heads else None,
    )
    torch.testing.assert_close(got, kl_and_gradient(student, weight[keep], teacher))
    logits = (student @ weight.T + bias).requires_grad_()
    losses = kl_div_with_logits(logits, teacher @ weight.T + bias, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses.detach(), got[0])
    assert gradient.isfinite().all()


def test_words_masked_on_one_side():
    weight, hidden = torch.eye(3), torch.zeros(1, 3)
    masked, free = torch.tensor([0.0, 0.0, -INF]), torch.zeros(3)
    # the teacher never says word 2: p = (1/2, 1/2, 0), q = 1/3 each
    losses, gradient = kl_and_gradient(
        hidden, weight, hidden, weight, linear_bias=free, teacher_linear_bias=masked
    )
    assert losses.item() == pytest.approx(math.log(3 / 2))
    torch.testing.assert_close(gradient, torch.tensor([[1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3]]))
    # the student can't say what the teacher says: infinite, and it stays so
    losses, gradient = kl_and_gradient(
        hidden, weight, hidden, weight, linear_bias=masked, teacher_linear_bias=free
    )
    assert losses.item() == INF
    torch.testing.assert_close(gradient, torch.tensor([[1 / 2 - 1 / 3, 1 / 2 - 1 / 3, -1 / 3]]))


@pytest.mark.parametrize("trainable", [False, True])
def test_plus_infinity_is_named(trainable):
    weight, hidden, target = randn(12, 4), randn(5, 4), torch.arange(5)
    bias, free = torch.zeros(12), torch.zeros(12)
    bias[3] = INF
    weight.requires_grad_(trainable)
    log_p, ids = torch.zeros(5, 2), torch.tensor([[0, 1]] * 5)
    h, w, bad, ok = hidden, weight, {"linear_bias": bias}, {"linear_bias": free}
    own = {"teacher_linear_bias": free}
    calls = [
        ("input", lambda: linear_kl_div(hidden, weight, hidden, weight, **bad, **own)),
        ("teacher_input", lambda: linear_kl_div(
            hidden, weight, hidden, weight, **ok, teacher_linear_bias=bias)),
        ("input", lambda: linear_kl_div(hidden, weight, hidden, **bad)),
        ("input", lambda: linear_divergence(h, w, h, w, divergence="jsd", **bad)),
        ("input", lambda: linear_cross_entropy(hidden, weight, target, **bad)),
        ("input", lambda: linear_topk_kl_div(hidden, weight, ids, log_p, **bad)),
        ("input", lambda: linear_kl_div_cross_entropy(h, w, h, target, w, **bad)),
    ]  # fmt: skip
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{name}: .*\+inf in selected row 0"):
            call()
    # the reference has nothing to name it with
    logits = hidden @ weight.detach().T + bias
    assert kl_div_with_logits(logits, logits).isnan()


def test_products_that_overflow_float16_are_named():
    weight, teacher = torch.full((3, 4), 200.0).half(), torch.zeros(2, 4).half()
    student = torch.tensor([[0.0] * 4, [100.0] * 4]).half()
    with pytest.raises(ValueError, match=r"\+inf in selected row 1.*float16"):
        linear_kl_div(student, weight, teacher, weight.clone())


def test_nan_stays_nan():
    weight, hidden = randn(12, 4), randn(5, 4)
    broken = hidden.clone()
    broken[2] = math.nan
    for teacher_weight in (None, weight.clone()):
        losses = linear_kl_div(broken, weight, hidden, teacher_weight, reduction="none")
        assert losses.isnan().tolist() == [False, False, True, False, False]


def test_extreme_logits_of_the_cross_entropy():
    weight = torch.eye(3)
    hidden = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), reduction="none")
    assert losses.tolist() == [0.0, 2e4]
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("trainable", [False, True])
def test_padding_of_the_vocabulary_does_not_count(trainable):
    real, padded = 11, 16
    weight = randn(padded, 4)
    weight[real:] = 50  # not zeros: rows of padding may hold anything
    longer = torch.cat([weight, 9 * randn(5, 4)])
    hidden, teacher = randn(6, 4, seed=1), randn(6, 4, seed=2)
    expected = kl_and_gradient(hidden, weight[:real], teacher)
    weight.requires_grad_(trainable)
    for teacher_weight in (None, longer):
        got = kl_and_gradient(hidden, weight, teacher, teacher_weight, vocab_size=real)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    logits, teacher_logits = hidden @ weight.T, teacher @ longer.T
    losses = kl_div_with_logits(logits, teacher_logits, vocab_size=real, reduction="none")
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-6)
    target = torch.arange(6)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, target, vocab_size=real),
        torch.nn.functional.cross_entropy(hidden @ weight[:real].T, target),
    )
