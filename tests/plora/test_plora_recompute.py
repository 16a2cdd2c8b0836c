"""Gradient checkpointing computes what no checkpointing computes, or raises."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from plora import plora_disabled, plora_mask

MODES = {"none": None, "reentrant": True, "non-reentrant": False}


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def checkpointed(model, mode):
    model.train()
    if MODES[mode] is None:
        return model
    # the first name exists from transformers 5.23 on, where it replaces the second
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": MODES[mode]})
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


def counted_passes(model):
    """Counts the forward passes of the first MLP: 2 per step says that checkpointing is on."""
    calls = []
    layer = next(m for n, m in model.named_modules() if n.endswith("mlp"))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("upstream", [True, False], ids=["adapter-trained", "only-plora-trained"])
def test_gradients_equal_those_without(base, embeds, span, randomised, mode, upstream):
    results = {}
    for current in ("none", mode):
        model = checkpointed(randomised(base), current)
        passes = counted_passes(model)
        inputs = embeds.clone().requires_grad_(upstream)
        with plora_mask(span(9, (2, 5), (4, 7))):
            hidden = model.get_decoder()(inputs_embeds=inputs).last_hidden_state
        hidden.square().sum().backward()
        assert len(passes) == (1 if current == "none" else 2)
        results[current] = {**gradients(model), "inputs": inputs.grad}
    assert (results["none"]["inputs"] is not None) == upstream
    for name, expected in results["none"].items():
        if expected is not None:
            assert expected.abs().max() > 0, name
            assert torch.equal(results[mode][name], expected), name


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_dropout_is_the_same_when_recomputed(base, embeds, span, randomised, mode):
    results = []
    for current in ("none", mode):
        model = checkpointed(randomised(base, lora_dropout=0.5), current)
        torch.manual_seed(5)
        with plora_mask(span(9, (2, 5), (4, 7))):
            hidden = model.get_decoder()(
                inputs_embeds=embeds.clone().requires_grad_()
            ).last_hidden_state
        torch.manual_seed(6)
        hidden.square().sum().backward()
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_two_passes_with_different_masks_before_one_backward(base, embeds, span, randomised, mode):
    masks = [span(9, (2, 5), (4, 7)), span(9, (0, 3), (8, 9))]
    results = []
    for current in ("none", mode):
        model = checkpointed(randomised(base), current)
        loss = 0
        for mask in masks:
            inputs = embeds.clone().requires_grad_()
            with plora_mask(mask):
                loss = loss + model(inputs_embeds=inputs).logits.square().sum()
        with plora_disabled(model):
            loss = loss + model(inputs_embeds=inputs).logits.square().sum()
        with plora_mask(span(9, (1, 2), (1, 2))):  # not the mask of either pass
            loss.backward()
        results.append(gradients(model) | {"inputs": inputs.grad})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_a_backward_pass_on_another_thread(base, embeds, span, randomised, mode):
    results = []
    for current in ("none", mode):
        model = checkpointed(randomised(base), current)
        with plora_mask(span(9, (2, 5), (4, 7))):
            loss = model(inputs_embeds=embeds.clone().requires_grad_()).logits.square().sum()
        # CUDA recomputes on a thread of its own; the CPU does it on the one that calls backward
        thread = threading.Thread(target=contextvars.Context().run, args=(loss.backward,))
        thread.start()
        thread.join()
        results.append(gradients(model))
    assert all(grad is not None for grad in results[1].values())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("mode", list(MODES))
def test_an_empty_mask_still_gives_zero_gradients(base, embeds, span, randomised, mode):
    model = checkpointed(randomised(base), mode)
    with plora_mask(span(9, (0, 0), (0, 0))):
        model(inputs_embeds=embeds).logits.square().sum().backward()
    grads = gradients(model)
    assert all(grad is not None and not grad.any() for grad in grads.values())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_foreign_checkpoint_raises_instead_of_losing_the_mask(
    base, embeds, span, randomised, use_reentrant, training, monkeypatch
):
    model = randomised(base).train(training)
    layer = next(m for n, m in model.named_modules() if n.endswith("mlp"))
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    )
    with plora_mask(span(9, (2, 5), (4, 7))):
        logits = model(inputs_embeds=embeds.requires_grad_()).logits
    with pytest.raises(ValueError, match="a checkpoint of your own"):
        logits.sum().backward()


def test_checkpointing_turned_on_again_later_still_carries_the_mask(base, embeds, span, randomised):
    model = randomised(base)
    grads = []
    for mode in ("none", "non-reentrant", "reentrant"):
        checkpointed(model, mode).zero_grad()
        inputs = embeds.clone().requires_grad_()
        with plora_mask(span(9, (2, 5), (4, 7))):
            model(inputs_embeds=inputs).logits.square().sum().backward()
        grads.append({name: grad.clone() for name, grad in gradients(model).items()})
    for other in grads[1:]:
        assert all(torch.equal(grads[0][name], other[name]) for name in grads[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_whole_call_carries_the_argument(
    base, embeds, span, randomised, use_reentrant
):
    masks, results = [span(9, (2, 5), (4, 7)), span(9, (0, 3), (8, 9))], []
    for checkpointing in (False, True):
        model, inputs = randomised(base).train(), embeds.clone().requires_grad_()

        def call(x, model=model):
            return model(inputs_embeds=x, use_cache=False, plora_mask=masks[0]).logits

        logits = (
            checkpoint(call, inputs, use_reentrant=use_reentrant) if checkpointing else call(inputs)
        )
        with plora_mask(masks[1]):  # around the call alone, this one would be taken for it
            logits.square().sum().backward()
        results.append(gradients(model) | {"inputs": inputs.grad})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
