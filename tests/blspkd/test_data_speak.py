"""recipes/speak.py: clauses, splits without leaks, and a resumable corpus."""

import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def speak(load_recipe):
    return load_recipe("speak.py")


def texts(speak, sentence):
    return [text for _, text in speak.split_clauses(sentence)]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Although he left, nobody saw him go.", ["although he left", "nobody saw him go"]),
        ("Indeed, he did not go there.", ["indeed he did not go there"]),
        ("He went home at once, alone.", ["he went home at once alone"]),
        ("Mr. J. F. O'Neil isn't here", ["mister j f o'neil isn't here"]),
        ("a well-known man -- in the town", ["a well known man", "in the town"]),
        ("he had 16 of them, and they were red", ["and they were red"]),
        ("met in St Paul, or so they say", ["or so they say"]),
        ("two words", []),
        ("they left, on the 5th, by boat", []),  # not "they left by boat": nobody said that
        ("he said, \u201cit\u2019s the 'best' one\u201d", ["he said it's the best one"]),
        ("the caf\u00e9 was closed, we went home", ["we went home"]),
    ],
)
def test_clauses(speak, sentence, expected):
    assert texts(speak, sentence) == expected


def test_acronyms_keep_their_case_for_the_synthesiser(speak):
    assert speak.split_clauses("An agent of the FBI came.") == [
        ("An agent of the FBI came", "an agent of the fbi came")
    ]


LONG = "Although he left, nobody saw him go; they went home, and sat down by the fire."


def test_clauses_are_joined_while_they_fit(speak):
    parts = ["although he left", "nobody saw him go", "they went home", "and sat down by the fire"]
    assert texts(speak, LONG) == parts
    assert speak.split_clauses(LONG, 16) == [
        (", ".join(["Although he left", *parts[1:]]), " ".join(parts))
    ]
    long = f"{LONG[:-1]} until the morning came and everybody went to bed"
    assert [t for _, t in speak.split_clauses(long, 16)] == [
        "although he left nobody saw him go they went home",
        "and sat down by the fire until the morning came and everybody went to bed",
    ]
    # nobody said what is left without the year
    gap = LONG.replace("they went", "in 1963 they went")
    assert [t for _, t in speak.split_clauses(gap, 30)] == [
        "although he left nobody saw him go",
        "and sat down by the fire",
    ]


words = st.lists(st.sampled_from(["oh", "don't", "sea", "7", "Mr.", "x-y"]), max_size=40)


@settings(deadline=None, max_examples=50)
@given(words=words, marks=st.lists(st.sampled_from([" ", ", ", "; "]), min_size=40, max_size=40))
def test_clauses_have_3_to_15_plain_words(speak, words, marks):
    sentence = "".join(w + m for w, m in zip(words, marks, strict=False))
    for text in texts(speak, sentence):
        assert re.fullmatch(r"[a-z']+( [a-z']+){2,14}", text)


def plan(speak, **changes):
    lines = [f"{a} dog saw {b} cat, and {a} cat ran home" for a in NAMES for b in NAMES]
    options = {
        "clips": 40,
        "held_out_sentences": 20,
        "test_clips": 20,
        "voice_clips": 5,
        "voices": ["flite:slt", "flite:rms"],
        "held_out_voice": "flite:awb",
        "seed": 3,
    }
    return speak.plan_corpus(lines, **{**options, **changes})


def test_more_text_is_trained_on_and_leaves_the_test_sets_alone(speak):
    alone = plan(speak)
    more = ["otters build their dams at night", *(clip.spoken for clip in alone["test-voice"])]
    both = plan(speak, more=more, clips=46)
    for split in ("test-sentences", "test-voice"):
        assert both[split] == alone[split]
    trained = {clip.text for clip in both["train"]}
    assert "otters build their dams at night" in trained
    assert not trained & {clip.text for clip in both["test-sentences"]}


def test_longer_clips_are_trained_on_and_hold_nothing_that_is_held_out(speak):
    short = plan(speak, clips=9)
    held_out = [clip.text for clip in short["test-sentences"]]
    more = [f"A fox came by one day, {held_out[0]}.", "A fox came by one day, and then it left us."]
    long = plan(speak, more=more, max_words=30, clips=9)
    for split in ("test-sentences", "test-voice"):
        assert long[split] == short[split]
    trained = {clip.text for clip in long["train"]}
    assert "a fox came by one day and then it left us" in trained
    assert {len(text.split()) for text in trained} == {10, 11}
    assert not any(text in one for text in held_out for one in trained)


NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def test_no_clause_of_a_held_out_sentence_is_in_train(speak):
    splits = plan(speak)
    assert {name: len(clips) for name, clips in splits.items()} == {
        "train": 40,
        "test-sentences": 20,
        "test-voice": 5,
    }
    train = {clip.text for clip in splits["train"]}
    test = {clip.text for clip in splits["test-sentences"] + splits["test-voice"]}
    assert len(train) == 40
    assert not train & test
    assert {clip.voice for clip in splits["train"]} == {"flite:slt", "flite:rms"}
    assert {clip.voice for clip in splits["test-voice"]} == {"flite:awb"}


def test_the_plan_depends_on_its_arguments_alone_and_grows(speak):
    assert plan(speak) == plan(speak)
    assert plan(speak, seed=4)["train"] != plan(speak)["train"]
    assert plan(speak, clips=44)["train"][:40] == plan(speak)["train"]
    with pytest.raises(click.UsageError, match="train: 5000 clips wanted, but the text gives"):
        plan(speak, clips=5000)


def test_a_missing_synthesiser_names_its_package(speak, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(click.ClickException, match="apt-get install espeak-ng"):
        speak.check_voices(["espeak-ng:en-us"])
    for voice in ("mbrola:us1", "flite", "flite:"):
        with pytest.raises(click.UsageError, match=f"'{voice}': expected one of 'flite:NAME'"):
            speak.check_voices([voice])


def fake_program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def fake_module(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, name, module)


def test_festival_is_asked_for_the_voice_its_rate_and_its_pitch(speak, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    soundfile.write(tmp_path / "said.wav", np.zeros(8_000), 16_000)
    fake_program(tmp_path, "festival", "echo '(cmu_us_slt_arctic_hts ked_diphone)'")
    # text2wave -eval VOICE -eval RATE -eval PITCH -o WAV
    keep = f'printf "%s|" "$2" "$4" "$6" > {tmp_path}/asked; cat > {tmp_path}/text'
    fake_program(tmp_path, "text2wave", f'{keep}; cp {tmp_path}/said.wav "$8"')
    speak.check_voices(["festival:ked_diphone"])
    with pytest.raises(click.UsageError, match="festival knows cmu_us_slt_arctic_hts, ked_diph"):
        speak.check_voices(["festival:kal_diphone"])
    clip = speak.Clip("one, two", "one two", "festival:ked_diphone", 0.8, 1.1)
    assert speak.speak(clip, tmp_path) == 0.5
    assert (tmp_path / "text").read_text() == "one, two"
    voice, rate, pitch, _ = (tmp_path / "asked").read_text().split("|")
    assert voice == "(voice_ked_diphone)"
    assert rate == "(Parameter.set 'Duration_Stretch (/ (Parameter.get 'Duration_Stretch) 0.8000))"
    assert "target_f0_mean (* 1.1000 " in pitch


def test_rhvoice_is_tried_beforehand_since_it_fails_without_a_word(speak, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    soundfile.write(tmp_path / "said.wav", np.zeros(12_000), 24_000)
    with pytest.raises(click.ClickException, match="RHVoice-test is not installed"):
        speak.check_voices(["rhvoice:bdl"])
    # RHVoice-test -p NAME [-r RATE -t PITCH] -o WAV
    script = f"""while [ $# -gt 0 ]; do
        case $1 in -p) name=$2;; -o) wav=$2;; esac
        echo "$1 $2" >> {tmp_path}/asked; shift 2
    done
    [ $name = bdl ] && cp {tmp_path}/said.wav "$wav"; exit 0"""
    fake_program(tmp_path, "RHVoice-test", script)
    with pytest.raises(click.UsageError, match=r"RHVoice-test spoke nothing \(there is no such"):
        speak.check_voices(["rhvoice:nobody"])
    speak.check_voices(["rhvoice:bdl"])
    assert speak.speak(speak.Clip("one", "one", "rhvoice:bdl", 0.8, 1.1), tmp_path) == 0.5
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-4:-1] == ["-p bdl", "-r 80", "-t 110"]


def test_pico_speaks_at_the_rate_and_pitch_of_the_clip(speak, monkeypatch, tmp_path):
    made = []

    class TtsEngine:
        def __init__(self, language):
            if language != "en-US":
                raise RuntimeError
            made.append(self)
            self.rate = self.pitch = 100

        def speak(self, text):
            return b"\1\0" * (160 * self.rate + 16 * self.pitch)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(click.ClickException, match=r"^ttspico is not installed .*: pip install tt"):
        speak.check_voices(["pico:en-US"])
    monkeypatch.undo()
    fake_module(monkeypatch, "ttspico", TtsEngine=TtsEngine)
    with pytest.raises(click.UsageError, match="English is 'en-US' or 'en-GB'"):
        speak.check_voices(["pico:xx"])
    speak.check_voices(["pico:en-US"])
    for rate, pitch, duration in ((0.8, 1.1, 0.91), (1.1, 0.9, 1.19)):
        clip = speak.Clip("one", "one", "pico:en-US", rate, pitch)
        assert speak.speak(clip, tmp_path) == pytest.approx(duration)
    assert len(made) == 1


def test_piper_speaks_at_the_rate_of_the_clip(speak, monkeypatch, tmp_path):
    heard = []

    class Voice:
        @classmethod
        def load(cls, model):
            heard.append(model)
            return cls()

        def synthesize_wav(self, text, file, syn_config):
            file.setparams((1, 2, 22_050, 0, "NONE", ""))
            file.writeframes(b"\1\0" * int(22_050 * syn_config["length_scale"]))
            heard.append(text)

    fake_module(monkeypatch, "piper", PiperVoice=Voice, SynthesisConfig=dict)
    model = tmp_path / "joe.onnx"
    model.touch()
    with pytest.raises(click.UsageError, match=r"no file .*joe\.onnx\.json"):
        speak.check_voices([f"piper:{model}"])
    Path(f"{model}.json").touch()
    speak.check_voices([f"piper:{model}"])
    clips = [speak.Clip(text, text, f"piper:{model}", 0.8, 1.0) for text in ("one two", "three")]
    for clip in clips:
        assert speak.speak(clip, tmp_path) == pytest.approx(1 / 0.8, abs=1e-3)
    assert heard == [str(model), "one two", "three"]  # loaded once


@pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")),
    reason="needs the programs flite and espeak-ng",
)
def test_a_corpus_is_spoken_and_resumed(speak, tmp_path):
    text, more, out = tmp_path / "text.txt", tmp_path / "more.txt", tmp_path / "corpus"
    lines = [f"{a} dog ran to the {b} cats\n" for a in NAMES for b in NAMES]
    text.write_text("".join(lines[:6]))
    more.write_text("".join(lines[6:]))
    sizes = ["--test-clips", "2", "--voice-clips", "2", "--held-out-sentences", "5"]
    voices = ["--voices", "flite:kal16,espeak-ng:en-us", "--held-out-voice", "espeak-ng:en-gb"]
    command = [str(text), str(more), str(out), "--clips", "2", *sizes, *voices]
    result = CliRunner().invoke(speak.main, command)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["voice"] for row in rows] == ["flite:kal16", "espeak-ng:en-us"]
    for row in rows:
        info = soundfile.info(out / row["audio"])
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert info.duration == pytest.approx(row["duration"], abs=1e-3)
        assert 0.5 < info.duration < 5
    first = out / rows[0]["audio"]
    before = first.stat().st_mtime_ns
    (out / rows[1]["audio"]).unlink()
    manifest = (out / "train.jsonl").read_text()
    assert CliRunner().invoke(speak.main, command).exit_code == 0
    assert first.stat().st_mtime_ns == before
    assert (out / rows[1]["audio"]).is_file()
    assert (out / "train.jsonl").read_text() == manifest
    wrong = [*command, "--held-out-voice", "flite:kal16"]
    assert "is also one of --voices" in CliRunner().invoke(speak.main, wrong).output
