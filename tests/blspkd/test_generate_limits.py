"""What `generate` refuses, since it would come out wrong without a word."""

import pytest
import torch

from blspkd.evaluation.answers import answer_from_text
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_model
from blspkd.model.prompts import as_messages

PROMPT = "Say: {speech}"


@pytest.fixture
def parts(tiny_model):
    return load_model(tiny_model)


@pytest.mark.parametrize("places", [[], [1, 3]])
def test_a_row_without_one_place_for_speech(parts, tiny_corpus, places):
    model, processor = parts
    batch = processor(list(tiny_corpus.audio[:2]), prompt=PROMPT)
    batch["speech_mask"][1] = False
    batch["speech_mask"][1, places] = True
    with pytest.raises(ValueError, match=f"one run of True .* rows with {len(places)};"):
        model.generate(**batch, max_new_tokens=2)


def test_more_tokens_than_the_language_model_reads(parts, tiny_corpus):
    model, processor = parts
    audio = processor([tiny_corpus.audio[0]], prompt=PROMPT)
    spoken = model.eval().embed_speech(
        input_features=audio["input_features"],
        feature_attention_mask=audio["feature_attention_mask"],
    )
    length = audio["input_ids"].shape[1] - 1 + int(spoken.attention_mask.sum())
    text = {name: audio[name] for name in ("input_ids", "attention_mask")}
    for answer, asked, read in (
        (model.generate, audio, length),
        (model.generate_from_text, text, audio["input_ids"].shape[1]),
    ):
        model.language_model.config.max_position_embeddings = read + 5
        assert answer(**asked, max_new_tokens=5).shape[1] <= 5
        with pytest.raises(ValueError, match=f"has {read} tokens and an answer may have 6"):
            answer(**asked, max_new_tokens=6)


def test_the_longest_text_is_refused_before_any_is_answered(parts):
    model, processor = parts
    model.language_model.config.max_position_embeddings = 100
    answered = []
    with pytest.raises(ValueError, match="the language model reads 100"):
        answer_from_text(
            model,
            processor,
            ["the sea", "the sea " * 50],
            [as_messages(PROMPT)] * 2,
            decoding=Decoding(max_new_tokens=5),
            batch_size=1,
            progress=lambda done, total: answered.append(done),
        )
    assert answered == []


def test_a_language_model_that_says_no_limit_has_none(parts, tiny_corpus):
    model, processor = parts
    batch = processor([tiny_corpus.audio[0]], prompt=PROMPT)
    del model.language_model.config.max_position_embeddings
    assert torch.is_tensor(model.generate(**batch, max_new_tokens=2))
