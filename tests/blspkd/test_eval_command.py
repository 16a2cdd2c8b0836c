"""`blspkd eval` as it is typed."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from blspkd.__main__ import main


@pytest.fixture
def run(tiny_model, tmp_path, capsys):
    """Copy the model into a run's folder, and evaluate it there."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_model, folder)

    def evaluate(manifest, *options):
        command = ["eval", str(folder), str(manifest), "--max-new-tokens", "5"]
        if "--plots" not in options:
            command += ["--plots", "0"]  # pictures take longest
        code = main([*command, *options])
        out = capsys.readouterr()
        return code, out.out, out.err

    evaluate.folder = folder
    return evaluate


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_three_rows_and_a_report(run, tiny_corpus):
    log = [{"step": s, "loss": 3.0 / s, "eval_tts/input_kl": 1.0 / s} for s in (1, 2, 3)]
    (run.folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    code, out, err = run(tiny_corpus.manifest, "--task", "asr", "--plots", "1")
    assert code == 0, err
    table = [line.split() for line in out.split("\n\n")[0].splitlines()]
    assert [line[0] for line in table[1:]] == ["text", "cascade", "speech"]
    assert "input_kl" in out

    folder = run.folder / "eval-asr-manifest"
    assert sorted(path.name for path in folder.iterdir()) == [
        "alignment-0.png",
        "curves.png",
        "metrics.json",
        "predictions.jsonl",
        "report.md",
    ]
    predictions = read_lines(folder / "predictions.jsonl")
    assert [line["id"] for line in predictions] == [f"clip{i}" for i in range(6)]
    assert predictions[0]["transcript"] == predictions[0]["reference"] == tiny_corpus.texts[0]
    assert {"text", "cascade", "speech", "cascade_transcript", "speech_transcript"} < set(
        predictions[0]
    )
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["clips"] == 6
    assert figures["rows"]["text"]["same_answer"] == 1.0
    assert {"input_kl", "response_kl", "token_accuracy", "length_within_one"} < set(
        figures["meters"]
    )
    report = (folder / "report.md").read_text()
    for picture in ("alignment-0.png", "curves.png"):
        assert f"({picture})" in report


def test_batches_change_no_prediction(run, tiny_corpus, tmp_path):
    found = []
    for size in ("1", "4"):
        output = tmp_path / f"batch{size}"
        code, _, err = run(
            tiny_corpus.manifest, "--task", "qa", "--batch-size", size, "--output", str(output)
        )
        assert code == 0, err
        meters = json.loads((output / "metrics.json").read_text())["meters"]
        found.append((read_lines(output / "predictions.jsonl"), meters))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4, abs=1e-5)


def test_without_a_decoder_the_cascade_is_left_out_with_a_note(
    run, tiny_corpus, tiny_parts, tmp_path
):
    encoder = tmp_path / "encoder-only"
    shutil.copytree(tiny_parts.encoder, encoder)
    weights = load_file(encoder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".encoder." in name}
    save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
    options = ("--task", "qa", "--encoder", str(encoder), "--limit", "2")
    code, out, err = run(tiny_corpus.manifest, *options, "--json")
    assert code == 0, err
    assert set(json.loads(out)["rows"]) == {"text", "speech"}
    assert "no cascade" in err
    assert json.loads(out)["clips"] == 2
    # another Whisper model fills the gap; one that has no decoder does not
    whisper = str(tiny_parts.encoder)
    code, out, err = run(
        tiny_corpus.manifest, *options, "--json", "--force", "--transcriber", whisper
    )
    assert code == 0, err
    assert "cascade" in json.loads(out)["rows"]
    code, _, err = run(tiny_corpus.manifest, *options, "--force", "--transcriber", str(encoder))
    assert code == 1
    assert "has no decoder" in err


def test_records_without_a_response_are_measured_on_input_alone(run, tiny_corpus, tmp_path):
    lines = read_lines(tiny_corpus.manifest)
    for line in lines:
        line["audio"] = str(tiny_corpus.manifest.parent / line["audio"])
        del line["response"], line["response_finished"]
    manifest = tmp_path / "asr.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run(
        manifest, "--task", "st", "--prompt", "To German: {speech}", "--limit", "3", "--json"
    )
    assert code == 0, err
    figures = json.loads(out)
    assert "input_kl" in figures["meters"]
    assert "response_kl" not in figures["meters"]
    assert "0 of 3 clips whose response is known" in err
    assert "bleu" in figures["rows"]["speech"]


def test_conditions_and_clips_without_speech_stand_beside_the_clean_clips(run, tiny_corpus):
    code, out, err = run(
        *(tiny_corpus.manifest, "--task", "continue", "--limit", "3", "--no-speech", "1"),
        *("--condition", "noise:0", "--condition", "babble:5+telephone"),
    )
    assert code == 0, err
    assert "noise:0" in out
    assert "pretends" in out
    folder = run.folder / "eval-continue-manifest"
    figures = json.loads((folder / "metrics.json").read_text())
    assert list(figures["conditions"]) == ["noise:0", "babble:5+telephone"]
    for found in figures["conditions"].values():
        assert found["rows"]["text"] == figures["rows"]["text"]
        assert found["meters"]["input_kl"] != figures["meters"]["input_kl"]
    assert set(figures["no_speech"]["rows"]) == {"cascade", "speech"}
    assert figures["gaps"]["speech - cascade"]["self_bleu"]["low"] <= 0
    report = (folder / "report.md").read_text()
    assert "(conditions.png)" in report
    assert "## Clips without speech" in report
    assert (folder / "conditions.png").is_file()


def test_falling_short_exits_with_three(run, tiny_corpus):
    limits = ("--fail-under", "transcript_wer=0", "--fail-under", "text/same_answer=1")
    code, _, err = run(tiny_corpus.manifest, "--task", "qa", "--limit", "2", *limits)
    assert code == 3
    assert "missed: speech/transcript_wer <= 0" in err
    assert "same_answer" not in err
    assert (run.folder / "eval-qa-manifest" / "report.md").is_file()


@pytest.fixture
def never_answered(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a clip was answered")

    name = "blspkd.model.modeling.BlspKDForConditionalGeneration"
    monkeypatch.setattr(f"{name}.generate_from_text", never)
    monkeypatch.setattr(f"{name}.generate", never)


def test_a_language_that_the_cascade_does_not_know_is_told_before_any_answer(
    run, tiny_corpus, tmp_path, never_answered
):
    lines = read_lines(tiny_corpus.manifest)
    for line in lines:
        line["audio"] = str(tiny_corpus.manifest.parent / line["audio"])
    lines[-1]["lang"] = "xx"
    (tmp_path / "lang.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run(tmp_path / "lang.jsonl", "--task", "qa")
    assert (code, out) == (1, "")
    assert "record 'clip5': lang: expected a language" in err
    assert "(de, en), got 'xx'" in err


def test_an_answer_longer_than_the_language_model_reads_is_told_before_any_answer(
    run, tiny_corpus, never_answered
):
    code, out, err = run(tiny_corpus.manifest, "--task", "qa", "--max-new-tokens", "3000")
    assert (code, out) == (1, "")
    assert "an answer may have 3000, but the language model reads 512" in err


def test_faults_are_told_before_any_weights_are_loaded(run, tiny_corpus, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("blspkd.model.loading.load_model", never)
    manifest = str(tiny_corpus.manifest)
    assert run(tmp_path / "no.jsonl", "--task", "qa")[::2] == (
        1,
        f"Error: {tmp_path / 'no.jsonl'}: no such manifest; `blspkd prepare` makes a manifest\n",
    )
    code, _, err = run(manifest, "--task", "st")
    assert (code, "translation_lang" in err) == (1, True)
    code, _, err = run(manifest, "--task", "qa", "--fail-under", "wer=1")
    assert (code, "has no metric" in err) == (2, True)
    code, _, err = run(manifest, "--task", "qa", "--prompt", "hello")
    assert (code, "{speech} exactly once" in err) == (2, True)
    code, _, err = run(manifest, "--task", "qa", "--condition", "rain")
    assert (code, "noise:DB" in err) == (2, True)
    code, _, err = run(manifest, "--task", "qa", "--limit", "1", "--condition", "babble:3")
    assert (code, "other clips" in err) == (1, True)
    lines = read_lines(tiny_corpus.manifest)
    for line in lines:
        line.update(audio=str(tiny_corpus.manifest.parent / line["audio"]), answers=["x"])
    lines[-1]["answers"] = "oops"
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run(tmp_path / "answers.jsonl", "--task", "qa")
    assert (code, "record 'clip5': the column 'answers'" in err) == (1, True)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF and nothing else")
    line = {"audio": str(broken), "text": "x"}
    (tmp_path / "broken.jsonl").write_text(json.dumps(line))
    code, _, err = run(tmp_path / "broken.jsonl", "--task", "qa")
    assert (code, "cannot be decoded" in err) == (1, True)
    output = run.folder / "eval-qa-manifest"
    output.mkdir()
    (output / "old").write_text("")
    code, _, err = run(manifest, "--task", "qa")
    assert (code, "--force" in err) == (1, True)
