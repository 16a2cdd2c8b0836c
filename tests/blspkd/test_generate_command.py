"""`blspkd generate` as it is typed."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from blspkd.__main__ import main
from blspkd.data.manifest import read_manifest
from blspkd.evaluation.answers import nearest_embedding_transcripts
from blspkd.model.loading import load_model


@pytest.fixture
def generate(tiny_model, capsys):
    def call(*arguments):
        code = main(["generate", str(tiny_model), *map(str, arguments), "--max-new-tokens", "5"])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_one_clip_gives_its_answer_alone_and_several_give_their_names(generate, tiny_corpus):
    first, second = tiny_corpus.audio[:2]
    code, alone, err = generate(first, "--prompt", "Say: {speech}")
    assert code == 0, err
    code, both, err = generate(first, second, "--prompt", "Say: {speech}", "--num-beams", "1")
    assert code == 0, err
    assert both.startswith(f"==> {first} <==\n{alone}\n==> {second} <==\n")


def test_any_rate_and_any_number_of_channels(generate, tmp_path):
    rng = np.random.default_rng(0)
    stereo = tmp_path / "stereo.flac"
    soundfile.write(stereo, 0.1 * rng.standard_normal((8_000, 2)), 8_000)
    code, out, err = generate(stereo, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["audio"] == str(stereo)
    assert found["duration"] == pytest.approx(1.0)
    assert found["silent"] is False
    assert isinstance(found["answer"], str)


def test_silence_is_answered_with_a_warning(generate, tmp_path):
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    code, out, err = generate(silent, "--json")
    assert code == 0
    assert f"warning: {silent} is silent" in err
    assert json.loads(out)["silent"] is True


def test_bad_input_is_told_before_any_weights_are_loaded(generate, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("blspkd.model.loading.load_model", never)
    soundfile.write(tmp_path / "short.wav", np.ones(800) * 0.1, 16_000)
    soundfile.write(tmp_path / "long.wav", np.ones(8_000 * 60) * 0.1, 8_000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio at all")
    for name, message in {
        "no.wav": "no such audio file",
        "short.wav": "too short",
        "long.wav": "too long",
        "empty.wav": "empty",
        "text.wav": "cannot be decoded",
    }.items():
        code, out, err = generate(tmp_path / name)
        assert (code, out) == (1, "")
        assert err.startswith(f"Error: {tmp_path / name}")
        assert message in err
    code, _, err = generate(tmp_path / "short.wav", "--prompt", "no place for speech")
    assert (code, "exactly once" in err) == (2, True)


def test_what_was_heard_is_told_too(generate, tiny_model, tiny_corpus, monkeypatch):
    clips = tiny_corpus.audio[:2]
    code, out, err = generate(*clips, "--json", "--transcript")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    model, processor = load_model(tiny_model)
    records = read_manifest(tiny_corpus.manifest)[:2]
    heard = nearest_embedding_transcripts(model, processor, records)
    assert [row["transcript"] for row in found] == heard
    assert all(heard)
    code, out, _ = generate(clips[0], "--transcript")
    assert (code, out) == (0, f"heard: {heard[0]}\n{found[0]['answer']}\n")
    assert "transcript" not in json.loads(generate(clips[0], "--json")[1])
    deaf = lambda *args, **kwargs: [""]  # noqa: E731  # a name would say no more
    monkeypatch.setattr("blspkd.evaluation.clips.nearest_embedding_transcripts", deaf)
    code, out, _ = generate(clips[0], "--transcript")
    assert out == f"heard no speech\n{found[0]['answer']}\n"


def test_only_adapters_with_tokens_have_a_transcript(tiny_model, tiny_corpus, tmp_path, capsys):
    folder = shutil.copytree(tiny_model, tmp_path / "conv")
    config = json.loads((folder / "config.json").read_text())
    config.update(adapter_type="conv", adapter={}, token_spelling=0, length_search=0)
    (folder / "config.json").write_text(json.dumps(config))
    code = main(["generate", str(folder), str(tiny_corpus.audio[0]), "--transcript"])
    out = capsys.readouterr()
    assert (code, out.out) == (1, "")
    assert "--transcript needs an adapter" in out.err
    assert f"{folder} is conv" in out.err


def test_sampling_needs_a_sensible_range(generate, tiny_corpus):
    for options, name in {
        ("--temperature", "1", "--top-p", "2"): "--top-p",
        ("--top-p", "0"): "--top-p",
        ("--top-p", "nan"): "top_p",
        ("--temperature", "nan"): "temperature",
        ("--temperature", "inf"): "temperature",
    }.items():
        code, out, err = generate(tiny_corpus.audio[0], *options)
        assert (code, out, name in err) == (2, "", True)
    assert generate(tiny_corpus.audio[0], "--num-beams", "0")[0] == 2


def test_an_answer_longer_than_the_language_model_reads_is_refused(tiny_model, tiny_corpus, capsys):
    clip = str(tiny_corpus.audio[0])
    code = main(["generate", str(tiny_model), clip, "--max-new-tokens", "3000"])
    out = capsys.readouterr()
    assert (code, out.out) == (1, "")
    assert "an answer may have 3000, but the language model reads 512" in out.err
