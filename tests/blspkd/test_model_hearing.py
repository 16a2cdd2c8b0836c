"""Where no text says how much was spoken: the length that is found, and speech that is none."""

import pytest
import torch

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.evaluation.answers import (
    answer_from_speech,
    answer_from_text,
    nearest_embedding_transcripts,
)
from blspkd.evaluation.meters import measure_clips
from blspkd.model import hearing
from blspkd.model.adapting import token_log_probs
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.loading import load_model
from plora import plora_mask

MORE = 2


@pytest.fixture
def setting(tiny_model, tiny_corpus):
    model, processor = load_model(tiny_model)
    model.language_model.config.bos_token_id = 1
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
        ({"length_search": -0.1}, "length_search must be 0 or more"),
        (
            {"length_search": 1.0, "length_search_lm_weight": -0.1},
            "length_search_lm_weight must be 0 or more",
        ),
        ({"length_search_lm_weight": 0.5}, "give length_search too"),
        ({"length_search": 1.0, "adapter_type": "conv"}, "adapter_type to cformer"),
        ({"logprob_threshold": 0.0}, "must be below 0 or null"),
        ({"logprob_threshold": -1.0, "adapter_type": "conv"}, "adapter_type to cformer"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlspKDConfig(**options)


def read_one_by_one(model, tokens):
    """(N,) token ids to their (N,) log-probabilities, without a batch and without padding."""
    beginning = [model.language_model.config.bos_token_id]
    with model.untouched():
        logits = model.language_model(input_ids=torch.tensor([beginning + tokens.tolist()])).logits
    return logits[0, :-1].log_softmax(-1)[range(len(tokens)), tokens]


@pytest.mark.parametrize("lm_weight", [0.0, 2.0])
def test_outputs_like_tokens_decide(setting, lm_weight):
    """The score of the found length, computed here anew, is that of the best one."""
    model, _, _, batch = setting
    predicted = model.embed_speech(**speech_of(batch))
    model.config.length_search = 40.0
    without = lengths(model.embed_speech(**speech_of(batch)))
    model.config.length_search_lm_weight = lm_weight
    found = lengths(model.embed_speech(**speech_of(batch)))
    scores = []
    for more in range(-MORE, MORE + 1):
        wanted = (lengths(predicted) + more).clamp(min=1)
        out = model.embed_speech(**speech_of(batch), target_lengths=wanted)
        assert lengths(out).equal(wanted)
        sure = token_log_probs(out.hidden_states, model.token_keys(), model.config.token_scale)
        sure, tokens = sure.max(-1)
        means = []
        for clip, length in enumerate(wanted):
            own = sure[clip, :length] + lm_weight * read_one_by_one(model, tokens[clip, :length])
            means.append(own.mean())
        scores.append(40.0 * torch.stack(means) - (wanted - out.alpha_sum) ** 2)
    best = (lengths(predicted) + torch.stack(scores).argmax(0) - MORE).clamp(min=1)
    assert found.equal(best)
    assert not found.equal(lengths(predicted))
    assert found.equal(without) == (lm_weight == 0)


def test_the_language_model_judges_text_without_plora(setting):
    model, *_ = setting
    adapted = [p for name, p in model.language_model.named_parameters() if "lora_" in name]
    assert adapted
    for parameter in adapted:
        torch.nn.init.normal_(parameter)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with plora_mask(torch.ones(2, 4, dtype=torch.bool)):
        judged = model.text_log_probs(tokens)
    torch.testing.assert_close(judged[1], read_one_by_one(model, tokens[1]))
    assert model.text_log_probs(tokens[:, :0]).shape == (2, 0)
    model.language_model.config.bos_token_id = None
    rest = model.text_log_probs(tokens)
    assert not rest[:, 0].any()
    with model.untouched():
        logits = model.language_model(input_ids=tokens).logits.log_softmax(-1)
    torch.testing.assert_close(rest[:, 2], logits[[0, 1], 1, tokens[:, 2]])
    assert not model.text_log_probs(tokens[:, :1]).any()


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

    monkeypatch.setattr(hearing, "search_length", two_more)
    parts = measure_clips(model, [batch]).parts
    text = batch["speech_mask"].sum(dim=1)
    free = model.embed_speech(**speech_of(batch))
    assert [total for total, _ in parts["length_error"]] == (lengths(free) - text).tolist()
    assert [total for total, _ in parts["length_exact"]] == (lengths(free) == text).tolist()
    assert lengths(free).equal(free.alpha_sum.round().clamp(min=1).long() + MORE)
    nearest_embedding_transcripts(model, processor, records)
    answer_from_speech(model, processor, records, [[{"role": "user", "content": "{speech}"}]] * 3)
    assert calls == [40.0] * 4


@pytest.fixture(params=[0.0, 40.0])
def half_heard(setting, request):
    """A threshold that one of three clips misses, and what they are without it."""
    model, processor, records, batch = setting
    model.config.length_search = request.param
    out = model.embed_speech(**speech_of(batch))
    sure = token_log_probs(out.hidden_states, model.token_keys(), model.config.token_scale).amax(-1)
    means = [row[real].mean().item() for row, real in zip(sure, out.attention_mask, strict=True)]
    low, high, _ = sorted(means)
    model.config.logprob_threshold = (low + high) / 2
    return model, processor, records, batch, out, means.index(low)


def test_what_is_like_no_tokens_gives_none(half_heard):
    model, _, _, batch, before, unlike = half_heard
    after = model.embed_speech(**speech_of(batch))
    for clip in range(3):
        if clip == unlike:
            assert not after.attention_mask[clip].any()
            assert not after.hidden_states[clip].any()
            assert not after.fire_times[clip].any()
        else:
            for name in ("attention_mask", "hidden_states", "fire_times"):
                assert getattr(after, name)[clip].equal(getattr(before, name)[clip])
    assert after.alpha_sum.equal(before.alpha_sum)
    given = model.embed_speech(**speech_of(batch), target_lengths=torch.tensor([3, 4, 5]))
    assert lengths(given).tolist() == [3, 4, 5]


@pytest.mark.parametrize("half_heard", [40.0], indirect=True)
def test_the_language_model_has_no_say_in_whether_there_is_speech(half_heard, monkeypatch):
    model, _, _, batch, *_ = half_heard
    without = model.embed_speech(**speech_of(batch))
    model.config.length_search_lm_weight = 1.0
    # the same of every token: it changes no length, and each mean by more than the threshold
    monkeypatch.setattr(model, "text_log_probs", lambda ids: torch.full(ids.shape, -100.0))
    assert lengths(model.embed_speech(**speech_of(batch))).equal(lengths(without))


def test_no_speech_is_answered_like_an_empty_transcript(half_heard):
    model, processor, records, _, _, unlike = half_heard
    model.config.logprob_threshold, some = -1e-6, model.config.logprob_threshold
    messages = [[{"role": "user", "content": "Say: {speech}"}]] * 3
    empty = answer_from_text(model, processor, [""] * 3, messages)
    nothing = answer_from_speech(model, processor, records, messages)  # from all of them
    assert nothing == empty
    model.config.logprob_threshold = None
    everything = answer_from_speech(model, processor, records, messages)
    model.config.logprob_threshold = some
    expected = [empty[i] if i == unlike else everything[i] for i in range(3)]
    assert answer_from_speech(model, processor, records, messages) == expected
    assert everything[unlike] != empty[unlike]


def test_no_speech_has_an_empty_transcript_and_no_length(half_heard):
    model, processor, records, batch, before, unlike = half_heard
    transcripts = nearest_embedding_transcripts(model, processor, records)
    assert transcripts[unlike] == ""
    text = batch["speech_mask"].sum(dim=1)
    off = (lengths(before) - text).tolist()
    off[unlike] = -text[unlike].item()
    assert [total for total, _ in measure_clips(model, [batch]).parts["length_error"]] == off


def test_they_are_saved_with_the_model(setting, tmp_path):
    model, *_ = setting
    model.config.length_search = 3.0
    model.config.length_search_lm_weight = 0.5
    model.config.logprob_threshold = -2.0
    model.save_pretrained(tmp_path)
    config = BlspKDConfig.from_pretrained(tmp_path)
    assert (config.length_search, config.length_search_lm_weight) == (3.0, 0.5)
    assert config.logprob_threshold == -2.0
