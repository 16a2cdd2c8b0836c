"""Manifests: what is read and written, and errors that name file, line and field."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blspkd.data.manifest import ManifestError, Record, read_manifest, write_manifest

GOOD = {"audio": "a.wav", "text": "good morning"}


def write_lines(folder, *lines, name="train.jsonl"):
    (folder / "a.wav").touch()
    path = folder / name
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def test_fields_defaults_and_unknown_columns(tmp_path):
    full = {
        "audio": "a.wav",
        "text": "good morning",
        "id": "one",
        "duration": 2,
        "response": "Hello!",
        "response_finished": True,
        "messages": [{"role": "user", "content": "Repeat: {speech}"}],
        "lang": "en",
        "voice": "slt",
        "score": [1, None],
    }
    path = write_lines(tmp_path, full, "", {**GOOD, "response": None})
    one, two = read_manifest(path)
    assert one == Record(
        audio=tmp_path / "a.wav",
        text="good morning",
        id="one",
        duration=2.0,
        response="Hello!",
        response_finished=True,
        messages=[{"role": "user", "content": "Repeat: {speech}"}],
        lang="en",
        extra={"voice": "slt", "score": [1, None]},
    )
    assert two.id == "a-3"  # the file's stem and its line
    assert two.response is None
    assert two.extra == {}


def chat(*contents):
    return {**GOOD, "messages": [{"role": "user", "content": content} for content in contents]}


FAULTS = [
    ('{"audio": "a.wav", ', "broken json at column", "broken line"),
    ("[1, 2]", "expected a json object, got a list", "broken line"),
    ({"text": "hi"}, "field 'audio' is missing.*fields here: text", "missing field"),
    ({"audio": "a.wav"}, "field 'text' is missing", "missing field"),
    ({**GOOD, "text": None}, "field 'text' is missing", "missing field"),
    ({**GOOD, "text": " \t"}, "field 'text' is empty", "empty transcript"),
    ({**GOOD, "text": 7}, "field 'text': expected a string, got a number", "wrong type"),
    ({**GOOD, "duration": "2 s"}, "field 'duration': expected a number", "wrong type"),
    ({**GOOD, "duration": True}, "field 'duration': expected a number, got true", "wrong type"),
    ({**GOOD, "duration": -1}, "field 'duration': expected seconds above 0", "wrong value"),
    ({**GOOD, "duration": float("nan")}, "field 'duration': expected seconds", "wrong value"),
    ({**GOOD, "response_finished": 1}, "expected true or false", "wrong type"),
    ({**GOOD, "audio": "b.wav"}, "field 'audio': no such file: .*b.wav", "missing"),
    (chat("hello"), "exactly once over all contents, got it 0 times", "wrong value"),
    (chat("{speech}", "and {speech}"), "exactly once over all contents, got it 2", "wrong value"),
    ({**GOOD, "messages": ["hi"]}, "field 'messages': item 0", "wrong value"),
    ({**GOOD, "messages": [{"role": "user"}]}, "field 'messages': item 0", "wrong value"),
    ({**GOOD, "messages": "hi"}, "field 'messages': expected a list", "wrong type"),
]


@pytest.mark.parametrize(("line", "message", "reason"), FAULTS)
def test_a_fault_names_file_line_and_field(tmp_path, line, message, reason):
    path = write_lines(tmp_path, GOOD, line)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    assert caught.value.reason == reason


def test_duplicate_ids_name_both_lines(tmp_path):
    path = write_lines(tmp_path, {**GOOD, "id": "x"}, GOOD, {**GOOD, "id": "x"})
    with pytest.raises(ManifestError, match=r":3: field 'id': 'x' already stands in line 1"):
        read_manifest(path)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ManifestError, match="is a folder"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="the manifest is empty"):
        read_manifest(write_lines(tmp_path, ""))
    (tmp_path / "b.jsonl").write_bytes(b'{"audio": "\xff"}')
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(tmp_path / "b.jsonl")


def test_what_is_required_is_up_to_the_caller(tmp_path):
    path = write_lines(tmp_path, GOOD)
    with pytest.raises(ManifestError, match="field 'response' is missing"):
        read_manifest(path, require=("audio", "text", "response"))
    only_text = write_lines(tmp_path, {"text": "hi"}, name="text.jsonl")
    assert read_manifest(only_text, require=("text",))[0].text == "hi"
    absent = write_lines(tmp_path, {**GOOD, "audio": "b.wav"}, name="absent.jsonl")
    assert read_manifest(absent, check_audio=False)[0].audio == tmp_path / "b.wav"


def test_a_line_may_hold_any_text_that_json_holds(tmp_path):
    text = "one\u2028two\x85three"  # str.splitlines() would break here
    path = write_lines(tmp_path, json.dumps({**GOOD, "text": text}, ensure_ascii=False))
    assert read_manifest(path)[0].text == text


def test_audio_below_the_folder_is_written_relative_to_it(tmp_path, monkeypatch):
    home = tmp_path / "corpus"
    inside, outside = home / "clips" / "a.wav", tmp_path / "other" / "b.wav"
    for path in (inside, outside):
        path.parent.mkdir(parents=True)
        path.touch()
    records = [Record(inside, "one", "1"), Record(outside, "two", "2")]
    monkeypatch.chdir(tmp_path)
    records.append(Record(Path("corpus/clips/a.wav"), "three", "3"))
    write_manifest(home / "m.jsonl", records)
    rows = [json.loads(line) for line in (home / "m.jsonl").read_text().splitlines()]
    assert [row["audio"] for row in rows] == ["clips/a.wav", str(outside), "clips/a.wav"]
    home.rename(tmp_path / "moved")  # a corpus can be moved as a whole
    assert read_manifest(tmp_path / "moved" / "m.jsonl")[0].audio.is_file()


def test_a_failed_write_leaves_the_old_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [Record(tmp_path / "a.wav", "old", "1")])
    before = path.read_bytes()

    def records():
        yield Record(tmp_path / "a.wav", "new", "1")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        write_manifest(path, records())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=30)
@given(
    text=texts,
    response=st.none() | texts,
    duration=st.none() | st.floats(0.1, 30),
    extra=st.dictionaries(st.sampled_from(["voice", "n", "ü"]), st.integers() | texts),
)
def test_writing_then_reading_gives_the_same_records(
    tmp_path_factory, text, response, duration, extra
):
    path = tmp_path_factory.getbasetemp() / "m.jsonl"
    record = Record(
        path.parent / "a.wav", text, "x", duration=duration, response=response, extra=extra
    )
    write_manifest(path, [record])
    assert read_manifest(path, check_audio=False) == [record]
