"""Clips without speech, and who pretends to have heard some."""

import numpy as np
import pytest

from blspkd.evaluation import nothing
from blspkd.evaluation.answers import answer_from_speech, answer_from_text
from blspkd.evaluation.cascade import Transcriber
from blspkd.evaluation.nothing import LEVELS, empty_clips, hear_nothing, hear_out_nothing
from blspkd.model.audio import is_silent
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_model
from blspkd.model.prompts import as_messages

SHORT = Decoding(max_new_tokens=5)
PROMPT = "Say: {speech}"


def test_the_clips_hold_what_their_kind_says():
    records, kinds = empty_clips(3)
    assert len(records) == len({record.id for record in records}) == 3 * len(LEVELS)
    lengths = set()
    for record, kind in zip(records, kinds, strict=True):
        waveform = hear_nothing(record)
        assert np.array_equal(waveform, hear_nothing(record))
        assert 16_000 <= len(waveform) <= 160_000
        lengths.add(len(waveform))
        level = LEVELS[kind]
        if level is None:
            assert is_silent(waveform)
        else:
            assert 10 * np.log10(np.mean(waveform.astype(float) ** 2)) == pytest.approx(
                level, abs=0.3
            )
    assert len(lengths) == len(records)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model)


def test_rates_are_counted_from_what_each_row_believes_to_have_heard(loaded, monkeypatch):
    """Transcripts of 0, 1, 2 and 3 words in turn: half of them pretend."""
    model, processor = loaded
    spelled = ["", "You.", "thank you", "the old man"]

    def transcripts(model, processor, records, *, hear, batch_size):
        assert hear is hear_nothing
        return [spelled[i % 4] for i in range(len(records))]

    monkeypatch.setattr(nothing, "nearest_embedding_transcripts", transcripts)
    found = hear_out_nothing(
        model, processor, prompt=PROMPT, count=4, transcriber=None, decoding=SHORT
    )
    assert set(found.found) == {"speech"}
    for kind in LEVELS:
        one = found.found["speech"][kind]
        assert (one.clips, one.pretends, one.words) == (4, 0.5, 1.5)
    chat = [as_messages(PROMPT)]
    assert found.empty_answer == answer_from_text(model, processor, [""], chat, decoding=SHORT)[0]


def test_the_cascade_is_measured_by_the_same_rule(loaded, monkeypatch):
    model, processor = loaded
    whisper = Transcriber.load(
        model.config.encoder, dtype=model.embedding_weight().dtype, device=model.device
    )

    def transcribe(self, records, *, hear):
        assert hear is hear_nothing
        return ["" if "silence" in record.id else "thank you" for record in records]

    monkeypatch.setattr(Transcriber, "transcribe", transcribe)
    found = hear_out_nothing(
        model, processor, prompt=PROMPT, count=2, transcriber=whisper, decoding=SHORT
    )
    cascade = found.found["cascade"]
    assert (cascade["silence"].pretends, cascade["silence"].answers_differ) == (0, 0)
    assert cascade["noise -20 dBFS"].pretends == 1
    assert cascade["noise -20 dBFS"].words == 2
    assert len(found.transcripts["cascade"]) == len(found.kinds) == 2 * len(LEVELS)
    assert found.figures()["rows"]["speech"]["silence"]["clips"] == 2


def test_the_answers_are_those_to_the_sound(loaded):
    model, processor = loaded
    found = hear_out_nothing(
        model, processor, prompt=PROMPT, count=1, transcriber=None, decoding=SHORT
    )
    records, kinds = empty_clips(1)
    for record, kind in zip(records, kinds, strict=True):
        (answer,) = answer_from_speech(
            model,
            processor,
            [record],
            [as_messages(PROMPT)],
            decoding=SHORT,
            hear=lambda _, record=record: hear_nothing(record),
        )
        differs = found.found["speech"][kind].answers_differ
        assert differs == float(answer != found.empty_answer)
