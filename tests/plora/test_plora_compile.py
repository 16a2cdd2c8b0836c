"""torch.compile of an adapted model in one graph, and how often masks make it compile again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plora import PLoRAConfig, apply_plora, plora_disabled, plora_mask


class Counted:
    """A backend of torch.compile that runs the graph as it is, and counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


FEW = ["q_proj", "down_proj"]  # of the layers, because each is traced again and again


def masks(*counts: int):
    for count in counts:
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[0, 1 : 1 + count] = True
        mask[1, : count // 2] = True
        yield mask


@pytest.mark.parametrize("how", ["block", "argument"])
def test_one_graph_serves_changing_masks(llama, randomised, how):
    model, backend = randomised(llama, target_modules=FEW), Counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.arange(12).view(2, 6)
    plain = llama(input_ids=ids, use_cache=False).logits
    # 3 rows, then another number, none and one: sizes that torch.compile treats by themselves
    for mask in masks(2, 4, 3, 0, 1, 5, 2, 0):
        expected = model(input_ids=ids, use_cache=False, plora_mask=mask).logits
        if how == "block":
            with plora_mask(mask):
                found = compiled(input_ids=ids, use_cache=False).logits
        else:
            found = compiled(input_ids=ids, use_cache=False, plora_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0, 0], plain[0, 0])
    assert backend.graphs <= (4 if how == "block" else 2)


def test_gradients_are_the_same(llama, randomised):
    model = randomised(llama, target_modules=FEW).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.arange(12).view(2, 6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mask in masks(3, 0):
        found = []
        for one in (model, compiled):
            with plora_mask(mask):
                loss = one(input_ids=ids, labels=ids, use_cache=False).loss
            found.append(torch.autograd.grad(loss, parameters))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert any(grad.any() for grad in found[1]) == bool(mask.any())


@torch.no_grad()
def test_a_key_value_cache_and_the_disabled_model(llama, randomised):
    model = randomised(llama, target_modules=FEW)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(12).view(2, 6)
    (mask,) = masks(4)
    whole = model(input_ids=ids, plora_mask=mask).logits
    with plora_mask(mask):
        first = compiled(input_ids=ids[:, :3], use_cache=True)
        second = compiled(input_ids=ids[:, 3:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    with plora_mask(mask), plora_disabled(model):
        plain = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(plain, llama(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_modalities_and_dora(llama):
    config = PLoRAConfig(r=2, lora_dropout=0.0, use_dora=True, target_modules=FEW)
    model = apply_plora(llama, {"audio": config, "vision": config}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(12).view(2, 6)
    (audio,) = masks(3)
    given = {"audio": audio, "vision": ~audio}
    found = compiled(input_ids=ids, use_cache=False, plora_mask=given).logits
    expected = model(input_ids=ids, use_cache=False, plora_mask=given).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, llama(input_ids=ids, use_cache=False).logits)
