"""What conditions do to a clip, and that cascade and speech hear the same."""

import dataclasses

import numpy as np
import pytest
import soundfile

from blspkd.data.manifest import Record, read_manifest
from blspkd.evaluation.cascade import Transcriber
from blspkd.evaluation.conditions import hear_clean, hear_under, parse_condition
from blspkd.evaluation.evaluate import evaluate
from blspkd.evaluation.tasks import EvalConfig
from blspkd.model.loading import load_model


@pytest.fixture(scope="module")
def records(tiny_corpus):
    return read_manifest(tiny_corpus.manifest)


def heard(text, records, record):
    return hear_under(parse_condition(text), records)(record)


def snr_db(clean, noisy):
    added = noisy.astype(np.float64) - clean
    return 10 * np.log10(np.mean(clean.astype(np.float64) ** 2) / np.mean(added**2))


@pytest.mark.parametrize("kind", ["noise", "babble"])
def test_noise_has_the_level_asked_for_and_is_the_same_every_time(kind, records):
    clean = hear_clean(records[1])
    for level in (20, 0, -5):
        noisy = heard(f"{kind}:{level}", records, records[1])
        assert noisy.dtype == np.float32
        assert snr_db(clean, noisy) == pytest.approx(level, abs=0.01)
    again = heard(f"{kind}:-5", list(reversed(records)), records[1])
    assert kind == "babble" or np.array_equal(again, noisy)
    assert np.array_equal(heard(f"{kind}:-5", records, records[1]), noisy)
    # another clip, another noise: even where the sound is the same
    other = dataclasses.replace(records[1], id="other")
    assert not np.array_equal(heard(f"{kind}:-5", records, other), noisy)


def test_levels_differ_in_level_alone(records):
    clean = hear_clean(records[0])
    soft, loud = (heard(f"noise:{db}", records, records[0]) - clean for db in (20, 0))
    np.testing.assert_allclose(10 * soft, loud, atol=1e-5)


def test_a_babble_holds_no_own_voice(records):
    """Tones of 200 + 110 i Hz: the babble has all of them but the clip's own."""
    clean = hear_clean(records[3])
    added = heard("babble:0", records, records[3]) - clean
    spectrum = np.abs(np.fft.rfft(added))
    hertz = np.fft.rfftfreq(len(added), 1 / 16_000)

    def level(frequency):
        return spectrum[np.abs(hertz - frequency) < 8].max()

    own, others = level(200 + 110 * 3), [level(200 + 110 * i) for i in (0, 1, 2, 4, 5)]
    assert own < 0.2 * min(others)


def test_steps_follow_each_other(records):
    noisy = heard("noise:0", records, records[2])
    both = heard("noise:0+telephone", records, records[2])
    spectrum, before = (np.abs(np.fft.rfft(one)) ** 2 for one in (both, noisy))
    hertz = np.fft.rfftfreq(len(both), 1 / 16_000)
    outside = (hertz < 200) | (hertz > 3600)
    assert spectrum[outside].sum() < 1e-3 * before[outside].sum()
    inside = (hertz > 500) & (hertz < 3200)
    assert spectrum[inside].sum() == pytest.approx(before[inside].sum(), rel=0.02)


@pytest.mark.parametrize("text", ["rain:3", "noise", "noise:loud", "noise:nan", "telephone:1", ""])
def test_unknown_conditions_are_refused(text):
    with pytest.raises(ValueError, match="condition"):
        parse_condition(text)


def test_babble_needs_other_clips(records):
    with pytest.raises(ValueError, match="other clips"):
        hear_under(parse_condition("babble:3"), records[:1])


def test_cascade_speech_and_meters_hear_the_condition_and_text_does_not(tiny_model, records):
    """Against clips that were spoilt beforehand, and saved."""
    model, processor = load_model(tiny_model)
    whisper = Transcriber.load(
        model.config.encoder, dtype=model.embedding_weight().dtype, device=model.device
    )
    config = EvalConfig(task="continue", max_new_tokens=5)
    condition = parse_condition("noise:0")
    hear = hear_under(condition, records)

    def run(clips, **options):
        return evaluate(model, processor, clips, config, transcriber=whisper, **options)

    clean, noisy = run(records), run(records, condition=condition)
    folder = records[0].audio.parent
    spoilt: list[Record] = []
    for record in records:
        path = folder / f"spoilt-{record.id}.wav"
        soundfile.write(path, hear(record), 16_000, subtype="FLOAT")
        spoilt.append(dataclasses.replace(record, audio=path))
    expected = run(spoilt)
    assert noisy.condition == "noise:0"
    assert noisy.rows == expected.rows
    assert noisy.meters == pytest.approx(expected.meters)
    assert noisy.rows["text"] == clean.rows["text"]
    for row in ("cascade", "speech"):
        assert noisy.rows[row].transcripts != clean.rows[row].transcripts
    assert noisy.meters["input_kl"] != clean.meters["input_kl"]
