"""Prompts, references, scores and thresholds, by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from blspkd.data.manifest import Record
from blspkd.evaluation.gaps import score_gaps
from blspkd.evaluation.tasks import (
    ASR_PROMPT,
    CONTINUE_PROMPT,
    EvalConfig,
    Row,
    references,
    score_rows,
    task_messages,
)
from blspkd.evaluation.thresholds import METERS, parse_threshold, shortfalls


def record(name, text, **columns):
    return Record(audio=Path(f"{name}.wav"), text=text, id=name, **columns)


def said(chats):
    return [chat[0]["content"] for chat in chats]


def test_prompt_then_own_messages_then_the_task_s_prompt():
    own = [{"role": "user", "content": "Say {speech}"}]
    records = [record("a", "x"), record("b", "y", messages=own)]
    chats = task_messages(records, EvalConfig(task="asr"), "Model: {speech}")
    assert said(chats) == [ASR_PROMPT, "Say {speech}"]
    chats = task_messages(records, EvalConfig(task="qa"), "Model: {speech}")
    assert said(chats) == ["Model: {speech}", "Say {speech}"]
    chats = task_messages(records, EvalConfig(task="continue"), "Model: {speech}")
    assert said(chats) == [CONTINUE_PROMPT, "Say {speech}"]
    config = EvalConfig(task="asr", prompt="Again: {speech}")
    assert said(task_messages(records, config, "Model: {speech}")) == ["Again: {speech}"] * 2


def test_translation_needs_a_language_and_a_reference():
    bare = record("a", "x")
    with pytest.raises(ValueError, match=r"record 'a'.*translation_lang"):
        task_messages([bare], EvalConfig(task="st"), "")
    with pytest.raises(ValueError, match=r"record 'a'.*column 'translation'.*None"):
        references([bare], "st")
    full = record("a", "x", extra={"translation": "X", "translation_lang": "de"})
    prompt = said(task_messages([full], EvalConfig(task="st"), ""))[0]
    assert prompt == "Translate the following sentence into German: {speech}"
    assert references([full], "st") == ["X"]
    assert references([full], "asr") == ["x"]
    assert references([full], "qa") is None
    assert references([full], "continue") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sing"}, "task"),
        ({"task": "asr", "prompt": "no place"}, "prompt"),
        ({"task": "asr", "limit": 0}, "limit"),
        ({"task": "asr", "batch_size": 0}, "batch_size"),
        ({"task": "asr", "plots": -1}, "plots"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


RECORDS = [record("a", "the red hat"), record("b", "we eat")]
ROWS = {
    "text": Row(["the red hat", "we eat"], ["the red hat", "we eat"]),
    "cascade": Row(["the red cat", "we eat"], ["the bed hat", "we eat"]),
    "speech": Row(["the hat", "oh"], ["the red hat", "we"]),
}


def test_scores_by_hand():
    scores = score_rows("asr", RECORDS, ROWS)
    assert scores["text"]["wer"] == 0
    assert "transcript_wer" not in scores["text"]
    assert scores["cascade"]["wer"] == pytest.approx(1 / 5)  # cat
    assert scores["cascade"]["transcript_wer"] == pytest.approx(1 / 5)  # bed
    # "red" is gone; "we eat" became one other word: a substitution and a deletion
    assert scores["speech"]["wer"] == pytest.approx(3 / 5)
    assert scores["speech"]["transcript_wer"] == pytest.approx(1 / 5)
    assert scores["cascade"]["same_answer"] == pytest.approx(1 / 2)
    assert scores["speech"]["same_answer"] == 0
    # F1 of "the hat" against "the red hat" is 2*2/(3+2); the other pair shares nothing
    assert scores["speech"]["self_rouge_l"] == pytest.approx(0.4)
    assert scores["text"]["self_bleu"] == pytest.approx(100)


def test_translations_are_scored_by_bleu_and_questions_only_against_the_model_itself():
    records = [
        record(r.id, r.text, extra={"translation": t})
        for r, t in zip(RECORDS, ["the red hat", "we eat"], strict=True)
    ]
    scores = score_rows("st", records, ROWS)
    assert scores["text"]["chrf"] == pytest.approx(100)
    assert 0 < scores["cascade"]["chrf"] < 100
    assert "wer" not in scores["text"]
    for task in ("qa", "continue"):
        assert set(score_rows(task, RECORDS, ROWS)["text"]) == {
            "self_bleu",
            "self_rouge_l",
            "same_answer",
        }


def test_gaps_are_differences_of_the_scores():
    scores = score_rows("asr", RECORDS, ROWS)
    gaps = score_gaps("asr", RECORDS, ROWS, seed=0)
    assert set(gaps["text"]) == {"wer"}
    assert set(gaps["cascade"]) == {
        "wer",
        "transcript_wer",
        "self_bleu",
        "self_rouge_l",
        "same_answer",
    }
    for metric, gap in gaps["cascade"].items():
        expected = scores["speech"][metric] - scores["cascade"][metric]
        assert gap.difference == pytest.approx(expected)
        assert gap.low <= gap.difference <= gap.high
    without = {name: row for name, row in ROWS.items() if name != "cascade"}
    assert "cascade" not in score_gaps("asr", RECORDS, without, seed=0)
    assert score_gaps("qa", RECORDS, without, seed=0) == {}


def test_thresholds_know_which_way_is_better():
    found = SimpleNamespace(
        scores={"speech": {"wer": 0.2, "same_answer": 0.6}, "text": {"wer": 0.0}},
        meters={"input_kl": 1.0, "token_accuracy": float("nan")},
    )

    def missed(*pairs):
        return shortfalls([parse_threshold(pair, "asr") for pair in pairs], found)

    assert missed("wer=0.2", "same_answer=0.6", "input_kl=1", "text/wer=0") == []
    assert missed("wer=0.19") == ["missed: speech/wer <= 0.19, got 0.2"]
    assert len(missed("same_answer=0.61", "input_kl=0.9")) == 2
    assert missed("cascade/wer=0.5") == ["missed: cascade/wer <= 0.5: it was not measured"]
    assert missed("token_accuracy=0") == ["missed: token_accuracy >= 0, got nan"]


def test_unknown_thresholds_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean same_answer"):
        parse_threshold("same_anser=1", "qa")
    with pytest.raises(ValueError, match="task qa has no metric 'wer'"):
        parse_threshold("wer=1", "qa")
    with pytest.raises(ValueError, match="METRIC=NUMBER"):
        parse_threshold("wer", "asr")
    assert "input_kl" in METERS


def test_a_question_is_answered_right_if_an_accepted_text_stands_in_the_answer():
    records = [
        record("a", "x", extra={"answers": ["Paris"]}),
        record("b", "y", extra={"answers": ["art", "four"]}),
        record("c", "z", extra={"answers": ["New York"]}),
        record("d", "w", extra={"answers": ["H2O"]}),
    ]
    rows = {
        "text": Row(["It is Paris.", "Four!", "New\nyork", "h2o"], None),
        "cascade": Row(["paris", "the artist", "York New", "H2 O"], ["x"] * 4),
        "speech": Row(["", "ART", "new yorkers", "H2O is water"], ["x"] * 4),
    }
    scores = score_rows("qa", records, rows)
    assert [scores[name]["accuracy"] for name in rows] == [1.0, 0.25, 0.5]
    gaps = score_gaps("qa", records, rows, seed=0)
    assert gaps["text"]["accuracy"].difference == -0.5
    assert gaps["cascade"]["accuracy"].difference == 0.25
    bare = [record("a", "x")] * 4
    assert "accuracy" not in score_rows("qa", bare, rows)["speech"]


@pytest.mark.parametrize("answers", [None, "Paris", [], ["Paris", 3], ["Paris", " "], ["?!"]])
def test_accepted_answers_that_are_none_are_named(answers):
    extra = {} if answers is None else {"answers": answers}
    records = [record("a", "x", extra={"answers": ["x"]}), record("b", "y", extra=extra)]
    rows = {"text": Row(["x", "y"], None)}
    with pytest.raises(ValueError, match=r"record 'b': the column 'answers' must be a list"):
        score_rows("qa", records, rows)
