"""A head that is given twice, with and without what makes two heads of it."""

import pytest
import torch

from kd_losses import kl_div_with_logits, linear_kl_div, linear_kl_div_cross_entropy

N, H, V = 9, 24, 1003


def randn(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    value = function(student)
    return value.detach(), *torch.autograd.grad(value, student)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_head_given_twice_is_shared(with_bias):
    half = torch.bfloat16
    weight, teacher = 0.4 * randn(V, H, seed=0, dtype=half), randn(N, H, seed=1, dtype=half)
    student = teacher + 0.05 * randn(N, H, seed=2, dtype=half)
    bias = randn(V, seed=3, dtype=half) if with_bias else None
    two = {"linear_bias": bias, "teacher_linear_bias": bias}
    target = torch.arange(N)

    def both(h, *own, **biases):
        return linear_kl_div_cross_entropy(h, weight, teacher, target, *own, **biases).loss

    def kl(h, *own, **biases):
        return linear_kl_div(h, weight, teacher, *own, **biases)

    for loss in (kl, both):
        expected = value_and_gradient(lambda h, loss=loss: loss(h, linear_bias=bias), student)
        for own in ((), (weight,)):
            got = value_and_gradient(lambda h, loss=loss, own=own: loss(h, *own, **two), student)
            for part, expected_part in zip(got, expected, strict=True):
                assert torch.equal(part, expected_part)


def test_a_head_given_twice_with_another_bias_is_not_shared():
    weight, teacher, student = randn(V, H, seed=0), randn(N, H, seed=1), randn(N, H, seed=2)
    bias, nothing = randn(V, seed=3), torch.zeros(V)
    for student_bias, teacher_bias in ((bias, None), (None, bias), (bias, bias.flip(0))):
        got = linear_kl_div(
            student, weight, teacher, weight, linear_bias=student_bias,
            teacher_linear_bias=teacher_bias,
        )  # fmt: skip
        expected = kl_div_with_logits(
            student @ weight.T + (nothing if student_bias is None else student_bias),
            teacher @ weight.T + (nothing if teacher_bias is None else teacher_bias),
        )
        torch.testing.assert_close(got, expected)


def test_the_students_soft_cap_is_that_of_a_teacher_without_a_head_alone():
    weight, teacher, student = randn(V, H, seed=0), randn(N, H, seed=1), randn(N, H, seed=2)
    logits, capped = ([f(h @ weight.T) for h in (student, teacher)] for f in (
        lambda z: z, lambda z: 2 * torch.tanh(z / 2),
    ))  # fmt: skip
    torch.testing.assert_close(
        linear_kl_div(student, weight, teacher, weight, softcap=2.0),
        kl_div_with_logits(capped[0], logits[1]),
    )
    torch.testing.assert_close(
        linear_kl_div(student, weight, teacher, softcap=2.0), kl_div_with_logits(*capped)
    )
