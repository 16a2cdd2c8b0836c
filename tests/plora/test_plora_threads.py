"""Masks of several threads and generators at a time."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

from plora import PLoRAConfig, apply_plora, plora_disabled, plora_mask, unadapted_layers


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = PLoRAConfig(r=2, lora_dropout=0.0)
    model = apply_plora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config).eval()
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model


MASK = torch.tensor([[True, False, True]] * 2)


@pytest.mark.parametrize("order", ["first in, first out", "last in, first out"])
def test_generators_that_yield_inside_of_a_block_leave_no_mask(model, order):
    x = torch.randn(2, 3, 4)
    plain = model(x)

    def stream(mask):
        with plora_mask(mask):
            yield model(x)

    streams = [stream(MASK), stream(~MASK)]
    found = [next(one) for one in streams]
    assert not torch.equal(found[0], found[1])
    for one in streams if order == "first in, first out" else streams[::-1]:
        one.close()
    assert torch.equal(model(x), plain)


def test_generators_that_yield_while_disabled_leave_the_model_on(model):
    x = torch.randn(2, 3, 4)
    with plora_mask(MASK):
        adapted = model(x)

        def stream():
            with plora_disabled(model):
                yield model(x)

        first, second = stream(), stream()
        plain = next(first)
        assert torch.equal(next(second), plain)
        first.close()
        assert torch.equal(model(x), plain)
        second.close()
        assert torch.equal(model(x), adapted)


def test_two_first_passes_at_a_time_find_what_one_finds(model):
    inside, entered, results = threading.Event(), threading.Event(), []
    x = torch.randn(2, 3, 4)

    def meet(layer, name, told, awaited):
        def hook(*_):
            if threading.current_thread().name == name:
                told.set()
                assert awaited is None or awaited.wait(20)

        return layer.base_layer.register_forward_pre_hook(hook)

    # B begins its pass while A is between the two layers
    handles = [meet(model[1], "A", inside, entered), meet(model[0], "B", entered, None)]

    def work():
        if threading.current_thread().name == "B":
            assert inside.wait(20)
        results.append(model(x, plora_mask=MASK))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work, name=name) for name in "AB"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not said
    assert unadapted_layers(model) == {}
    assert len(results) == 2
    assert torch.equal(results[0], results[1])
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_pre_hooks for layer in model)


def test_the_argument_reaches_another_thread_and_the_block_does_not(llama, randomised):
    model, ids, found = randomised(llama), torch.arange(6).view(2, 3), {}

    def generate(**given):
        return model.generate(ids, max_new_tokens=3, do_sample=False, **given)

    def work():
        found["block"] = generate()
        found["argument"] = generate(plora_mask=MASK)

    with plora_mask(MASK):
        expected = generate()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(found["argument"], expected)
    assert torch.equal(found["block"], generate())
