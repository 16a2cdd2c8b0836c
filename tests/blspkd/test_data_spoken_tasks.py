"""recipes/smollm2-whisper-base/spoken_tasks.py: questions and translations, spoken."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from blspkd.data.manifest import read_manifest
from blspkd.evaluation.tasks import EvalConfig, accepted_answers, references, task_messages


@pytest.fixture(scope="module")
def spoken(load_recipe):
    return load_recipe("smollm2-whisper-base/spoken_tasks.py")


@pytest.mark.parametrize("name", ["questions", "translations"])
def test_the_shipped_texts_are_written_as_a_recogniser_writes(spoken, name):
    pairs = spoken.read_pairs(spoken.HERE / f"{name}.tsv")
    texts = [text for text, _ in pairs]
    assert len(pairs) >= 40
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text == " ".join(text.lower().split())
        assert all(letter.isalpha() or letter in " '" for letter in text)


def test_no_question_says_its_own_answer(spoken):
    for question, answers in spoken.read_pairs(spoken.HERE / "questions.tsv"):
        accepted = spoken.question_columns(answers)["answers"]
        assert accepted
        assert not any(f" {answer} " in f" {question} " for answer in accepted), question


@pytest.mark.parametrize("line", ["what is down", "what is down\t", "what is down\t | ", "\tsky"])
def test_a_line_that_lacks_something_is_named(spoken, tmp_path, line):
    path = tmp_path / "questions.tsv"
    path.write_text(f"what is up\tsky\n{line}\n")
    with pytest.raises(ValueError, match=r"questions.tsv:2: expected SENTENCE<tab>TEXT"):
        spoken.read_pairs(path)


def test_the_manifests_are_ones_that_eval_takes(spoken, tmp_path, monkeypatch):
    (tmp_path / "questions.tsv").write_text("who is it\tme|I\nwhere am i\there\n")
    (tmp_path / "translations.tsv").write_text("it is red\tes ist rötlich\n", encoding="utf-8")

    def silent(clip, root):
        path = Path(root) / clip.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        return 1.25

    monkeypatch.setattr(spoken, "speak", silent)
    monkeypatch.setattr(spoken, "check_voices", lambda voices: None)
    arguments = [str(tmp_path), "--texts", str(tmp_path), "--voices", "flite:slt,x:y"]
    result = CliRunner().invoke(spoken.main, arguments)
    assert result.exit_code == 0, result.output
    asked = read_manifest(tmp_path / "questions.jsonl")
    assert [record.text for record in asked] == ["who is it", "where am i"]
    assert [record.extra["voice"] for record in asked] == ["flite:slt", "x:y"]
    assert all(record.messages == [{"role": "user", "content": "{speech}"}] for record in asked)
    assert accepted_answers(asked, "qa") == [["me", "I"], ["here"]]
    translated = read_manifest(tmp_path / "translations.jsonl")
    assert references(translated, "st") == ["es ist rötlich"]
    [[turn]] = task_messages(translated, EvalConfig(task="st"), "")
    assert turn["content"] == "Translate the following sentence into German: {speech}"
