"""Several modalities, each with A and B of its own, against plain forward hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_mask, remove_plora

CONFIGS = {
    "audio": PLoRAConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]),
    "vision": PLoRAConfig(
        r=2, lora_alpha=5, lora_dropout=0.0, target_modules=["q_proj", "up_proj"]
    ),
}


@pytest.fixture
def two(llama):
    model = apply_plora(copy.deepcopy(llama), CONFIGS)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    return model


def expected(base, two, masks, ids):
    """`base` with each modality's update added in hooks, densely."""
    handles = []
    for path, layer in two.named_modules():
        if isinstance(layer, PLoRALinear):

            def add(_, args, output, layer=layer):
                for name in layer.updates:
                    config = CONFIGS[name]
                    a, b = layer.lora_A[name], layer.lora_B[name]
                    update = config.lora_alpha / config.r * args[0] @ a.T @ b.T
                    output = output + masks[name][..., None] * update
                return output

            handles.append(base.get_submodule(path).register_forward_hook(add))
    try:
        return base(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()


def test_each_has_its_own_update_on_its_own_positions(llama, two, span):
    ids = torch.arange(14).view(2, 7)
    masks = {"audio": span(7, (1, 3), (0, 2)), "vision": span(7, (4, 6), (2, 7))}
    with plora_mask(masks):
        ours = two(input_ids=ids).logits
    torch.testing.assert_close(ours, expected(llama, two, masks, ids), rtol=1e-4, atol=1e-4)
    # before its first masked position, and without a mask, it is the base model to the bit
    assert torch.equal(ours[0, 0], llama(input_ids=ids).logits[0, 0])
    assert torch.equal(two(input_ids=ids).logits, llama(input_ids=ids).logits)


def test_a_modality_without_a_mask_marks_nothing(llama, two, span):
    ids = torch.arange(14).view(2, 7)
    only = {"audio": span(7, (1, 3), (0, 2)), "vision": span(7, (0, 0), (0, 0))}
    with plora_mask({"audio": only["audio"]}):
        ours = two(input_ids=ids).logits
    with plora_mask(only):
        assert torch.equal(two(input_ids=ids).logits, ours)
    torch.testing.assert_close(ours, expected(llama, two, only, ids), rtol=1e-4, atol=1e-4)


def test_all_of_them_get_gradients_also_those_without_positions(two, span):
    ids = torch.arange(14).view(2, 7)
    with plora_mask({"audio": span(7, (1, 3), (0, 2))}):
        two.train()(input_ids=ids).logits.sum().backward()
    grads = {name: p.grad for name, p in two.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert all(bool(grad.any()) == name.endswith("audio") for name, grad in grads.items())


def test_the_names_are_those_of_peft_s_adapters(llama, two):
    names = {name for name, _ in two.named_parameters() if "lora_" in name}
    layer = "model.layers.0.self_attn"
    assert {n for n in names if n.startswith(layer)} == {
        f"{layer}.q_proj.lora_A.audio",
        f"{layer}.q_proj.lora_A.vision",
        f"{layer}.q_proj.lora_B.audio",
        f"{layer}.q_proj.lora_B.vision",
        f"{layer}.v_proj.lora_A.audio",
        f"{layer}.v_proj.lora_B.audio",
    }
    before = llama.state_dict()
    after = remove_plora(two).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" not in vars(two)
    assert "generate" not in vars(two)


def test_beams_and_caches(two, span):
    ids = torch.arange(8).view(2, 4)
    masks = {"audio": span(4, (1, 2), (0, 2)), "vision": span(4, (2, 4), (2, 3))}
    found = []
    for use_cache in (True, False):
        with plora_mask(masks):
            found.append(
                two.generate(
                    ids, num_beams=2, max_new_tokens=4, use_cache=use_cache, do_sample=False
                )
            )
    assert torch.equal(*found)


def test_copies_and_pickles_work(two, span):
    ids = torch.arange(8).view(2, 4)
    masks = {"audio": span(4, (1, 2), (0, 2)), "vision": span(4, (2, 4), (2, 3))}
    expected = two(input_ids=ids, plora_mask=masks).logits
    for again in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert torch.equal(again(input_ids=ids, plora_mask=masks).logits, expected)
        nn.init.zeros_(next(p for n, p in again.named_parameters() if "lora_B" in n))
        assert not torch.equal(again(input_ids=ids, plora_mask=masks).logits, expected)
    assert torch.equal(two(input_ids=ids, plora_mask=masks).logits, expected)


def test_one_named_modality_takes_a_plain_mask(llama, span):
    model = apply_plora(llama, {"audio": CONFIGS["audio"]})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids, mask = torch.arange(4)[None], span(4, (1, 3))
    plain = model(input_ids=ids, plora_mask=mask).logits
    assert torch.equal(model(input_ids=ids, plora_mask={"audio": mask}).logits, plain)
    assert not torch.equal(model(input_ids=ids).logits, plain)


def test_masks_that_do_not_fit_raise(two, llama, randomised, span):
    ids, mask = torch.arange(4)[None], span(4, (1, 3))
    with pytest.raises(ValueError, match=r"of \['audio', 'vision'\], .* got a mask without a name"):
        two(input_ids=ids, plora_mask=mask)
    with pytest.raises(ValueError, match="got one for 'speech'"):
        two(input_ids=ids, plora_mask={"speech": mask})
    with pytest.raises(ValueError, match=r"expected a mask without a name, .* one for 'audio'"):
        randomised(llama)(input_ids=ids, plora_mask={"audio": mask})
    with pytest.raises(ValueError, match=r"position 1 of sequence 0 is in .*'audio', 'vision'"):
        two(input_ids=ids, plora_mask={"audio": mask, "vision": span(4, (0, 2))})
    with pytest.raises(ValueError, match="one shape"):
        two(input_ids=ids, plora_mask={"audio": mask, "vision": span(5, (0, 1))})
    with pytest.raises(TypeError, match=r"mask\['vision'\]: expected a bool tensor"):
        two(input_ids=ids, plora_mask={"audio": mask, "vision": mask.float()})


@pytest.mark.parametrize(
    ("configs", "error", "message"),
    [
        ({}, ValueError, "at least one modality"),
        ({"a.b": PLoRAConfig()}, ValueError, "identifiers"),
        ({"audio": {"r": 3}}, TypeError, "a PLoRAConfig or a mapping"),
        (None, TypeError, "a PLoRAConfig or a mapping"),
    ],
)
def test_configurations_that_do_not_fit_raise(llama, configs, error, message):
    with pytest.raises(error, match=message):
        apply_plora(llama, configs)
    assert all(p.requires_grad for p in llama.parameters())
