"""Prompt, transcript and response become ids whose borders never move."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from blspkd.model.bases import load_feature_extractor, load_tokenizer
from blspkd.model.literal import literal_ids
from blspkd.model.processing import BlspKDProcessor
from blspkd.model.prompts import as_messages
from blspkd.model.splice import IGNORE_INDEX


@pytest.fixture(scope="module")
def processor(tiny_parts):
    return BlspKDProcessor(
        load_feature_extractor(str(tiny_parts.encoder)),
        load_tokenizer(str(tiny_parts.language_model)),
    )


def _text(processor, ids):
    return processor.tokenizer.decode(ids)


def test_a_turn_is_the_chat_template_around_the_transcript(processor):
    turn = processor.tokenize_turn(
        as_messages("Repeat: {speech}"), "the old man", response="he found", response_finished=True
    )
    assert _text(processor, turn.input_ids) == (
        "<|im_start|>user\nRepeat: the old man<|im_end|>\n<|im_start|>assistant\nhe found<|im_end|>"
    )
    spoken = [i for i, m in zip(turn.input_ids, turn.speech_mask, strict=True) if m]
    assert _text(processor, spoken) == " the old man"  # the space belongs to the word
    target = [label for label in turn.labels if label != IGNORE_INDEX]
    assert _text(processor, target) == "he found<|im_end|>"
    assert turn.labels[-len(target) :] == target


def test_a_response_that_was_cut_off_has_no_end(processor):
    turn = processor.tokenize_turn(
        as_messages("{speech}"), "the sea", response="he", response_finished=False
    )
    assert turn.labels[-1] != processor.tokenizer.eos_token_id


def test_an_answer_ends_as_the_chat_template_ends_it(processor, tiny_parts):
    tokenizer = load_tokenizer(str(tiny_parts.language_model))
    tokenizer.eos_token = "<|im_start|>"  # ends documents and no turns, as Gemma's <eos>
    ended = BlspKDProcessor(processor.feature_extractor, tokenizer)
    turn = ended.tokenize_turn(as_messages("{speech}"), "the sea", response="he")
    assert _text(processor, turn.labels[-1:]) == "<|im_end|>"
    tokenizer.chat_template = None
    ended = BlspKDProcessor(processor.feature_extractor, tokenizer)
    turn = ended.tokenize_turn(as_messages("{speech}"), "the sea", response="he")
    assert _text(processor, turn.labels[-1:]) == "<|im_start|>"


def test_the_prompt_is_the_same_whatever_is_said(processor):
    turns = [
        processor.tokenize_turn(as_messages("Repeat: {speech}"), text)
        for text in ("the sea", "zzz", None)
    ]
    prompts = [
        [i for i, m in zip(turn.input_ids, turn.speech_mask, strict=True) if not m]
        for turn in turns
    ]
    assert prompts[0] == prompts[1] == prompts[2]


def test_special_tokens_in_a_transcript_are_only_text(processor):
    turn = processor.tokenize_turn(as_messages("{speech}"), "say <|im_end|> now")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    spoken = [i for i, m in zip(turn.input_ids, turn.speech_mask, strict=True) if m]
    assert end not in spoken
    assert _text(processor, spoken) == "say <|im_end|> now"


@pytest.mark.parametrize(
    "messages", [as_messages("no place"), as_messages("{speech} and {speech}")]
)
def test_there_is_exactly_one_place_for_speech(processor, messages):
    with pytest.raises(ValueError, match="exactly once"):
        processor.tokenize_turn(messages, "the sea")


def test_a_model_without_chat_template_reads_the_bare_prompt(processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "chat_template", None)
    fresh = BlspKDProcessor(processor.feature_extractor, processor.tokenizer)
    turn = fresh.tokenize_turn(as_messages("Say {speech} again"), "the sea")
    assert _text(processor, turn.input_ids) == "Say the sea again"
    with pytest.raises(ValueError, match="no chat template"):
        fresh.tokenize_turn([{"role": "system", "content": "x"}, *as_messages("{speech}")], "a")


@pytest.mark.parametrize(
    ("prompt", "whole"),
    [
        ("Say {speech} again:", "Say the sea again: he"),
        ("Say {speech}", "Say the sea he"),
        ("Say {speech}\nAnswer:\n", "Say the sea\nAnswer:\nhe"),
    ],
)
def test_without_chat_template_the_answer_goes_on_in_the_text(processor, tiny_parts, prompt, whole):
    tokenizer = load_tokenizer(str(tiny_parts.language_model))
    tokenizer.chat_template = None
    bare = BlspKDProcessor(processor.feature_extractor, tokenizer)
    turn = bare.tokenize_turn(as_messages(prompt), "the sea", response="he")
    assert _text(processor, turn.input_ids) == f"{whole}<|im_end|>"
    assert turn.input_ids[:-1] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_word_within_the_text_has_one_space_before_it(tmp_path):
    """Llama's tokenizer begins every text with a space of its own."""
    words = ["\u2581", "\u2581a", "\u2581say", "\u2581the", "\u2581sea", "say", "the", "<unk>"]
    model = models.Unigram([(word, -1.0) for word in words], unk_id=7)
    raw = Tokenizer(model)
    space = "\u2581"
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<unk>")

    def read(ids):
        return tokenizer.convert_ids_to_tokens(ids)

    spaced = tokenizer("say the sea", add_special_tokens=False)["input_ids"]
    assert read(tokenizer(" the", add_special_tokens=False)["input_ids"]) == [space, "\u2581the"]
    ids, ends = literal_ids(tokenizer, "the sea", behind_a_word=True)
    assert read(ids) == ["\u2581the", "\u2581sea"] == read(spaced[1:])
    assert ends == [3, 7]
    assert literal_ids(tokenizer, "", behind_a_word=True) == ([], [])


def test_a_batch_for_forward_and_one_for_generate(processor, tiny_corpus):
    clips = list(tiny_corpus.audio[:2])
    training = processor(
        clips,
        prompt="{speech}",
        transcripts=tiny_corpus.texts[:2],
        responses=tiny_corpus.responses[:2],
    )
    assert set(training) == {
        "input_ids",
        "attention_mask",
        "speech_mask",
        "labels",
        "input_features",
        "feature_attention_mask",
    }
    asking = processor(clips, prompt="{speech}")
    assert "labels" not in asking
    assert asking["speech_mask"].sum(dim=1).tolist() == [1, 1]
    # 0.6 s and 0.75 s at 100 frames a second
    assert asking["feature_attention_mask"].sum(dim=1).tolist() == [60, 75]
    assert (asking["input_features"][0, :, 60:] == 0).all()


def test_samples_and_file_give_the_same_features(processor, tiny_corpus):
    import soundfile

    samples, _ = soundfile.read(tiny_corpus.audio[0], dtype="float32")
    expected = processor.features(tiny_corpus.audio[0])
    assert np.array_equal(processor.features(samples), expected)


TONE = np.sin(np.arange(16_000) / 9).astype(np.float32) / 2
WRONG = {
    "stereo, channels first": (np.stack([TONE, TONE]), ValueError, "average the channels"),
    "stereo, channels last": (np.stack([TONE, TONE], 1), ValueError, "average the channels"),
    "integers": ((TONE * 32_767).astype(np.int16), TypeError, "divide 16-bit integers by 32768"),
    "not a number": (np.full_like(TONE, np.nan), ValueError, "NaN"),
    "empty": (TONE[:0], ValueError, "no samples"),
    "10 ms": (TONE[:160], ValueError, "too short"),
    "31 s": (np.tile(TONE, 31), ValueError, "too long"),
    "a tensor": (torch.from_numpy(TONE), TypeError, "got Tensor; convert samples"),
    "a list of numbers": (TONE.tolist(), TypeError, "got float; convert samples"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_samples_that_would_be_misheard_are_refused(processor, kind):
    audio, error, message = WRONG[kind]
    with pytest.raises(error, match=message):
        processor(audio, prompt="{speech}")


def test_a_clip_of_the_least_length_may_be_made_four_times_as_fast(processor):
    assert processor.features(TONE[: 1_600 // 4]).shape[0] == 80


def test_full_window_pads_to_thirty_seconds(processor, tiny_corpus):
    batch = processor([tiny_corpus.audio[0]], prompt="{speech}", full_window=True)
    assert batch["input_features"].shape[-1] == 3000
    assert batch["feature_attention_mask"].sum() == 60


@pytest.mark.parametrize("level", [1e-9, 1e-3, 0.3])
def test_full_window_is_padded_as_whisper_pads(processor, level):
    # no frame of it is as quiet as silence is beside it
    noise = np.random.default_rng(0).normal(0, level, 16_000).astype(np.float32)
    ours = processor.pad_features([processor.features(noise)], full_window=True)
    whole = processor.feature_extractor(noise, sampling_rate=16_000, return_tensors="pt")
    after = slice(102, None)  # the last frames of the clip look into what follows
    torch.testing.assert_close(
        ours["input_features"][..., after], whole.input_features[..., after], rtol=0, atol=1e-4
    )


def test_one_of_messages_and_prompt(processor, tiny_corpus):
    with pytest.raises(ValueError, match="either messages or prompt"):
        processor(tiny_corpus.audio[0])


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BlspKDProcessor.from_pretrained(tmp_path)
    turn = as_messages("Repeat: {speech}")
    assert again.tokenize_turn(turn, "the sea") == processor.tokenize_turn(turn, "the sea")
