"""What is asked of the model, and how its three rows of answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from blspkd.data.manifest import Record
from blspkd.data.turns import record_messages
from blspkd.model.configuration import DEFAULT_PROMPT
from blspkd.model.prompts import PLACEHOLDER, Messages, as_messages, check_prompt

from . import metrics

Task = Literal["asr", "continue", "st", "qa"]
RowName = Literal["text", "cascade", "speech"]
ROWS: tuple[RowName, ...] = get_args(RowName)

ASR_PROMPT = f"Repeat the following sentence word for word: {PLACEHOLDER}"
CONTINUE_PROMPT = DEFAULT_PROMPT
ST_PROMPT = "Translate the following sentence into {language}: " + PLACEHOLDER

OWN_METRICS: dict[Task, tuple[str, ...]] = {
    "asr": ("wer",),
    "continue": (),
    "st": ("bleu", "chrf"),
    "qa": ("accuracy",),
}
"""Metrics of each task's answers against its references."""
SELF_METRICS = ("self_bleu", "self_rouge_l", "same_answer")
"""Metrics of a row's answers against the answers to the true transcripts."""
LOWER_IS_BETTER = ("wer", "transcript_wer", "input_kl", "response_kl")


@dataclass(frozen=True)
class EvalConfig:
    """How a model is evaluated.

    Attributes:
        task: "asr" repeats, "continue" goes on in its own words (the paper's task), "st"
            translates, "qa" answers.
        prompt: The user turn, with `{speech}` in it, for all records; None leaves each record its
            own messages, and those without any the task's prompt.
        limit: Only the first so many records.
        batch_size: Clips at a time; it changes no answer.
        max_new_tokens: How long an answer may be.
        seed: Of the bootstrap.
        plots: How many clips are drawn.
    """

    task: Task
    prompt: str | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64
    seed: int = 0
    plots: int = 4

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated."""
        if self.task not in get_args(Task):
            raise ValueError(f"task: expected one of {', '.join(get_args(Task))}, got {self.task}")
        if self.prompt is not None:
            check_prompt(self.prompt)
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.plots < 0:
            raise ValueError(f"plots: expected at least 0, got {self.plots}")


@dataclass(frozen=True)
class Row:
    """One way of answering the clips.

    Attributes:
        answers: One for each clip.
        transcripts: What was recognised: the true text, Whisper's, or the nearest embeddings';
            None where there is no such thing.
    """

    answers: list[str]
    transcripts: list[str] | None


def task_messages(records: Sequence[Record], config: EvalConfig, prompt: str) -> list[Messages]:
    """The chat around each clip.

    Args:
        records: The clips.
        config: Task and, above all else, its prompt.
        prompt: What questions are asked with where nothing else says it: the model's own prompt.

    Raises:
        ValueError: A record of task "st" does not say into which language.
    """
    chats = []
    for record in records:
        if config.prompt is not None:
            chats.append(as_messages(config.prompt))
        elif record.messages is not None or config.task == "qa":
            chats.append(record_messages(record, prompt))
        elif config.task == "asr":
            chats.append(as_messages(ASR_PROMPT))
        elif config.task == "continue":
            chats.append(as_messages(CONTINUE_PROMPT))
        else:
            chats.append(as_messages(ST_PROMPT.replace("{language}", _target_language(record))))
    return chats


def _target_language(record: Record) -> str:
    language = record.extra.get("translation_lang")
    if not isinstance(language, str) or not language:
        raise ValueError(
            f"record {record.id!r}: task st must know the language to translate into: give "
            "--prompt, or the column 'translation_lang', or 'messages'"
        )
    return LANGUAGES.get(language.lower(), language).title()


def references(records: Sequence[Record], task: Task) -> list[str] | None:
    """What the answers should be; None where the model's own answers say it.

    Raises:
        ValueError: Task "st", and a record has no translation.
    """
    if task == "asr":
        return [record.text for record in records]
    if task in ("qa", "continue"):
        return None
    translations = []
    for record in records:
        translation = record.extra.get("translation")
        if not isinstance(translation, str) or not translation.strip():
            raise ValueError(
                f"record {record.id!r}: task st compares with the column 'translation', a text, "
                f"got {translation!r}; add it to the manifest"
            )
        translations.append(translation)
    return translations


def accepted_answers(records: Sequence[Record], task: Task) -> list[list[str]] | None:
    """What an answer to each question must have in it; None outside task "qa", or if none says so.

    Raises:
        ValueError: Some records have the column `answers` and others lack it, or it is no list of
            texts.
    """
    if task != "qa" or not any("answers" in record.extra for record in records):
        return None
    found = []
    for record in records:
        answers = record.extra.get("answers")
        listed = answers if isinstance(answers, list) else []
        texts = [one for one in listed if isinstance(one, str) and metrics.normalize(one, "any")]
        if not texts or len(texts) < len(listed):
            raise ValueError(
                f"record {record.id!r}: the column 'answers' must be a list of texts, one of which "
                f"a right answer has in it; got {answers!r}"
            )
        found.append(texts)
    return found


def score_rows(
    task: Task, records: Sequence[Record], rows: Mapping[RowName, Row]
) -> dict[RowName, dict[str, float]]:
    """Score each row.

    Returns:
        For each row, by name: `wer` (0..; of the repeated sentence), or `bleu` and `chrf`
        (0..100), or `accuracy` (0..1; where the records have `answers`); `transcript_wer` (0..);
        `self_bleu` (0..100), `self_rouge_l` and `same_answer` (0..1), which compare with the row
        "text".
    """
    expected = references(records, task)
    accepted = accepted_answers(records, task)
    own_answers = rows["text"].answers
    scores: dict[RowName, dict[str, float]] = {}
    for name, row in rows.items():
        score: dict[str, float] = {}
        if task == "asr":
            score["wer"] = _wer(records, row.answers)
        elif expected is not None:
            score["bleu"] = metrics.bleu(expected, row.answers)
            score["chrf"] = metrics.chrf(expected, row.answers)
        elif accepted is not None:
            score["accuracy"] = sum(right_answers(accepted, row.answers)) / len(records)
        if row.transcripts is not None and name != "text":
            score["transcript_wer"] = _wer(records, row.transcripts)
        score["self_bleu"] = metrics.bleu(own_answers, row.answers)
        score["self_rouge_l"] = metrics.mean_rouge_l(own_answers, row.answers)
        score["same_answer"] = metrics.same_rate(own_answers, row.answers)
        scores[name] = score
    return scores


def right_answers(accepted: Sequence[Sequence[str]], answers: Sequence[str]) -> list[bool]:
    """Which answers have one of their accepted texts in them."""
    pairs = zip(accepted, answers, strict=True)
    return [metrics.contains_answer(right, answer) for right, answer in pairs]


def _wer(records: Sequence[Record], texts: Sequence[str]) -> float:
    return metrics.word_error_rate(metrics.each_word_errors(records, texts))
