"""With a length search, all that hears speech without its text gets the length that it found."""

import pytest
import torch

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.evaluation.answers import answer_from_speech, nearest_embedding_transcripts
from blspkd.evaluation.meters import measure_clips
from blspkd.model import assembled
from blspkd.model.adapting import token_log_probs
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.loading import load_model

MORE = 2


@pytest.fixture
def setting(tiny_model, tiny_corpus):
    model, processor = load_model(tiny_model)
    records = read_manifest(tiny_corpus.manifest)[:3]
    dataset = ClipDataset(records, processor, prompt="Say: {speech}")
    return model.eval(), processor, records, Collator(processor)([dataset[i] for i in range(3)])


def speech_of(batch):
    return {name: batch[name] for name in ("input_features", "feature_attention_mask")}


def lengths(output):
    return output.attention_mask.sum(dim=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_search": -0.1}, "must be 0 or more"),
        ({"length_search": 1.0, "adapter_type": "conv"}, "adapter_type to cformer"),
    ],
)
def test_searches_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlspKDConfig(**options)


def test_outputs_like_tokens_decide(setting):
    """The score of the found length, computed here anew, is that of the best one."""
    model, _, _, batch = setting
    predicted = model.embed_speech(**speech_of(batch))
    model.config.length_search = 40.0
    found = lengths(model.embed_speech(**speech_of(batch)))
    scores = []
    for more in range(-MORE, MORE + 1):
        wanted = (lengths(predicted) + more).clamp(min=1)
        out = model.embed_speech(**speech_of(batch), target_lengths=wanted)
        assert lengths(out).equal(wanted)
        sure = token_log_probs(out.hidden_states, model.token_keys(), model.config.token_scale)
        sure = sure.amax(-1).masked_fill(~out.attention_mask, 0.0).sum(1) / wanted
        scores.append(40.0 * sure - (wanted - out.alpha_sum) ** 2)
    best = (lengths(predicted) + torch.stack(scores).argmax(0) - MORE).clamp(min=1)
    assert found.equal(best)
    assert not found.equal(lengths(predicted))


def test_given_lengths_are_kept(setting):
    model, _, _, batch = setting
    model.config.length_search = 40.0
    given = torch.tensor([3, 4, 5])
    assert lengths(model.embed_speech(**speech_of(batch), target_lengths=given)).equal(given)
    output = model(**batch)
    assert lengths(output.adapter).equal(batch["speech_mask"].sum(dim=1))


def test_meters_transcripts_and_answers_have_the_found_length(setting, monkeypatch):
    model, processor, records, batch = setting
    model.config.length_search = 40.0
    calls = []

    def two_more(adapter, hidden_states, attention_mask, **options):
        calls.append(options["weight"])
        return adapter.at_lengths(hidden_states, attention_mask, [MORE])[0]

    monkeypatch.setattr(assembled, "search_length", two_more)
    parts = measure_clips(model, [batch]).parts
    text = batch["speech_mask"].sum(dim=1)
    free = model.embed_speech(**speech_of(batch))
    assert [total for total, _ in parts["length_error"]] == (lengths(free) - text).tolist()
    assert [total for total, _ in parts["length_exact"]] == (lengths(free) == text).tolist()
    assert lengths(free).equal(free.alpha_sum.round().clamp(min=1).long() + MORE)
    nearest_embedding_transcripts(model, processor, records)
    answer_from_speech(model, processor, records, [[{"role": "user", "content": "{speech}"}]] * 3)
    assert calls == [40.0] * 4


def test_the_search_is_saved_with_the_model(setting, tmp_path):
    model, *_ = setting
    model.config.length_search = 3.0
    model.save_pretrained(tmp_path)
    assert BlspKDConfig.from_pretrained(tmp_path).length_search == 3.0
