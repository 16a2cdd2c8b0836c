"""Top-k teachers, and the losses between hidden states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from kd_losses import (
    hidden_cosine_loss,
    hidden_mse_loss,
    linear_kl_div,
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
    for wrong in (V, -1):
        bad = ids.masked_fill(mask.unsqueeze(-1), wrong)
        for weight in (WEIGHT, WEIGHT.clone().requires_grad_()):
            with pytest.raises(ValueError, match=rf"topk_ids: .*0 to 22, got {wrong} to {wrong}"):
                linear_topk_kl_div(student, weight, bad, log_p, mask=mask)
    # what stands where nothing is selected is not looked at
    elsewhere = ids.masked_fill(~mask.unsqueeze(-1), V)
    assert torch.equal(linear_topk_kl_div(student, WEIGHT, elsewhere, log_p, mask=mask), expected)
    with pytest.raises(ValueError, match=r"topk_ids and topk_logprobs: .*same shape"):
        linear_topk_kl_div(student, WEIGHT, ids[..., :2], log_p)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_rest_of_a_bucket_that_nobody_can_say_is_rounding(trainable):
    bias = torch.zeros(V)
    bias[-2:] = -torch.inf
    student, weight = randn(N, H).float().requires_grad_(), WEIGHT.float()
    log_p, ids = (TEACHER.float() @ weight.T + bias).log_softmax(-1).topk(V - 2)
    # as float32 rounds it, and as a cache in half precision does
    for stored_p in (log_p, log_p.half()):
        assert (stored_p.float().exp().sum(-1) < 1).any()
        got = linear_topk_kl_div(
            student, weight.clone().requires_grad_(trainable), ids, stored_p, linear_bias=bias,
            reduction="none",
        )  # fmt: skip
        expected = linear_kl_div(
            student, weight, TEACHER.float(), linear_bias=bias, reduction="none"
        )
        # float16 has 11 bits
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), student),
            torch.autograd.grad(expected.sum(), student),
            rtol=2e-3,
            atol=2e-3,
        )


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


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-13])
def test_a_hidden_state_without_direction_gets_no_gradient(size):
    student = torch.full((2, H), size)
    student[1] = torch.arange(H)
    student.requires_grad_()
    teacher = torch.ones(2, H)
    losses = hidden_cosine_loss(student, teacher, reduction="none")
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(0.5)
    assert torch.equal(student.grad[0], torch.zeros(H))
    leaf = student.detach()[1:].double().requires_grad_()
    (expected,) = torch.autograd.grad(1 - F.cosine_similarity(leaf, teacher[1:].double()), leaf)
    torch.testing.assert_close(student.grad[1:], expected.float())
    # nor does a teacher without one break anything
    (gradient,) = torch.autograd.grad(
        hidden_cosine_loss(teacher.requires_grad_(), student), teacher
    )
    assert gradient.abs().max() <= 1
