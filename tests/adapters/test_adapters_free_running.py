"""Rows of known and of predicted length in one batch: each as it is among its own kind."""

import pytest
import torch

from speech_adapters import CFormer, CFormerConfig


@pytest.fixture
def case():
    torch.manual_seed(0)
    adapter = CFormer(
        CFormerConfig(8, 6, num_pre_layers=1, num_post_layers=1, num_heads=2, dropout=0.0)
    )
    frames = torch.randn(4, 30, 8)
    real = torch.arange(30) < torch.tensor([30, 9, 22, 17])[:, None]
    return adapter, frames, real, torch.tensor([3, 7, 2, 5])


@pytest.mark.parametrize("free", [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_each_row_is_what_it_is_in_a_batch_of_its_kind(case, free):
    adapter, frames, real, targets = case
    free = torch.tensor(free, dtype=torch.bool)
    told, alone = adapter(frames, real, target_lengths=targets), adapter(frames, real)
    assert not torch.equal(told.attention_mask.sum(1), alone.attention_mask.sum(1))
    mixed = adapter(frames, real, target_lengths=targets, free_running=free)
    for row in range(4):
        expected = alone if free[row] else told
        n = int(expected.attention_mask[row].sum())
        assert mixed.attention_mask[row].tolist() == [
            i < n for i in range(mixed.attention_mask.shape[1])
        ]
        for name in ("hidden_states", "fire_times"):
            torch.testing.assert_close(
                getattr(mixed, name)[row, :n], getattr(expected, name)[row, :n]
            )
            assert not getattr(mixed, name)[row, n:].any()
        torch.testing.assert_close(mixed.alpha_sum[row], expected.alpha_sum[row])
        torch.testing.assert_close(mixed.alphas[row], expected.alphas[row])


def test_gradients_are_those_of_the_rows_by_themselves(case):
    adapter, frames, real, targets = case
    free = torch.tensor([True, False, True, False])

    def gradients(*losses):
        adapter.zero_grad()
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    def size(out):
        return out.hidden_states.square().sum() + out.alpha_sum.sum()

    apart = gradients(
        size(adapter(frames[free], real[free])),
        size(adapter(frames[~free], real[~free], target_lengths=targets[~free])),
    )
    mixed = gradients(size(adapter(frames, real, target_lengths=targets, free_running=free)))
    for found, expected in zip(mixed, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_value_for_each_row_is_asked_for(case):
    adapter, frames, real, targets = case
    with pytest.raises(ValueError, match=r"free_running: expected one value for each row"):
        adapter(frames, real, target_lengths=targets, free_running=torch.tensor([True]))


def test_what_says_which_rows_are_free_is_bool(case):
    adapter, frames, real, targets = case
    rows = torch.ones(len(targets), dtype=torch.long)
    with pytest.raises(TypeError, match=r"free_running: expected bool, got torch.int64"):
        adapter(frames, real, target_lengths=targets, free_running=rows)


def test_one_target_length_for_each_row_is_asked_for_where_some_are_free(case):
    adapter, frames, real, targets = case
    rows = torch.arange(len(targets)) == 0
    more = torch.cat([targets, targets])
    with pytest.raises(ValueError, match=r"target_lengths: expected one for each row"):
        adapter(frames, real, target_lengths=more, free_running=rows)
