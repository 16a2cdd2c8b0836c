"""The mask as an argument of the model, its decoder and generate, and in the Trainer's columns."""

from __future__ import annotations

import inspect

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainingArguments

from plora import PLoRAConfig, apply_plora, plora_disabled, plora_mask, remove_plora


def test_the_argument_is_the_block(base, randomised, span):
    model = randomised(base)
    ids, mask = torch.arange(8).view(2, 4), span(4, (1, 3), (0, 2))
    with plora_mask(mask):
        logits = model(input_ids=ids).logits
        tokens = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
        hidden = model.get_decoder()(input_ids=ids)[0]
    assert torch.equal(model(input_ids=ids, plora_mask=mask).logits, logits)
    assert torch.equal(model(ids, plora_mask=mask).logits, logits)
    assert torch.equal(model.get_decoder()(input_ids=ids, plora_mask=mask)[0], hidden)
    given = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, plora_mask=mask)
    assert torch.equal(given, tokens)
    # nothing stays behind, None means the mask around the call, and disabled wins
    plain = base(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, plain)
    with plora_mask(mask):
        assert torch.equal(model(input_ids=ids, plora_mask=None).logits, logits)
    with plora_disabled(model):
        assert torch.equal(model(input_ids=ids, plora_mask=mask).logits, plain)


def test_the_argument_is_stronger_than_the_block(llama, randomised, span):
    model = randomised(llama)
    ids, inner, outer = torch.arange(4)[None], span(4, (0, 2)), span(4, (2, 4))
    expected = model(input_ids=ids, plora_mask=inner).logits
    with plora_mask(outer):
        assert torch.equal(model(input_ids=ids, plora_mask=inner).logits, expected)
        decoder = model.get_decoder()(input_ids=ids, plora_mask=inner)[0]
    assert torch.equal(model.lm_head(decoder), expected)


def test_training_takes_the_argument(llama, randomised, span):
    model = randomised(llama).train()
    ids, mask = torch.arange(4)[None], span(4, (1, 3))
    model(input_ids=ids, plora_mask=mask).logits.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="give the call plora_mask=mask"):
        model(input_ids=ids)
    with pytest.raises(TypeError, match="bool tensor"):
        model(input_ids=ids, plora_mask=mask.float())


def test_a_model_that_is_its_own_decoder():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs_embeds):
            return self.layer(inputs_embeds)

    model = apply_plora(Tiny(), PLoRAConfig(r=2, lora_dropout=0.0))
    nn.init.normal_(model.layer.lora_B)
    x, mask = torch.randn(1, 3, 4), torch.tensor([[True, False, True]])
    with plora_mask(mask):
        expected = model(x)
    assert torch.equal(model(x, plora_mask=mask), expected)
    assert not hasattr(model, "generate")


def test_signatures_name_it_and_removal_takes_it_back(llama):
    before = inspect.signature(llama.forward), inspect.signature(llama.generate)
    apply_plora(llama, PLoRAConfig(r=2))
    for method, old in zip((llama.forward, llama.generate), before, strict=True):
        new = inspect.signature(method)
        assert list(new.parameters)[:-2] == list(old.parameters)[:-1]
        assert list(new.parameters)[-2:] == ["plora_mask", list(old.parameters)[-1]]
    remove_plora(llama)
    assert (inspect.signature(llama.forward), inspect.signature(llama.generate)) == before
    assert not {"forward", "generate"} & vars(llama).keys()


def test_what_was_in_the_place_of_forward_is_called_and_restored(llama, randomised, span):
    calls, original = [], llama.forward
    llama.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    mine = llama.forward
    apply_plora(llama, PLoRAConfig(r=2))
    llama(input_ids=torch.arange(4)[None], plora_mask=span(4, (0, 2)))
    assert calls == [1]
    remove_plora(llama)
    assert llama.forward is mine


@pytest.fixture
def fresh_accelerate():
    """Accelerate settles its precision once a process: forget that before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_wraps_and_unwraps_it(llama, randomised, span):
    model, ids, mask = randomised(llama), torch.arange(4)[None], span(4, (1, 3))
    expected = model(input_ids=ids, plora_mask=mask).logits
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    low = prepared(input_ids=ids, plora_mask=mask).logits
    torch.testing.assert_close(low, expected, rtol=0.1, atol=0.1)
    assert not torch.equal(low, expected)
    again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(again(input_ids=ids, plora_mask=mask).logits, expected)
    assert "plora_mask" in inspect.signature(again.forward).parameters
    assert "forward" not in vars(remove_plora(again))
    assert torch.equal(again(input_ids=ids).logits, llama(input_ids=ids).logits)


class Rows(torch.utils.data.Dataset):
    """Four sequences, each with its mask and a column that the model does not know."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 1)) % 61
        mask = torch.zeros(6, dtype=torch.bool)
        mask[1 : 3 + index % 2] = True
        return {"input_ids": ids, "labels": ids, "plora_mask": mask, "text": torch.tensor(0)}


def test_the_trainer_hands_the_column_on(llama, randomised, tmp_path):
    models = [randomised(llama), randomised(llama)]
    start = {n: p.clone() for n, p in models[0].named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=models[0], args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    # the same two steps by hand
    batch = {k: torch.stack([Rows()[i][k] for i in range(4)]) for k in Rows()[0]}
    mask = batch.pop("plora_mask")
    batch.pop("text")
    hand = models[1].train()
    optimizer = torch.optim.SGD([p for p in hand.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with plora_mask(mask):
            hand(**batch).loss.backward()
        optimizer.step()
    ours = dict(models[0].named_parameters())
    for name, parameter in hand.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-5)
            assert not torch.equal(ours[name], start[name])
    hand.eval()
    with torch.no_grad():
        by_hand = hand(**batch, plora_mask=mask).loss.item()
        without = hand(**batch).loss.item()
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(by_hand, rel=1e-4)
    assert found != pytest.approx(without, rel=1e-3)
