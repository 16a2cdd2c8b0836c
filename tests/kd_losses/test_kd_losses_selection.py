"""The response shift by hand, and masks that pair student and teacher positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_losses import (
    kl_div_with_logits,
    linear_cross_entropy,
    linear_kl_div,
    response_mask,
)

T, F = True, False
IGNORE = -100
H, V = 3, 7


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # prompt of two, response of two: judged where they are predicted, one before
        ([IGNORE, IGNORE, 7, 9], [F, T, T, F]),
        # right padding
        ([IGNORE, 7, 9, IGNORE, IGNORE], [T, T, F, F, F]),
        # left padding
        ([IGNORE, IGNORE, IGNORE, IGNORE, 7], [F, F, F, T, F]),
        # no position predicts the first token
        ([7, 9, 4], [T, T, F]),
        ([7], [F]),
        ([], []),
        ([IGNORE, IGNORE], [F, F]),
        # token 0 is a token
        ([IGNORE, 0, 0], [T, T, F]),
        # two responses in one sequence
        ([IGNORE, 5, IGNORE, IGNORE, 6, 7], [T, F, F, T, T, F]),
    ],
)
def test_response_mask_by_hand(labels, expected):
    labels = torch.tensor(labels, dtype=torch.int64)
    assert response_mask(labels).tolist() == expected
    assert response_mask(labels[None]).tolist() == [expected]
    assert response_mask(labels, shift=False).tolist() == [label != IGNORE for label in labels]


def test_response_mask_does_not_mix_sequences():
    labels = torch.tensor([[IGNORE, IGNORE, 3], [4, IGNORE, IGNORE]])
    assert response_mask(labels).tolist() == [[F, T, F], [F, F, F]]
    assert response_mask(labels, ignore_index=3).tolist() == [[T, F, F], [T, T, F]]


def test_the_masked_loss_is_that_of_the_response_by_hand():
    # prompt a b, response c d: c is predicted at b, d at c
    labels = torch.tensor([[IGNORE, IGNORE, 2, 5]])
    student, teacher, weight = randn(1, 4, H), randn(1, 4, H, seed=1), randn(V, H, seed=2)
    mask = response_mask(labels)

    def kl_at(position):
        log_p = (teacher[0, position] @ weight.T).log_softmax(-1)
        log_q = (student[0, position] @ weight.T).log_softmax(-1)
        return sum(float(p.exp() * (p - q)) for p, q in zip(log_p, log_q, strict=True))

    got = linear_kl_div(student, weight, teacher, mask=mask, reduction="none")
    assert got.tolist() == pytest.approx([kl_at(1), kl_at(2)])

    targets = labels.roll(-1, dims=-1)[mask]
    assert targets.tolist() == [2, 5]
    by_hand = [-float((student[0, t] @ weight.T).log_softmax(-1)[y]) for t, y in [(1, 2), (2, 5)]]
    got = linear_cross_entropy(student[mask], weight, targets, reduction="none")
    assert got.tolist() == pytest.approx(by_hand)


def functions(student, weight, teacher, **options):
    yield linear_kl_div(student, weight, teacher, **options)
    yield linear_kl_div(student, weight, teacher, weight.clone(), **options)
    yield kl_div_with_logits(student @ weight.T, teacher @ weight.T, **options)


@st.composite
def paired_masks(draw):
    batch = draw(st.integers(1, 4))
    length, teacher_length = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    mask = torch.zeros(batch, length, dtype=torch.bool)
    teacher_mask = torch.zeros(batch, teacher_length, dtype=torch.bool)
    pairs = []
    for b in range(batch):
        count = draw(st.integers(0, min(length, teacher_length)))
        chosen = sorted(draw(st.permutations(range(length)))[:count])
        teacher_chosen = sorted(draw(st.permutations(range(teacher_length)))[:count])
        mask[b, chosen] = True
        teacher_mask[b, teacher_chosen] = True
        pairs += [(b, i, j) for i, j in zip(chosen, teacher_chosen, strict=True)]
    return mask, teacher_mask, pairs


@settings(max_examples=40, deadline=None)
@given(paired_masks())
def test_positions_are_paired_in_order_within_each_sequence(case):
    mask, teacher_mask, pairs = case
    student, teacher = randn(*mask.shape, H), randn(*teacher_mask.shape, H, seed=1)
    weight = randn(V, H, seed=2)
    expected = torch.zeros(len(pairs), dtype=torch.float64)
    for i, (b, s, t) in enumerate(pairs):
        log_p = (teacher[b, t] @ weight.T).log_softmax(-1)
        log_q = (student[b, s] @ weight.T).log_softmax(-1)
        expected[i] = log_p.exp() @ (log_p - log_q)
    options = {"mask": mask, "teacher_mask": teacher_mask}
    for got in functions(student, weight, teacher, reduction="none", **options):
        torch.testing.assert_close(got, expected)
    for got in functions(student, weight, teacher, **options):
        torch.testing.assert_close(got, expected.sum() / max(1, len(pairs)))


def test_a_mask_equals_selecting_first():
    student, teacher, weight = randn(2, 4, H), randn(2, 4, H, seed=1), randn(V, H, seed=2)
    mask = torch.tensor([[T, F, T, T], [F, F, F, T]])
    masked = functions(student, weight, teacher, mask=mask)
    selected = functions(student[mask], weight, teacher[mask])
    flat = functions(student.flatten(0, 1), weight, teacher.flatten(0, 1), mask=mask.flatten())
    for by_mask, by_hand, by_flat in zip(masked, selected, flat, strict=True):
        torch.testing.assert_close(by_mask, by_hand)
        torch.testing.assert_close(by_mask, by_flat)


def test_unselected_positions_get_no_gradient_and_cannot_poison():
    teacher, weight = randn(2, 4, H, seed=1), randn(V, H, seed=2)
    mask = torch.tensor([[T, F, T, T], [F, F, F, T]])
    poisoned = randn(2, 4, H).masked_fill(~mask[..., None], float("nan")).requires_grad_()
    for loss in functions(poisoned, weight, teacher, mask=mask):
        (gradient,) = torch.autograd.grad(loss, poisoned)
        assert torch.equal(gradient.isfinite().all(-1), torch.ones_like(mask))
        assert torch.equal((gradient != 0).any(-1), mask)
    target = torch.where(mask, 1, IGNORE)
    loss = linear_cross_entropy(poisoned, weight, target)
    (gradient,) = torch.autograd.grad(loss, poisoned)
    assert torch.equal((gradient != 0).any(-1), mask)


def test_a_teacher_mask_alone_selects_for_the_whole_student():
    student, teacher, weight = randn(1, 2, H), randn(1, 4, H, seed=1), randn(V, H, seed=2)
    teacher_mask = torch.tensor([[F, T, F, T]])
    for got, expected in zip(
        functions(student, weight, teacher, teacher_mask=teacher_mask),
        functions(student, weight, teacher[:, [1, 3]]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_of_the_teachers_selected_rows(tmp_path, dtype):
    student, teacher = randn(2, 4, H), randn(2, 4, H, seed=1).to(dtype)
    weight = randn(V, H, seed=2)
    mask = torch.tensor([[T, F, T, T], [F, F, F, T]])
    torch.save(teacher[mask], tmp_path / "cache.pt")
    cached = torch.load(tmp_path / "cache.pt")
    for own in (None, weight.clone()):
        expected = linear_kl_div(student, weight, teacher.double(), own, mask=mask)
        torch.testing.assert_close(linear_kl_div(student, weight, cached, own, mask=mask), expected)
    with pytest.raises(ValueError, match=r"teacher_input: .*the 4 rows that mask selects, got 3"):
        linear_kl_div(student, weight, cached[:3], mask=mask)
