"""KL with cross entropy: the same as the two losses."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from kd_losses import linear_cross_entropy, linear_kl_div, linear_kl_div_cross_entropy

N, H, V = 7, 5, 23


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, TEACHER = randn(V, H, seed=1), randn(N, H, seed=2)
TARGET = torch.tensor([3, -100, 0, 22, -100, 1, 1])


@pytest.mark.parametrize("heads", ["shared", "two", "soft cap", "trainable"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_losses_are_the_two_losses(heads, temperature):
    weight = WEIGHT.clone().requires_grad_(heads == "trainable")
    own = WEIGHT.flip(0) if heads == "two" else None
    bias = {"linear_bias": randn(V, seed=5)}
    cap = {"softcap": 2.0} if heads == "soft cap" else {}
    options = {"temperature": temperature, "scale_by_temperature_squared": True, **bias, **cap}
    student = randn(N, H).requires_grad_()
    leaves = [student, weight] if heads == "trainable" else [student]
    kl = linear_kl_div(student, weight, TEACHER, own, **options)
    ce = linear_cross_entropy(student, weight, TARGET, **bias, **cap)
    got = linear_kl_div_cross_entropy(
        student, weight, TEACHER, TARGET, own, kl_weight=0.3, cross_entropy_weight=1.7,
        chunk_size=3, **options,
    )  # fmt: skip
    torch.testing.assert_close(got.kl, kl.detach())
    torch.testing.assert_close(got.cross_entropy, ce.detach())
    expected = 0.3 * kl + 1.7 * ce
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.loss, leaves), torch.autograd.grad(expected, leaves)
    )
    assert not got.kl.requires_grad


def test_both_losses_have_their_own_counts_and_masks():
    student, teacher = randn(2, 3, H).requires_grad_(), randn(2, 4, H, seed=4)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    teacher_mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    target = torch.tensor([[1, 2, -100], [4, -100, 5]])
    got = linear_kl_div_cross_entropy(
        student, WEIGHT, teacher, target, mask=mask, teacher_mask=teacher_mask, num_items=10,
        target_num_items=torch.tensor(6),
    )  # fmt: skip
    kl = linear_kl_div(
        student, WEIGHT, teacher, mask=mask, teacher_mask=teacher_mask, reduction="sum"
    )
    ce = linear_cross_entropy(student, WEIGHT, torch.where(mask, target, -100), reduction="sum")
    torch.testing.assert_close(got.loss, kl / 10 + ce / 6)
    nothing = linear_kl_div_cross_entropy(
        student, WEIGHT, student, target, mask=torch.zeros_like(mask)
    )
    nothing.loss.backward()
    assert nothing.loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_both_losses_cost_the_products_of_one():
    student = randn(N, H).requires_grad_()
    with FlopCounterMode(display=False) as flops:
        linear_kl_div_cross_entropy(student, WEIGHT, TEACHER, TARGET)
    assert flops.get_total_flops() == 3 * 2 * N * V * H


def test_both_losses_gradcheck_and_error():
    for weight in (WEIGHT, WEIGHT.clone().requires_grad_()):
        assert gradcheck(
            lambda h, w=weight: (
                linear_kl_div_cross_entropy(h, w, TEACHER, TARGET, temperature=1.6).loss
            ),
            randn(N, H).requires_grad_(),
        )
    with pytest.raises(ValueError, match=r"target: .*\(7,\), got \(6,\)"):
        linear_kl_div_cross_entropy(randn(N, H), WEIGHT, TEACHER, TARGET[:6])
    with pytest.raises(TypeError, match=r"target: .*int32"):
        linear_kl_div_cross_entropy(randn(N, H), WEIGHT, TEACHER, TARGET.int())


@pytest.mark.parametrize("own", [None, WEIGHT.flip(0)], ids=["shared", "two heads"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_forbidden_word_0_does_not_count_where_there_is_no_target(own, trainable):
    bias = torch.zeros(V, dtype=torch.float64)
    bias[0] = -torch.inf
    options = {"linear_bias": bias, "teacher_linear_bias": None if own is None else bias}
    target = torch.tensor([3, -100, 1, 22, -100, 1, 1])
    weight = WEIGHT.clone().requires_grad_(trainable)
    student = randn(N, H).requires_grad_()
    got = linear_kl_div_cross_entropy(student, weight, TEACHER, target, own, **options)
    kl = linear_kl_div(student, weight, TEACHER, own, **options)
    ce = linear_cross_entropy(student, weight, target, linear_bias=bias)
    torch.testing.assert_close(got, (kl + ce, kl.detach(), ce.detach()))
    torch.testing.assert_close(
        torch.autograd.grad(got.loss, student), torch.autograd.grad(kl + ce, student)
    )
    # a target that is forbidden costs what it costs
    target[0] = 0
    got = linear_kl_div_cross_entropy(student, weight, TEACHER, target, own, **options)
    assert got.cross_entropy.isposinf()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("count", [0, 0.5, 3])
def test_both_losses_are_divided_as_the_two_are(trainable, as_tensor, count):
    count = torch.tensor(count) if as_tensor else count
    weight = WEIGHT.clone().requires_grad_(trainable)
    student = randn(N, H).requires_grad_()
    for target in (TARGET, torch.full((N,), -100)):
        got = linear_kl_div_cross_entropy(
            student, weight, TEACHER, target, num_items=count, target_num_items=count
        )
        kl = linear_kl_div(student, weight, TEACHER, num_items=count)
        ce = linear_cross_entropy(student, weight, target, num_items=count)
        assert kl.isfinite()
        torch.testing.assert_close(got, (kl + ce, kl.detach(), ce.detach()))
