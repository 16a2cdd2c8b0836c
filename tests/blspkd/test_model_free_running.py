"""Clips cut at their predicted length in training: as in inference, and never paired."""

import pytest
import torch

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.model.loading import load_model
from blspkd.model.objective import LossWeights, Objective, loss_items

FREE = torch.tensor([True, False, True, False])
# all losses but the one that needs to be told where the tokens end
EVERY = dict.fromkeys(LossWeights.__dataclass_fields__.keys() - {"alignment"}, 1.0)
PAIRING = ("token", "input_kl", "layer_hidden", "layer_kl")


@pytest.fixture
def model_and_clips(tiny_model, tiny_corpus):
    model, processor = load_model(tiny_model)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="Say: {speech}")
    return model, Collator(processor), [dataset[i] for i in range(4)]


def _losses(model, batch, **options):
    objective = Objective(LossWeights(**EVERY), temperature=2.0)
    with torch.no_grad():
        return model(**batch, objective=objective, **options).losses


def _rows(clips, rows):
    return [clip for clip, row in zip(clips, rows.tolist(), strict=True) if row]


def test_the_losses_that_pair_tokens_are_those_of_the_other_clips(model_and_clips):
    model, collate, clips = model_and_clips
    mixed = _losses(model, collate(clips), free_running=FREE)
    others = _losses(model, collate(_rows(clips, ~FREE)))
    everyone = _losses(model, collate(clips))
    for name in PAIRING:
        torch.testing.assert_close(mixed[name], others[name], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(mixed[name], everyone[name], atol=1e-5), name
    torch.testing.assert_close(mixed["quantity"], everyone["quantity"])


def test_the_response_losses_are_each_clips_own(model_and_clips):
    model, collate, clips = model_and_clips
    batch = collate(clips)
    mixed = _losses(model, batch, free_running=FREE)
    items = loss_items(batch["speech_mask"], batch["labels"], FREE)
    halves = []
    for rows, free in ((FREE, torch.tensor([True, True])), (~FREE, None)):
        half = collate(_rows(clips, rows))
        halves.append(_losses(model, half, free_running=free, num_items=items))
    everyone = _losses(model, batch)
    for name in ("response_kl", "response_ce"):
        torch.testing.assert_close(
            mixed[name], halves[0][name] + halves[1][name], rtol=1e-4, atol=0
        )
        assert not torch.allclose(mixed[name], everyone[name], atol=1e-5), name


def test_a_free_running_clip_is_read_as_in_inference(model_and_clips):
    model, collate, clips = model_and_clips
    batch = collate(clips[3:])
    with torch.no_grad():
        student = model(**batch, free_running=torch.tensor([True])).student
        alone = model.embed_speech(
            input_features=batch["input_features"],
            feature_attention_mask=batch["feature_attention_mask"],
        )
        # the prompt, the speech, the rest, put together by hand
        ids, speech = batch["input_ids"], batch["speech_mask"]
        text = model.language_model.get_input_embeddings()(ids)
        first = int(speech[0].nonzero()[0])
        last = int(speech[0].nonzero()[-1])
        heard = alone.hidden_states
        embeds = torch.cat([text[:, :first], heard, text[:, last + 1 :]], dim=1)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        mask[:, first : first + heard.shape[1]] = True
        with model.plora_on(mask):
            expected = model.language_model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    assert heard.shape[1] != int(speech.sum())
    found = student.hidden_states
    torch.testing.assert_close(found, expected[:, batch["prompt_length"] :], atol=1e-5, rtol=1e-4)
    assert not student.speech_mask.any()  # nothing of it is paired


def test_where_every_clip_is_free_running_what_pairs_tokens_is_zero(model_and_clips):
    model, collate, clips = model_and_clips
    model.train()
    objective = Objective(LossWeights(**EVERY))
    output = model(**collate(clips), objective=objective, free_running=torch.ones(4).bool())
    assert {name: float(output.losses[name]) for name in PAIRING} == dict.fromkeys(PAIRING, 0.0)
    output.loss.backward()
    for name in model.trained_names():
        assert torch.isfinite(model.get_parameter(name).grad).all(), name
