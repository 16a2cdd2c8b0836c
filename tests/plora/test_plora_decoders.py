"""PLoRA inside Llama, Qwen2, Qwen3 and GPT-2: values, gradients, generation."""

from __future__ import annotations

import copy

import pytest
import torch

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_disabled, plora_mask, remove_plora

TOLERANCE = {"rtol": 0, "atol": 1e-9}  # float64, three layers deep; measured below 1e-12


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def adapters(model):
    return [p for name, p in model.named_parameters() if "lora_" in name]


def test_zero_initialised_is_the_base_bitwise(base, embeds, span):
    expected = base(inputs_embeds=embeds).logits
    model = apply_plora(copy.deepcopy(base), PLoRAConfig(r=4))
    with plora_mask(span(9, (2, 5), (0, 9))):
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)


def test_without_a_mask_or_disabled_or_empty_it_is_the_base_bitwise(base, embeds, span, randomised):
    expected = base(inputs_embeds=embeds).logits
    model = randomised(base)
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    with plora_mask(span(9, (0, 0), (0, 0))):
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    model.train()
    with plora_mask(span(9, (2, 5), (0, 9))):
        assert not torch.equal(model(inputs_embeds=embeds).logits, expected)
        with plora_disabled(model):
            assert torch.equal(model(inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize("how", ["whole", "decoder", "ids", "positional"])
def test_it_equals_the_dense_formula_with_gradients(
    base, embeds, span, randomised, dense_oracle, how
):
    model = randomised(base)
    mask = span(9, (2, 5), (4, 7))
    ids = torch.arange(18).view(2, 9) + 3
    calls = {
        "whole": lambda m, x: m(inputs_embeds=x).logits,
        "decoder": lambda m, x: m.get_decoder()(inputs_embeds=x).last_hidden_state,
        "ids": lambda m, x: m(input_ids=ids).logits,
        "positional": lambda m, x: m(ids).logits,
    }
    call = calls[how]
    truth_input, ours_input = (embeds.clone().requires_grad_() for _ in range(2))
    with dense_oracle(base.requires_grad_(False), model, mask):
        truth = call(base, truth_input)
    sources = adapters(model) + ([truth_input] if how in ("whole", "decoder") else [])
    truth_grads = torch.autograd.grad(truth.square().sum(), sources)
    with plora_mask(mask):
        ours = call(model, ours_input)
    torch.testing.assert_close(ours, truth, **TOLERANCE)
    sources = adapters(model) + ([ours_input] if how in ("whole", "decoder") else [])
    ours_grads = torch.autograd.grad(ours.square().sum(), sources)
    assert all(grad.abs().max() > 0 for grad in ours_grads)
    torch.testing.assert_close(ours_grads, truth_grads, rtol=1e-9, atol=1e-9)


def test_positions_before_the_first_masked_one_are_unchanged_bitwise(
    base, embeds, span, randomised
):
    expected = base(inputs_embeds=embeds).logits
    with plora_mask(span(9, (4, 6), (6, 9))):
        logits = randomised(base)(inputs_embeds=embeds).logits
    for row, first in enumerate((4, 6)):
        assert torch.equal(logits[row, :first], expected[row, :first])
        assert (logits[row, first:] != expected[row, first:]).any(-1).all()


def test_only_a_and_b_are_trainable(base):
    model = apply_plora(base, PLoRAConfig(r=4))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B"}
    assert len(trainable) == 2 * sum(isinstance(m, PLoRALinear) for m in model.modules())


def test_remove_restores_everything_bitwise(base, embeds, span, randomised):
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    modules = [(name, type(module)) for name, module in base.named_modules()]
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    model = randomised(base)
    # the first name exists from transformers 5.23 on, where it replaces the second
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    for _ in range(2):
        with plora_mask(span(9, (2, 5), (4, 7))):
            model(inputs_embeds=embeds).logits.sum().backward()
    assert remove_plora(model) is model
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    leftovers = [k for m in model.modules() for k, v in vars(m).items() if "plora" in repr(v)]
    assert leftovers == []
    assert torch.equal(
        model.eval()(inputs_embeds=embeds).logits, base.eval()(inputs_embeds=embeds).logits
    )


def greedy_without_plora_code(base, oracle, adapted, mask, embeds, steps):
    """Greedy decoding of whole sequences, by the dense oracle: no cache, no beams, no padding."""
    tokens = []
    table = base.get_input_embeddings().weight
    with oracle(base, adapted, mask), torch.no_grad():
        for _ in range(steps):
            token = base(inputs_embeds=embeds).logits[:, -1].argmax(-1)
            tokens.append(token)
            embeds = torch.cat([embeds, table[token][:, None]], dim=1)
    return torch.stack(tokens, dim=1)


GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def ones(embeds):
    return torch.ones(embeds.shape[:2], dtype=torch.long)


@pytest.mark.parametrize("cache", ["dynamic", "none", "static"])
def test_greedy_generation_equals_the_oracle(base, embeds, span, randomised, dense_oracle, cache):
    model = randomised(base)
    mask = span(9, (2, 5), (4, 9))
    expected = greedy_without_plora_code(base, dense_oracle, model, mask, embeds, 6)
    plain = greedy_without_plora_code(base, dense_oracle, model, mask & False, embeds, 6)
    assert not torch.equal(expected, plain)
    settings = {
        "dynamic": {},
        "none": {"use_cache": False},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }[cache]
    with plora_mask(mask):
        tokens = model.generate(
            inputs_embeds=embeds, attention_mask=ones(embeds), **GENERATE, **settings
        )
    assert torch.equal(tokens, expected)


def test_generation_from_ids_starts_counting_at_the_prompt(base, span, randomised, dense_oracle):
    model = randomised(base)
    ids = torch.arange(3, 21).view(2, 9)
    mask = span(9, (1, 4), (5, 9))
    embeds = base.get_input_embeddings()(ids).detach()
    expected = greedy_without_plora_code(base, dense_oracle, model, mask, embeds, 6)
    with plora_mask(mask):
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATE)
    assert torch.equal(tokens[:, 9:], expected)


def test_a_mask_that_reaches_into_the_generated_tokens(
    base, embeds, span, randomised, dense_oracle
):
    model = randomised(base)
    mask = span(12, (7, 12), (4, 10))
    expected = greedy_without_plora_code(base, dense_oracle, model, mask, embeds, 6)
    with plora_mask(mask):
        tokens = model.generate(inputs_embeds=embeds, attention_mask=ones(embeds), **GENERATE)
    assert torch.equal(tokens, expected)


def test_beams_with_cache_equal_beams_without(base, embeds, span, randomised):
    model = randomised(base)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with plora_mask(span(9, (2, 5), (4, 9))):
        both = [
            model.generate(
                inputs_embeds=embeds,
                attention_mask=ones(embeds),
                use_cache=use_cache,
                **GENERATE,
                **beams,
            )
            for use_cache in (True, False)
        ]
    assert torch.equal(*both)


def test_each_beam_row_uses_the_mask_of_its_own_sequence(base, embeds, span, randomised):
    model = randomised(base)
    beams = {"num_beams": 3, **GENERATE}
    mask = span(9, (0, 8), (8, 9))
    with plora_mask(mask):
        together = model.generate(inputs_embeds=embeds, attention_mask=ones(embeds), **beams)
    alone = []
    for row in range(2):
        with plora_mask(mask[row : row + 1]):
            one = embeds[row : row + 1]
            alone.append(model.generate(inputs_embeds=one, attention_mask=ones(one), **beams))
    assert torch.equal(together, torch.cat(alone))


def test_left_padding_changes_nothing(base, embeds, span, randomised):
    model = randomised(base)
    with plora_mask(span(6, (1, 4))):
        short = embeds[1:, :6]
        expected = model.generate(inputs_embeds=short, attention_mask=ones(short), **GENERATE)
    padded = embeds.clone()
    padded[1, :3], padded[1, 3:] = 7.0, embeds[1, :6]
    attention_mask = ones(padded)
    attention_mask[1, :3] = 0
    with plora_mask(span(9, (2, 5), (4, 7))):
        tokens = model.generate(inputs_embeds=padded, attention_mask=attention_mask, **GENERATE)
    assert torch.equal(tokens[1:], expected)


def test_a_prompt_in_chunks_equals_the_whole(base, embeds, span, randomised):
    model = randomised(base)
    with plora_mask(span(9, (2, 7), (5, 9))), torch.no_grad():
        whole = model(inputs_embeds=embeds).logits
        first = model(inputs_embeds=embeds[:, :4], use_cache=True)
        second = model(inputs_embeds=embeds[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **TOLERANCE)


def test_a_copied_model_is_a_working_model_of_its_own(base, embeds, span, randomised):
    model = randomised(base)
    copied = copy.deepcopy(model)
    mask = span(9, (2, 7), (5, 9))
    expected = base(inputs_embeds=embeds).logits
    with plora_mask(mask):
        adapted = model(inputs_embeds=embeds).logits
        remove_plora(model)
        assert torch.equal(copied(inputs_embeds=embeds).logits, adapted)
        with plora_disabled(copied):
            assert torch.equal(copied(inputs_embeds=embeds).logits, expected)
    assert torch.equal(remove_plora(copied)(inputs_embeds=embeds).logits, expected)
