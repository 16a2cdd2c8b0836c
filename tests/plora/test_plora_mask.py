"""The ambient mask: what it accepts, what it means, and that it never outlives its block."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plora import plora_disabled, plora_mask
from plora.activation import active_rows, current_activation


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(0, 6),
    times=st.integers(1, 3),
    past=st.integers(0, 8),
    length=st.integers(0, 7),
    seed=st.integers(0, 2**31 - 1),
)
def test_active_rows_equal_a_loop_over_positions(rows, columns, times, past, length, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    expected = [
        sequence * length + step
        for sequence in range(rows * times)
        for step in range(length)
        if past + step < columns and mask[sequence // times, past + step]
    ]
    found = active_rows(
        mask, batch=rows * times, length=length, past=past, device=torch.device("cpu")
    )
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, r"bool tensor, got dtype torch.float32"),
        ([[True]], TypeError, r"got list"),
        (None, TypeError, r"got NoneType"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"got \(3,\)"),
    ],
)
def test_a_bad_mask_raises(mask, error, message):
    with pytest.raises(error, match=message), plora_mask(mask):
        pass


def test_a_mask_of_another_batch_raises(llama, randomised, span):
    model = randomised(llama)
    with (
        plora_mask(span(4, (0, 2), (0, 2))),
        pytest.raises(ValueError, match=r"batch of 3 .* \(2, 4\)"),
    ):
        model(input_ids=torch.ones(3, 4, dtype=torch.long))
    assert current_activation() is None


def test_training_needs_a_mask_or_plora_disabled(llama, randomised, span):
    model = randomised(llama).train()
    ids = torch.ones(1, 4, dtype=torch.long)
    for call in (model, model.get_decoder()):
        with pytest.raises(ValueError, match="with plora_mask"):
            call(input_ids=ids)
        with plora_mask(span(4, (0, 2))):
            call(input_ids=ids)
        with plora_disabled(model):
            call(input_ids=ids)


def test_blocks_nest_and_end(llama, randomised, span):
    model = randomised(llama)
    ids = torch.arange(4)[None]
    outer, inner = span(4, (0, 2)), span(4, (1, 4))

    def logits():
        return model(input_ids=ids).logits

    plain = logits()
    with plora_mask(inner):
        only_inner = logits()
    with plora_mask(outer):
        with plora_mask(inner):
            assert torch.equal(logits(), only_inner)
            with plora_disabled(model), plora_disabled(model):
                assert torch.equal(logits(), plain)
            assert torch.equal(logits(), only_inner)
        assert not torch.equal(logits(), only_inner)
        assert not torch.equal(logits(), plain)
    assert torch.equal(logits(), plain)


def test_nothing_stays_behind_when_the_forward_pass_raises(llama, randomised, span):
    model = randomised(llama)
    ids = torch.arange(4)[None]
    plain = model(input_ids=ids).logits
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), plora_mask(span(4, (0, 2))):
        model(input_ids=ids)
    handle.remove()
    assert current_activation() is None
    assert torch.equal(model(input_ids=ids).logits, plain)
    with pytest.raises(ValueError, match="outside of one"):
        model.model.layers[0].mlp(torch.randn(1, 4, 16))


def test_a_hook_that_raises_before_ours_does_not_unbalance_the_passes(llama, randomised, span):
    model = randomised(llama)
    ids = torch.arange(4)[None]
    handle = model.model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError), plora_mask(span(4, (0, 2))):
        model(input_ids=ids)
    handle.remove()
    assert current_activation() is None


def test_an_interrupted_pass_is_forgotten_by_the_next_one(llama, randomised, span):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = randomised(llama)
    ids = torch.arange(4)[None]
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), plora_mask(span(4, (0, 2))):
        model(input_ids=ids)
    handle.remove()
    assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert current_activation() is None


def test_disabling_one_model_leaves_another_one_on(llama, randomised, span):
    first, second = randomised(llama), randomised(llama)
    ids = torch.arange(4)[None]
    with plora_mask(span(4, (0, 2))):
        adapted = first(input_ids=ids).logits
        with plora_disabled(second):
            assert torch.equal(first(input_ids=ids).logits, adapted)
            assert not torch.equal(second(input_ids=ids).logits, adapted)
            with plora_disabled(first):
                assert not torch.equal(second(input_ids=ids).logits, adapted)


def test_disabling_a_part_raises_and_a_plain_model_passes(llama, randomised):
    part = randomised(llama).model.layers[0]
    with pytest.raises(ValueError, match="got its part LlamaDecoderLayer"), plora_disabled(part):
        pass
    with plora_disabled(llama):
        llama(input_ids=torch.arange(4)[None])


def test_a_disabled_container_disables_the_model_inside(llama, randomised, span):
    model = randomised(llama)
    ids = torch.arange(4)[None]
    with plora_mask(span(4, (0, 2))), plora_disabled(torch.nn.ModuleDict({"llm": model})):
        logits = model(input_ids=ids).logits
    assert torch.equal(logits, llama(input_ids=ids).logits)


def test_another_thread_does_not_see_the_mask(llama, randomised, span):
    model = randomised(llama)
    ids = torch.arange(4)[None]
    plain = model(input_ids=ids).logits
    seen = []

    def work():
        seen.append(model(input_ids=ids).logits)

    with plora_mask(span(4, (0, 2))):
        thread = threading.Thread(target=contextvars.Context().run, args=(work,))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain)


def test_the_rows_are_computed_once_per_pass(llama, randomised, span, monkeypatch):
    model = randomised(llama)
    calls = []
    original = torch.Tensor.nonzero
    monkeypatch.setattr(
        torch.Tensor, "nonzero", lambda self, *a, **k: calls.append(1) or original(self, *a, **k)
    )
    with plora_mask(span(4, (0, 2))):
        model(input_ids=torch.arange(4)[None])
    assert len(calls) == 1
