"""The files of the embedded default: complete, small, readable, and honestly held out."""

import io
import json
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blspkd.model.bases import load_encoder, load_feature_extractor
from blspkd.model.encoder import SpeechEncoder

TINY = Path(str(files("blspkd"))) / "tiny"
PROMPTS = {"repeat": "Repeat: {speech}", "continue": "Continue: {speech}", "question": "{speech}"}


def rows(start):
    """The rows of every manifest whose name begins so."""
    with tarfile.open(TINY / "clips.tar") as tar:
        names = [n for n in tar.getnames() if n.startswith(start) and n.endswith(".jsonl")]
        lines = [line for name in names for line in tar.extractfile(name).read().splitlines()]
    return [json.loads(line) for line in lines]


def answer(model, tokenizer, before, text, after):
    """Greedy decoding by hand: no generate(), no cache, pieces tokenised apart."""
    ids = []
    for piece in (before, text, after):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    out = []
    with torch.no_grad():
        while len(out) < 40:
            token = int(model(input_ids=torch.tensor([ids + out])).logits[0, -1].argmax())
            if token == tokenizer.convert_tokens_to_ids("<|im_end|>"):
                return tokenizer.decode(out)
            out.append(token)
    return tokenizer.decode(out) + " ..."


@pytest.fixture(scope="module")
def llm():
    return (
        AutoModelForCausalLM.from_pretrained(TINY / "llm", dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(TINY / "llm"),
    )


def test_all_files_together_stay_under_fifteen_megabytes():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 15_000_000


def test_only_safetensors_and_plain_files_are_shipped():
    kinds = {f.suffix for f in TINY.rglob("*") if f.is_file()}
    assert kinds <= {".safetensors", ".json", ".tar", ".jinja", ".yaml"}


def test_the_manifests_and_the_archive_name_the_same_clips():
    with tarfile.open(TINY / "clips.tar") as tar:
        members = [m.name for m in tar.getmembers() if m.name.endswith(".ogg")]
    named = [row["audio"] for name in ("train", "test") for row in rows(name)]
    assert sorted(members) == sorted(named)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("name", ["train", "test"])
def test_each_row_is_complete_and_its_prompt_fits_its_task(name):
    for row in rows(name):
        assert row["messages"] == [{"role": "user", "content": PROMPTS[row["task"]]}]
        assert row["text"] == " ".join(row["text"].lower().split()) != ""
        assert row["response"]
        assert isinstance(row["response_finished"], bool)
        assert 0.5 < row["duration"] < 10


def test_clips_read_back_at_16_khz_mono_with_the_duration_that_the_manifest_says():
    wanted = {row["audio"]: row["duration"] for row in rows("train")[::60]}
    wanted |= {row["audio"]: row["duration"] for row in rows("test")[::20]}
    with tarfile.open(TINY / "clips.tar") as tar:
        for name, duration in wanted.items():
            samples, rate = soundfile.read(io.BytesIO(tar.extractfile(name).read()))
            assert rate == 16_000
            assert samples.ndim == 1
            assert abs(len(samples) / rate - duration) < 0.05
            assert np.sqrt((samples**2).mean()) > 0.01


def test_no_test_sentence_and_no_unseen_voice_is_in_the_training_clips():
    train, test = rows("train"), rows("test")
    assert not {r["text"] for r in train} & {r["text"] for r in test}
    assert len({r["text"] for r in train}) == len(train) >= 600
    splits = {s: [r for r in test if r["split"] == s] for s in {r["split"] for r in test}}
    assert set(splits) == {"unseen-sentences", "questions", "unseen-voice"}
    unseen = {r["voice"] for r in splits["unseen-voice"]}
    assert not unseen & {r["voice"] for r in train}
    assert {r["voice"] for r in splits["unseen-sentences"]} <= {r["voice"] for r in train}
    assert len({r["voice"] for r in train}) >= 6


def test_every_word_of_the_test_sentences_is_in_the_training_clips():
    heard = {w for r in rows("train") for w in r["text"].split()}
    assert {w for r in rows("test") for w in r["text"].split()} <= heard


def test_the_llm_repeats_held_out_sentences_and_answers_held_out_questions(llm):
    after = "<|im_end|>\n<|im_start|>assistant\n"
    test = rows("test")
    repeat = [r["text"] for r in test if r["split"] == "unseen-sentences"][:8]
    got = [answer(*llm, "<|im_start|>user\nRepeat:", " " + text, after) for text in repeat]
    assert got == repeat
    asked = [r for r in test if r["split"] == "questions"][:8]
    got = [answer(*llm, "<|im_start|>user\n", r["text"], after) for r in asked]
    assert got == [r["response"] for r in asked]


def test_the_answers_are_true_in_the_world(llm):
    after = "<|im_end|>\n<|im_start|>assistant\n"
    for question, truth in {
        "what does the cow eat": "the cow eats grass",
        "what is the capital of france": "the capital of france is paris",
        "how much is two plus three": "two plus three is five",
    }.items():
        assert answer(*llm, "<|im_start|>user\n", question, after) == truth


def test_the_chat_template_writes_chatml_and_any_text_survives_the_tokenizer(llm):
    _, tokenizer = llm
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Repeat: a cow"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nRepeat: a cow<|im_end|>\n<|im_start|>assistant\n"
    for text in ("Größe 42, naïve 日本!", " the cow", "the cow"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" the cow eats grass")["input_ids"]) == 4


def test_the_encoder_loads_without_missing_weights_and_tells_clips_apart():
    encoder = SpeechEncoder(load_encoder("blspkd:tiny/encoder", dtype=torch.float32))
    extractor = load_feature_extractor("blspkd:tiny/encoder")
    picked = [r for r in rows("test") if r["split"] == "unseen-sentences"][:2]
    with tarfile.open(TINY / "clips.tar") as tar:
        clips = [
            soundfile.read(io.BytesIO(tar.extractfile(r["audio"]).read()), dtype="float32")[0]
            for r in picked
        ]
    batch = extractor(
        clips, sampling_rate=16_000, padding="longest", truncation=False,
        return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        hidden, mask = encoder(batch["input_features"], batch["attention_mask"])
    assert hidden.shape[:2] == mask.shape
    assert hidden.isfinite().all()
    frames = [row[m] for row, m in zip(hidden, mask, strict=True)]
    assert all(abs(len(f) / 50 - r["duration"]) < 0.05 for f, r in zip(frames, picked, strict=True))
    # an untrained or collapsed encoder gives nearly the same vector everywhere
    similarity = torch.cosine_similarity(frames[0][:, None], frames[1][None], dim=-1)
    assert similarity.min() < 0.3
