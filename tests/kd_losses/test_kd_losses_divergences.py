"""Every divergence: against formulas in float64, by gradcheck, close to zero and far from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from kd_losses import divergence_with_logits, linear_divergence, linear_kl_div

KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
SHARES = {"jsd": 0.3, "skew_kl": 0.2, "skew_reverse_kl": 0.6}
N, H, V = 7, 5, 23


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(kind, share, z, z_teacher):
    """The textbook's sums; nothing of ours."""
    p, q = z_teacher.softmax(-1), z.softmax(-1)
    m = None if share is None else share * p + (1 - share) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: share * kl(p, m) + (1 - share) * kl(q, m),
        "skew_kl": lambda: kl(p, m),
        "skew_reverse_kl": lambda: kl(q, m),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


def paths(kind, student, weight, teacher, **options):
    """All the ways to compute a divergence."""
    options |= {"divergence": kind, "mixture": SHARES.get(kind)}
    yield linear_divergence(student, weight, teacher, chunk_size=3, **options)
    yield linear_divergence(student, weight, teacher, weight.clone(), chunk_size=3, **options)
    trainable = weight.clone().requires_grad_()
    yield linear_divergence(student, trainable, teacher, weight, **options)
    yield divergence_with_logits(student @ weight.T, teacher @ weight.T, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_path_is_the_textbook_formula(kind, temperature):
    weight, teacher = randn(V, H, seed=1), randn(N, H, seed=2)
    student = randn(N, H).requires_grad_()
    expected = by_hand(
        kind, SHARES.get(kind), student @ weight.T / temperature, teacher @ weight.T / temperature
    )
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), student)
    for losses in paths(kind, student, weight, teacher, temperature=temperature, reduction="none"):
        torch.testing.assert_close(losses, expected)
        (gradient,) = torch.autograd.grad(losses.square().sum(), student)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["shared", "two", "soft cap"])
def test_gradcheck(kind, heads):
    weight, teacher = randn(V, H, seed=1), randn(N, H, seed=2)
    options = {"mixture": SHARES.get(kind), "divergence": kind, "temperature": 1.7}
    if heads == "soft cap":
        options |= {"softcap": 1.5, "linear_bias": randn(V, seed=3)}
    own = weight.flip(0) if heads == "two" else None
    assert gradcheck(
        lambda h: linear_divergence(h, weight, teacher, own, chunk_size=3, **options),
        randn(N, H).requires_grad_(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_soft_caps(kind, trainable):
    weight, teacher, bias = randn(V, H, seed=1), randn(N, H, seed=2), randn(V, seed=3)
    student = randn(N, H).requires_grad_()

    def capped(rows, cap):
        return cap * torch.tanh((rows @ weight.T + bias) / cap)

    share = SHARES.get(kind)
    for caps in ({"softcap": 2.0}, {"softcap": 2.0, "teacher_softcap": 3.0}):
        z_teacher = capped(teacher, caps.get("teacher_softcap", 2.0))
        expected = by_hand(kind, share, capped(student, 2.0) / 1.3, z_teacher / 1.3).mean()
        head = weight.clone().requires_grad_(trainable)
        got = linear_divergence(
            student, head, teacher, linear_bias=bias, temperature=1.3, divergence=kind,
            mixture=share, **caps,
        )  # fmt: skip
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, student), torch.autograd.grad(expected, student)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_close_distributions_do_not_cancel(kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1003, 24, generator=generator)
    teacher = torch.randn(9, 24, generator=generator)
    student = teacher + 3e-4 * torch.randn(9, 24, generator=generator)
    truth_leaf = student.double().requires_grad_()
    truth = by_hand(
        kind, SHARES.get(kind), truth_leaf @ weight.double().T, teacher.double() @ weight.double().T
    )
    (truth_gradient,) = torch.autograd.grad(truth.sum(), truth_leaf)
    student.requires_grad_()
    losses = linear_divergence(
        student, weight, teacher, divergence=kind, mixture=SHARES.get(kind), reduction="none"
    )
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert (losses - truth).norm() < 2e-3 * truth.norm()
    assert (gradient - truth_gradient).norm() < 2e-3 * truth_gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.floats(-8, 4), st.floats(-3, 3.5), st.integers(0, 10**6))
def test_never_negative_never_nan_and_zero_for_equals(kind, difference, scale, seed):
    teacher = (10**scale * randn(5, 8, seed=seed)).float()
    student = teacher + (10**difference * randn(5, 8, seed=seed + 1)).float()
    weight = randn(101, 8, seed=seed + 2).float()
    for own in (None, weight.clone()):
        for rows in (student, teacher):
            leaf = rows.clone().requires_grad_()
            losses = linear_divergence(
                leaf, weight, teacher, own, divergence=kind, reduction="none"
            )
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            assert losses.min() >= 0
            assert losses.isfinite().all()
            assert gradient.isfinite().all()
        assert torch.equal(losses, torch.zeros(5))
        assert torch.equal(gradient, torch.zeros(5, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_bounds(kind):
    """Nothing in common: TVD is 1, a mixture's KL is the log of a share, plain KL is large."""
    weight, far = torch.eye(2), torch.tensor([[60.0, -60.0]])
    loss = linear_divergence(-far, weight, far, divergence=kind, mixture=SHARES.get(kind)).item()
    share = SHARES.get(kind, 0.5)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    expected = {
        "forward_kl": 120.0,
        "reverse_kl": 120.0,
        "tvd": 1.0,
        "jsd": entropy,
        "skew_kl": -math.log(share),
        "skew_reverse_kl": -math.log(1 - share),
    }[kind]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_neither_knows_count_for_nothing(kind):
    weight, teacher, student = randn(12, 4), randn(5, 4, seed=1), randn(5, 4, seed=2)
    bias = torch.zeros(12, dtype=torch.float64)
    bias[[3, 7]] = -torch.inf
    keep = bias.isfinite()
    results = []
    for head, options in ((weight, {"linear_bias": bias}), (weight[keep], {})):
        leaf = student.clone().requires_grad_()
        loss = linear_divergence(leaf, head, teacher, divergence=kind, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        logits = (leaf @ head.T + options.get("linear_bias", 0)).requires_grad_()
        reference = divergence_with_logits(
            logits, teacher @ head.T + options.get("linear_bias", 0), divergence=kind
        )
        assert torch.autograd.grad(reference, logits)[0].isfinite().all()
        torch.testing.assert_close(reference.detach(), loss.detach())
    torch.testing.assert_close(*results)


def test_forward_kl_is_linear_kl_div_and_torch_s():
    weight, teacher, student = randn(V, H), randn(N, H, seed=1), randn(N, H, seed=2)
    expected = F.kl_div(
        (student @ weight.T).log_softmax(-1),
        (teacher @ weight.T).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(linear_kl_div(student, weight, teacher), expected)
    torch.testing.assert_close(
        linear_divergence(student, weight, teacher, divergence="forward_kl"), expected
    )


def test_options_that_do_not_fit():
    x, w = torch.randn(2, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"divergence: .*'kl'"):
        linear_divergence(x, w, x, divergence="kl")
    with pytest.raises(ValueError, match=r"mixture: .*'tvd'; drop it"):
        linear_divergence(x, w, x, divergence="tvd", mixture=0.5)
    with pytest.raises(ValueError, match=r"mixture: .*between 0 and 1, got 1"):
        divergence_with_logits(x, x, divergence="jsd", mixture=1)
    with pytest.raises(ValueError, match=r"softcap: .*got 0"):
        linear_kl_div(x, w, x, softcap=0.0)
    with pytest.raises(ValueError, match=r"teacher_softcap: .*got -1"):
        linear_kl_div(x, w, x, w.clone(), teacher_softcap=-1.0)
    with pytest.raises(ValueError, match=r"backend: .*'cuda'"):
        linear_kl_div(x, w, x, backend="cuda")
