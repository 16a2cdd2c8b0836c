"""float64 gradcheck of every function, and torch's autograd contract."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kd_losses import (
    cif_quantity_loss,
    kl_div_with_logits,
    linear_cross_entropy,
    linear_kl_div,
)

N, H, V = 6, 4, 11
WEIGHTS = torch.linspace(0.3, 2.0, N, dtype=torch.float64)
REDUCTIONS = {
    "mean": lambda losses_of: losses_of("mean"),
    "sum": lambda losses_of: losses_of("sum"),
    "weighted": lambda losses_of: (losses_of("none") * WEIGHTS).sum(),
}


def randn(*shape, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(**kwargs)


def frozen(*shape, seed):
    return randn(*shape, seed=seed, requires_grad=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("heads", ["shared", "shared with bias", "two"])
def test_linear_kl_div(reduction, temperature, squared, heads):
    weight, teacher = frozen(V, H, seed=1), frozen(N, H, seed=2)
    bias = None if heads == "shared" else frozen(V, seed=3)
    teacher_weight = frozen(V, H, seed=4) if heads == "two" else None

    def function(student):
        return REDUCTIONS[reduction](
            lambda name: linear_kl_div(
                student,
                weight,
                teacher,
                teacher_weight,
                linear_bias=bias,
                temperature=temperature,
                scale_by_temperature_squared=squared,
                reduction=name,
                chunk_size=4,
            )
        )

    assert gradcheck(function, randn(N, H))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("teacher_head", ["shared", "own"])
def test_linear_kl_div_with_a_trainable_head(temperature, teacher_head):
    teacher, student = frozen(N, H, seed=2), randn(N, H)
    weight, bias = randn(V + 2, H, seed=1), randn(V + 2, seed=3)
    fixed_weight, fixed_bias = frozen(V + 2, H, seed=4), frozen(V + 2, seed=5)

    def function(student, weight, bias):
        # gradcheck moves all that it differentiates; the teacher's side must stay put
        own = teacher_head == "own"
        return linear_kl_div(
            student,
            weight,
            teacher,
            fixed_weight if own else None,
            linear_bias=bias,
            teacher_linear_bias=fixed_bias if own else None,
            temperature=temperature,
            vocab_size=V,
            chunk_size=4,
        )

    if teacher_head == "own":
        assert gradcheck(function, (student, weight, bias))
        return
    got = torch.autograd.grad(function(student, weight, bias), (student, weight, bias))
    teacher_logits = F.linear(teacher, weight, bias).detach()[:, :V] / temperature
    logits = F.linear(student, weight, bias)[:, :V] / temperature
    loss = F.kl_div(
        logits.log_softmax(-1),
        teacher_logits.log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(got, torch.autograd.grad(loss, (student, weight, bias)))


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_either_trainable_part_gets_its_gradient(trainable):
    student, teacher = frozen(N, H, seed=0), frozen(N, H, seed=2)
    parts = {"weight": frozen(V, H, seed=1), "bias": frozen(V, seed=3)}
    parts[trainable].requires_grad_()
    target = torch.arange(N)
    kl = linear_kl_div(student, parts["weight"], teacher, linear_bias=parts["bias"])
    ce = linear_cross_entropy(student, parts["weight"], target, linear_bias=parts["bias"])
    for loss in (kl, ce):
        (gradient,) = torch.autograd.grad(loss, parts[trainable])
        assert gradient.abs().sum() > 0


def test_an_adapted_head_passes_the_gradient_on_to_its_adapter():
    student, teacher, base = randn(N, H), frozen(N, H, seed=2), frozen(V, H, seed=1)
    down, up = randn(2, H, seed=5), randn(V, 2, seed=6)
    assert gradcheck(
        lambda student, down, up: linear_kl_div(student, base + up @ down, teacher, base),
        (student, down, up),
    )


def test_the_teacher_is_detached():
    student, teacher = randn(N, H), randn(N, H, seed=1)
    weight, teacher_weight = frozen(V, H, seed=2), randn(V, H, seed=3)
    trainable = randn(V, H, seed=4)
    linear_kl_div(student, weight, teacher, teacher_weight).backward()
    linear_kl_div(student, trainable, teacher, teacher_weight).backward()
    kl_div_with_logits(student, teacher).backward()
    assert student.grad is not None
    assert trainable.grad is not None
    assert teacher.grad is None
    assert teacher_weight.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("squared", [False, True])
def test_kl_div_with_logits(reduction, squared):
    teacher = frozen(N, V, seed=1)

    def function(student):
        return REDUCTIONS[reduction](
            lambda name: kl_div_with_logits(
                student,
                teacher,
                temperature=2.5,
                scale_by_temperature_squared=squared,
                reduction=name,
            )
        )

    assert gradcheck(function, randn(N, V))
    assert gradgradcheck(function, randn(N, V))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("trainable", [False, True])
def test_linear_cross_entropy(reduction, temperature, trainable):
    weight = randn(V, H, seed=1) if trainable else frozen(V, H, seed=1)
    bias = randn(V, seed=3) if trainable else frozen(V, seed=3)
    target = torch.tensor([0, 10, -100, 3, -100, 3])

    def function(student, weight, bias):
        return REDUCTIONS[reduction](
            lambda name: linear_cross_entropy(
                student,
                weight,
                target,
                linear_bias=bias,
                temperature=temperature,
                reduction=name,
                chunk_size=3,
            )
        )

    assert gradcheck(function, (randn(N, H), weight, bias))


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cif_quantity_loss(mode, reduction):
    length = torch.tensor([3, 0, 1, 7, 2, 5])
    alpha_sum = (length + torch.tensor([0.4, 0.2, -0.7, 3.0, -1.5, 0.1])).double().requires_grad_()

    def function(alpha_sum):
        return REDUCTIONS[reduction](
            lambda name: cif_quantity_loss(alpha_sum, length, mode=mode, reduction=name)
        )

    assert gradcheck(function, alpha_sum)


@pytest.mark.parametrize("name", ["kl", "cross entropy"])
def test_backward_can_run_twice_but_not_be_differentiated(name):
    student, weight = randn(N, H), frozen(V, H, seed=1)
    if name == "kl":
        loss = linear_kl_div(student, weight, frozen(N, H, seed=2))
    else:
        loss = linear_cross_entropy(student, weight, torch.arange(N))
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match=r"^create_graph: .* differentiated once, got True"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_no_gradient_is_computed_where_none_is_wanted():
    student, weight, teacher = randn(N, H), randn(V, H, seed=1), frozen(N, H, seed=2)
    with FlopCounterMode(display=False) as with_gradient:
        linear_kl_div(student, weight.detach(), teacher)
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        quiet = linear_kl_div(student, weight, teacher)
    # a product of the head with all rows is 2 nVH
    assert with_gradient.get_total_flops() == 3 * 2 * N * V * H
    assert without.get_total_flops() == 2 * 2 * N * V * H
    assert not quiet.requires_grad
    assert not linear_kl_div(student.detach(), weight.detach(), teacher).requires_grad
    torch.testing.assert_close(quiet, linear_kl_div(student, weight, teacher).detach())
