"""Top-k teachers, KL with cross entropy, hidden states, modules' soft caps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kd_losses import (
    hidden_cosine_loss,
    hidden_mse_loss,
    linear_cross_entropy,
    linear_kl_div,
    linear_kl_div_cross_entropy,
    linear_topk_kl_div,
)

N, H, V = 7, 5, 23


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, TEACHER = randn(V, H, seed=1), randn(N, H, seed=2)


def stored(k, temperature=1.0):
    log_p, ids = (TEACHER @ WEIGHT.T / temperature).log_softmax(-1).topk(k)
    return ids, log_p


def by_hand(student, ids, log_p, tail, temperature=1.0):
    """Row by row, entry by entry."""
    losses = []
    q = (student @ WEIGHT.T / temperature).softmax(-1)
    for q_row, ids_row, log_p_row in zip(q, ids, log_p, strict=True):
        p_row = log_p_row.exp() if tail == "bucket" else log_p_row.softmax(-1)
        loss = sum(p * (p / q_row[i]).log() for p, i in zip(p_row, ids_row, strict=True))
        if tail == "bucket":
            rest_q = sum(q_row[i] for i in range(V) if i not in ids_row.tolist())
            rest = 1 - p_row.sum()
            loss = loss + rest * (rest / rest_q).log()
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_by_hand(tail, trainable, temperature):
    ids, log_p = stored(4, temperature)
    student = randn(N, H).requires_grad_()
    expected = by_hand(student, ids, log_p, tail, temperature)
    head = WEIGHT.clone().requires_grad_(trainable)
    got = linear_topk_kl_div(
        student, head, ids, log_p, tail=tail, temperature=temperature, reduction="none",
        chunk_size=3,
    )  # fmt: skip
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), student),
        torch.autograd.grad(expected.square().sum(), student),
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_topk_gradcheck(tail):
    ids, log_p = stored(4)
    leaves = (randn(N, H).requires_grad_(), WEIGHT.clone().requires_grad_())
    for inputs in (leaves[:1], leaves):
        assert gradcheck(
            lambda h, w=WEIGHT: linear_topk_kl_div(h, w, ids, log_p, tail=tail, softcap=3.0), inputs
        )


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_topk_of_all_is_the_kl(tail):
    student = randn(N, H).requires_grad_()
    expected = linear_kl_div(student, WEIGHT, TEACHER)
    for weight in (WEIGHT, WEIGHT.clone().requires_grad_()):
        got = linear_topk_kl_div(student, weight, *stored(V), tail=tail)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, student),
            torch.autograd.grad(expected, student, retain_graph=True),
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, V), st.floats(-3, 1), st.integers(0, 10**6))
def test_a_bucket_is_between_zero_and_the_whole_kl(k, difference, seed):
    student = TEACHER + 10**difference * randn(N, H, seed=seed)
    whole = linear_kl_div(student, WEIGHT, TEACHER, reduction="none")
    part = linear_topk_kl_div(student, WEIGHT, *stored(k), reduction="none")
    assert (part >= -1e-12).all()
    assert (part <= whole + 1e-12).all()


def test_topk_masks_and_errors():
    mask = torch.tensor([[True, False, True, True]])
    ids, log_p = (x[:4].unsqueeze(0) for x in stored(3))
    student = randn(1, 4, H)
    expected = linear_topk_kl_div(student[mask], WEIGHT, ids[mask], log_p[mask])
    assert torch.equal(linear_topk_kl_div(student, WEIGHT, ids, log_p, mask=mask), expected)
    cached = linear_topk_kl_div(student, WEIGHT, ids[mask], log_p[mask], mask=mask)
    assert torch.equal(cached, expected)
    with pytest.raises(ValueError, match=r"tail: .*'drop'"):
        linear_topk_kl_div(student, WEIGHT, ids, log_p, tail="drop")
    with pytest.raises(TypeError, match=r"topk_ids: .*int32"):
        linear_topk_kl_div(student, WEIGHT, ids.int(), log_p)
    with pytest.raises(ValueError, match=r"topk_ids and topk_logprobs: .*same shape"):
        linear_topk_kl_div(student, WEIGHT, ids[..., :2], log_p)


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
    with pytest.raises(ValueError, match=r"target: .*\(7,\), got torch.int64 of \(6,\)"):
        linear_kl_div_cross_entropy(randn(N, H), WEIGHT, TEACHER, TARGET[:6])


@pytest.mark.parametrize("loss", [hidden_mse_loss, hidden_cosine_loss])
def test_hidden_state_losses(loss):
    student, teacher = randn(2, 3, H).requires_grad_(), randn(2, 3, H, seed=3).requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    if loss is hidden_mse_loss:
        expected = F.mse_loss(student[mask], teacher[mask])
    else:
        expected = (1 - F.cosine_similarity(student[mask], teacher[mask], dim=-1)).mean()
    got = loss(student, teacher, mask=mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(loss(student, teacher, mask=mask, num_items=8), expected / 2)
    torch.testing.assert_close(
        loss(student, teacher, mask=mask, reduction="none").sum(), 4 * expected
    )
    assert gradcheck(lambda h: loss(h, teacher, mask=mask), student)
    got.backward()
    assert teacher.grad is None
    empty = loss(student, teacher, mask=torch.zeros_like(mask))
    empty.backward()
    assert empty.item() == 0
    assert loss(student, student).item() == 0
    assert loss(student.bfloat16(), teacher).dtype == torch.float64
    assert loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"teacher_input: .*width 5, got 4"):
        loss(student, teacher[..., :4])


def test_a_zero_hidden_state_has_a_finite_gradient():
    student = torch.zeros(1, H, requires_grad=True)
    hidden_cosine_loss(student, torch.ones(1, H)).backward()
    assert student.grad.isfinite().all()
