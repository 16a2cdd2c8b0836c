"""The cascade: when Whisper listens again, and how its transcripts are written."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from blspkd.data.manifest import read_manifest
from blspkd.evaluation import cascade
from blspkd.evaluation.cascade import FALLBACK, Transcriber, as_written, style_of
from blspkd.evaluation.evaluate import evaluate
from blspkd.evaluation.tasks import EvalConfig
from blspkd.model.loading import load_model


@pytest.fixture
def records(tiny_corpus):
    return read_manifest(tiny_corpus.manifest)


@pytest.fixture
def whisper(tiny_parts):
    return Transcriber.load(
        str(tiny_parts.encoder), dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("texts", "case", "punctuation"),
    [
        (["she sells shells", "it's late"], "lower", "strip"),
        (["She sells shells", "it's late"], "keep", "strip"),
        (["she sells shells, late", "it is late"], "lower", "keep"),
        (["She sells shells.", "it is late"], "keep", "keep"),
        (["SHE SELLS SHELLS"], "keep", "strip"),
    ],
)
def test_the_style_is_what_all_transcripts_have(texts, case, punctuation):
    style = style_of(texts)
    assert (style.case, style.punctuation) == (case, punctuation)


def test_a_perfect_transcript_is_answered_as_the_text_is(tiny_model, records, monkeypatch, whisper):
    """Capitals and a full stop are how Whisper writes, not what it missed."""
    model, processor = load_model(tiny_model)
    records = [replace(record, text=record.text.lower().strip(".")) for record in records[:3]]
    cased = [record.text.capitalize() + "." for record in records]
    monkeypatch.setattr(Transcriber, "transcribe", lambda *_, **__: cased)
    config = EvalConfig(task="continue", max_new_tokens=8)
    found = evaluate(model, processor, records, config, transcriber=whisper)
    assert found.rows["cascade"].transcripts == cased
    assert found.rows["cascade"].answers == found.rows["text"].answers
    assert as_written(cased, records) == [record.text for record in records]


def test_whisper_listens_again_by_its_own_rule(whisper, records, monkeypatch):
    asked = []

    def generate(self, *args, **kwargs):
        asked.append(kwargs)
        return torch.tensor([[self.config.decoder_start_token_id]])

    monkeypatch.setattr(type(whisper.model), "generate", generate)
    assert whisper.transcribe(records[:2]) == ["", ""]
    assert [{name: one[name] for name in FALLBACK} for one in asked] == [FALLBACK, FALLBACK]
    # transformers leaves out every rule whose threshold is None
    assert all(value is not None for value in FALLBACK.values())


def test_a_clip_is_encoded_once_however_often_it_is_heard(whisper, records, monkeypatch):
    encoder = whisper.model.get_encoder()
    encoded = []
    encode = type(encoder).forward
    monkeypatch.setitem(FALLBACK, "logprob_threshold", 0.0)  # never sure enough: all temperatures

    def count(self, *args, **kwargs):
        encoded.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(encoder), "forward", count)
    once = whisper.transcribe(records[:2])
    assert len(encoded) == 2
    encoded.clear()
    monkeypatch.setattr(cascade, "_encoding_once", lambda _: nullcontext())
    assert whisper.transcribe(records[:2]) == once
    assert len(encoded) >= 2 * len(FALLBACK["temperature"])
    assert "forward" not in vars(encoder)
