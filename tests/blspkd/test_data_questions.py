"""recipes/smollm2-whisper-base/questions.py: spoken questions with what answers them."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from blspkd.data.manifest import read_manifest
from blspkd.evaluation.tasks import accepted_answers


@pytest.fixture(scope="module")
def questions(load_recipe):
    return load_recipe("smollm2-whisper-base/questions.py")


def test_the_shipped_questions_are_written_as_a_recogniser_writes(questions):
    found = questions.read_questions(questions.HERE / "questions.tsv")
    texts = [text for text, _ in found]
    assert len(found) >= 50
    assert len(set(texts)) == len(texts)
    for text, accepted in found:
        assert text == " ".join(text.lower().split())
        assert all(letter.isalpha() or letter in " '" for letter in text)
        # a question that says its own answer measures nothing
        assert not any(f" {answer} " in f" {text} " for answer in accepted), text


def test_a_line_without_an_answer_is_named(questions, tmp_path):
    path = tmp_path / "questions.tsv"
    path.write_text("what is up\tsky\nwhat is down\t | \n")
    with pytest.raises(ValueError, match=r"questions.tsv:2: expected QUESTION<tab>ANSWER"):
        questions.read_questions(path)


def test_the_manifest_is_one_that_eval_takes(questions, tmp_path, monkeypatch):
    asked = tmp_path / "asked.tsv"
    asked.write_text("who is it\tme|I\nwhere am i\there\n")

    def silent(clip, root):
        path = Path(root) / clip.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        return 1.25

    monkeypatch.setattr(questions, "speak", silent)
    monkeypatch.setattr(questions, "check_voices", lambda voices: None)
    result = CliRunner().invoke(
        questions.main, [str(tmp_path), "--questions", str(asked), "--voices", "flite:slt,x:y"]
    )
    assert result.exit_code == 0, result.output
    records = read_manifest(tmp_path / "questions.jsonl")
    assert [record.text for record in records] == ["who is it", "where am i"]
    assert [record.extra["voice"] for record in records] == ["flite:slt", "x:y"]
    assert all(record.messages == [{"role": "user", "content": "{speech}"}] for record in records)
    assert accepted_answers(records, "qa") == [["me", "I"], ["here"]]
