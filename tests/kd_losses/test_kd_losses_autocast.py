"""Which dtype each step runs in: autocast, half precision, float64."""

import pytest
import torch
from torch.nn import functional as F

from kd_losses import kl_div_with_logits, linear_cross_entropy, linear_kl_div

N, H, V = 37, 24, 1003
TARGET = torch.arange(N)


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = (0.4 * torch.randn(V, H, generator=generator)).to(dtype)
    teacher = torch.randn(N, H, generator=generator).to(dtype)
    student = (teacher + 0.3 * torch.randn(N, H, generator=generator)).to(dtype)
    return student, weight, teacher


def under_autocast(loss_of, student):
    """The loss and the gradient of a leaf in float32, as a training step has them."""
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(leaf)
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad.dtype == torch.float32
    return loss.detach(), leaf.grad


def cast_by_hand(loss_of, student):
    leaf = student.clone().requires_grad_()
    loss = loss_of(leaf.bfloat16())
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("trainable", [False, True])
def test_two_heads(trainable):
    student, weight, teacher = problem(torch.float32)
    teacher_weight = weight.clone()
    weight.requires_grad_(trainable)
    got = under_autocast(lambda h: linear_kl_div(h, weight, teacher, teacher_weight), student)
    half = [tensor.bfloat16() for tensor in (weight, teacher, teacher_weight)]
    expected = cast_by_hand(lambda h: linear_kl_div(h, *half), student)
    # a gradient kept in float32 by one and rounded to bfloat16 by the other; the trainable head's
    # plain formulas cancel where the frozen one's don't
    tolerance = {"rtol": 2e-2, "atol": 1e-4}
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1], expected[1], **tolerance)


def test_a_shared_head_subtracts_before_it_rounds():
    student, weight, teacher = problem(torch.float32)
    half_weight = weight.bfloat16()
    difference = (student - teacher).bfloat16() @ half_weight.T
    teacher_logits = (teacher.bfloat16() @ half_weight.T).double()
    logits = (teacher_logits + difference).requires_grad_()
    expected = kl_div_with_logits(logits, teacher_logits)
    (logits_gradient,) = torch.autograd.grad(expected, logits)
    loss, gradient = under_autocast(lambda h: linear_kl_div(h, weight, teacher), student)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    expected_gradient = logits_gradient @ half_weight.double()
    assert (gradient - expected_gradient).norm() < 4e-3 * expected_gradient.norm()


@pytest.mark.parametrize("trainable", [False, True])
def test_cross_entropy(trainable):
    student, weight, _ = problem(torch.float32)
    half = weight.bfloat16()
    weight.requires_grad_(trainable)
    got = under_autocast(lambda h: linear_cross_entropy(h, weight, TARGET), student)
    expected = cast_by_hand(lambda h: F.cross_entropy((h @ half.T).float(), TARGET), student)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=2e-2, atol=1e-4)


def test_float64_is_left_alone():
    student, weight, teacher = problem(torch.float64)

    def losses():
        return linear_kl_div(student, weight, teacher), linear_cross_entropy(
            student, weight, TARGET
        )

    expected = losses()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_finer_teacher_is_not_rounded_to_the_students_dtype(dtype, softcap):
    student, weight, _ = problem(dtype)
    _, teacher_weight, teacher = problem(torch.float32)
    # the student's logits as its dtype gives them, the teacher's as they are
    logits = (student @ weight.T).double().requires_grad_()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = kl_div_with_logits(capped, (teacher @ teacher_weight.T).double())
    (logits_gradient,) = torch.autograd.grad(expected, logits)
    expected_gradient = logits_gradient @ weight.double()
    leaf = student.clone().requires_grad_()
    loss = linear_kl_div(leaf, weight, teacher, teacher_weight, softcap=softcap, chunk_size=8)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # the gradient is rounded to the student's dtype, before and after its product
    error = (leaf.grad - expected_gradient).norm() / expected_gradient.norm()
    assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_losses_of_half_precision_are_float32(dtype):
    student, weight, teacher = problem(dtype)
    assert linear_kl_div(student, weight, teacher).dtype == torch.float32
    assert linear_cross_entropy(student, weight, TARGET).dtype == torch.float32
    assert kl_div_with_logits(student, teacher).dtype == torch.float32
