"""`prepare`: corpus layouts, and drops counted by reason."""

import json
import os

import numpy as np
import pytest
import soundfile

from blspkd.data.manifest import read_manifest
from blspkd.data.prepare import PrepareConfig, prepare

RATE = 16_000


def write_clip(path, seconds=1.0, *, rate=RATE, channels=1, level=0.3):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-level, level, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate)
    return path


def test_every_kind_of_bad_clip_is_dropped_and_counted(tmp_path):
    write_clip(tmp_path / "good.wav")
    write_clip(tmp_path / "phone.wav", rate=8_000)
    write_clip(tmp_path / "stereo.wav", channels=2)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "corrupt.wav").write_text("no sound " * 99)
    write_clip(tmp_path / "short.wav", 0.05)
    write_clip(tmp_path / "long.wav", 60.0, rate=8_000)
    write_clip(tmp_path / "silent.wav", level=0.0)
    lines = [
        *(
            json.dumps({"audio": f"{name}.wav", "text": " good \n morning", "voice": "me"})
            for name in ["good", "phone", "stereo"]
        ),
        *(
            json.dumps({"audio": f"{name}.wav", "text": "hello"})
            for name in ["none", "empty", "corrupt", "short", "long", "silent"]
        ),
        '{"audio": "good.wav", "te',
        json.dumps({"audio": "good.wav"}),
        json.dumps({"audio": "good.wav", "text": " "}),
        json.dumps({"audio": "good.wav", "text": "again", "id": "good-1"}),
        "",
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    summary = prepare(tmp_path / "in.jsonl", tmp_path / "out.jsonl", jobs=2)
    assert summary.dropped == {
        "missing": 1,
        "empty": 1,
        "corrupt": 1,
        "too short": 1,
        "too long": 1,
        "silent": 1,
        "broken line": 1,
        "missing field": 1,
        "empty transcript": 1,
        "duplicate id": 1,
    }
    assert summary.kept == 3
    assert summary.total == 13
    assert "in.jsonl:10:" in summary.examples["broken line"]
    records = read_manifest(tmp_path / "out.jsonl")
    assert [record.audio.stem for record in records] == ["good", "phone", "stereo"]
    assert [record.duration for record in records] == [1.0, 1.0, 1.0]
    assert {record.text for record in records} == {"good morning"}
    assert records[0].extra == {"voice": "me"}


def test_librispeech(tmp_path):
    chapter = tmp_path / "test-clean" / "61" / "70968"
    write_clip(chapter / "61-70968-0000.flac")
    chapter.joinpath("61-70968.trans.txt").write_text(
        "61-70968-0000 HE BEGAN A CONFUSED COMPLAINT\n61-70968-0001 GIVE NOT SO EARNEST A MIND\n"
    )
    out = tmp_path / "out.jsonl"
    summary = prepare(tmp_path, out)
    assert (summary.kept, summary.capitals, dict(summary.dropped)) == (1, 1, {"missing": 1})
    assert "61-70968-0001.flac" in summary.examples["missing"]
    assert read_manifest(out)[0].text == "HE BEGAN A CONFUSED COMPLAINT"
    prepare(tmp_path, out, config=PrepareConfig(case="lower"))
    (record,) = read_manifest(out)
    assert record.text == "he began a confused complaint"
    assert record.id == "61-70968-0000"
    assert json.loads(out.read_text())["audio"] == "test-clean/61/70968/61-70968-0000.flac"


def test_common_voice(tmp_path):
    write_clip(tmp_path / "clips" / "cv_1.mp3")
    (tmp_path / "test.tsv").write_text(
        'client_id\tpath\tsentence\tlocale\nx\tcv_1.mp3\t"Quoted, he said.\ten\ny\tcv_2.mp3\t\ten\n'
        "z\n"
    )
    summary = prepare(tmp_path, tmp_path / "out.jsonl")
    assert dict(summary.dropped) == {"empty transcript": 1, "broken line": 1}
    assert "test.tsv:4:" in summary.examples["broken line"]
    (record,) = read_manifest(tmp_path / "out.jsonl")
    assert (record.text, record.lang, record.id) == ('"Quoted, he said.', "en", "cv_1")
    (tmp_path / "train.tsv").write_text("path\tsentence\ncv_1.mp3\thello\n")
    with pytest.raises(ValueError, match=r"several tables \(test.tsv, train.tsv\)"):
        prepare(tmp_path, tmp_path / "out.jsonl")
    prepare(tmp_path / "train.tsv", tmp_path / "out.jsonl")
    assert read_manifest(tmp_path / "out.jsonl")[0].text == "hello"
    (tmp_path / "odd.tsv").write_text("path\ttext\n")
    with pytest.raises(ValueError, match=r"odd.tsv:1: no column sentence"):
        prepare(tmp_path / "odd.tsv", tmp_path / "out.jsonl")


def test_ljspeech(tmp_path):
    write_clip(tmp_path / "wavs" / "LJ001-0001.wav")
    write_clip(tmp_path / "wavs" / "LJ001-0002.wav")
    (tmp_path / "metadata.csv").write_text(
        'LJ001-0001|in 1455, "so"|in fourteen fifty-five, "so"\nLJ001-0002|being modern.\nbroken\n'
    )
    summary = prepare(tmp_path, tmp_path / "out.jsonl")
    assert dict(summary.dropped) == {"broken line": 1}
    records = read_manifest(tmp_path / "out.jsonl")
    assert [record.text for record in records] == ['in fourteen fifty-five, "so"', "being modern."]


def test_audio_beside_text(tmp_path):
    for name in ("ann/one", "bob/one", "bob/two", "bob/three"):
        write_clip(tmp_path / f"{name}.wav")
    for name in ("ann/one", "bob/one"):
        (tmp_path / f"{name}.txt").write_text(f"this is\n{name[:3]}\n")
    (tmp_path / "bob/three.txt").write_bytes(b"\xff\xfe\x00")
    summary = prepare(tmp_path, tmp_path / "out.jsonl")
    assert dict(summary.dropped) == {"missing transcript": 1, "not text": 1}
    records = read_manifest(tmp_path / "out.jsonl")
    assert [(r.id, r.text) for r in records] == [
        ("ann-one", "this is ann"),
        ("bob-one", "this is bob"),
    ]


def test_a_name_that_is_no_text_costs_that_clip_alone(tmp_path):
    corpus = tmp_path / "corpus"
    for name in (b"good", b"caf\xe9"):  # Latin-1, as an old archive has it
        path = corpus / os.fsdecode(name)
        write_clip(corpus / "new.wav").rename(path.with_suffix(".wav"))
        path.with_suffix(".txt").write_text("hello")
    summary = prepare(corpus, tmp_path / "out.jsonl")
    assert (summary.kept, dict(summary.dropped)) == (1, {"file name": 1})
    assert "caf\\udce9.wav" in summary.examples["file name"]


def test_sources_that_are_no_corpus(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="no such file or folder"):
        prepare(tmp_path / "none", out)
    write_clip(tmp_path / "lonely.wav")
    with pytest.raises(ValueError, match="no corpus found"):
        prepare(tmp_path, out)
    with pytest.raises(ValueError, match="not a known kind"):
        prepare(tmp_path / "lonely.wav", out)


def test_the_source_is_never_overwritten(tmp_path):
    write_clip(tmp_path / "a.wav")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"audio": "a.wav", "text": "hi"}\nbroken\n')
    with pytest.raises(ValueError, match="overwrite the source"):
        prepare(manifest, manifest)


@pytest.mark.parametrize(
    "options",
    [
        {"min_duration": 0.01},
        {"min_duration": 5.0, "max_duration": 5.0},
        {"max_duration": 31.0},
        {"min_duration": float("nan")},
        {"case": "upper"},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=r"expected"):
        PrepareConfig(**options)
