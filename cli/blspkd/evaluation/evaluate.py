"""The whole evaluation: three rows of answers, their scores, the meters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blspkd.data.batches import ClipDataset, Collator, batches_of
from blspkd.data.manifest import Record
from blspkd.model.audio import MAX_DURATION, load_audio
from blspkd.model.decoding import Decoding
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .answers import (
    answer_from_speech,
    answer_from_text,
    nearest_embedding_transcripts,
)
from .bootstrap import Gap
from .cascade import Transcriber, as_written
from .conditions import Condition, hear_clean, hear_under
from .drift import ANSWERS_CHANGED, DRIFT_KL, answers_changed, measure_drift
from .gaps import score_gaps
from .languages import check_languages
from .meters import ClipMeters, measure_clips
from .tasks import (
    EvalConfig,
    Row,
    RowName,
    accepted_answers,
    references,
    score_rows,
    task_messages,
)

CLEAN = "clean"
"""The condition of clips to which nothing was done."""
StageProgress = Callable[[str, int, int], None]
"""Called with (stage, clips done, clips in all)."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        config: How it was done.
        records: The clips.
        rows: Answers and transcripts by row: "text", "cascade" (if there is a decoder), "speech".
        references: What the answers should be; None for task "qa".
        scores: Each row's metrics, see `score_rows`.
        gaps: Speech less text and speech less cascade, see `score_gaps`.
        meters: Teacher-forced figures, see `meters.py`.
        notes: What the reader must know, such as a row left out and why.
        seconds: Wall-clock time of each stage.
        condition: What the clips went through before cascade and speech heard them.
        clip_meters: The meters clip by clip.
        untouched: With plain LoRA, what the untouched language model answers to the transcripts.
    """

    config: EvalConfig
    records: list[Record]
    rows: dict[RowName, Row]
    references: list[str] | None
    scores: dict[RowName, dict[str, float]]
    gaps: dict[str, dict[str, Gap]]
    meters: dict[str, float]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    condition: str = CLEAN
    clip_meters: ClipMeters = field(default_factory=ClipMeters)
    untouched: list[str] | None = None


def select_records(records: Sequence[Record], config: EvalConfig, prompt: str) -> list[Record]:
    """Take the first so many records and check all that can be checked without any weights.

    Args:
        records: A manifest's.
        config: How they will be evaluated.
        prompt: The model's own.

    Raises:
        AudioError: A clip cannot be used.
        ValueError: A record lacks what the task needs.
    """
    chosen = list(records[: config.limit])
    references(chosen, config.task)
    accepted_answers(chosen, config.task)
    task_messages(chosen, config, prompt)
    for record in chosen:
        load_audio(record.audio, max_duration=MAX_DURATION)
    return chosen


def load_cascade(
    model: BlspKDForConditionalGeneration, reference: str | None
) -> tuple[Transcriber | None, list[str]]:
    """Load the cascade's transcriber.

    Args:
        model: The speech LLM: its encoder's checkpoint, device and dtype are the defaults.
        reference: A Whisper model, if another is wanted.

    Returns:
        The transcriber, or None and a note why there is none.

    Raises:
        ValueError: `reference` has no decoder.
    """
    weight = model.embedding_weight()
    source = reference or model.config.encoder
    transcriber = Transcriber.load(source, dtype=weight.dtype, device=weight.device)
    if transcriber is not None:
        return transcriber, []
    if reference is not None:
        raise ValueError(f"--transcriber: {reference!r} has no decoder; name a whole Whisper model")
    return None, [
        f"no cascade: {source!r} is an encoder without a decoder; --transcriber names a whole "
        "Whisper model"
    ]


def evaluate(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    records: Sequence[Record],
    config: EvalConfig,
    *,
    transcriber: Transcriber | None,
    notes: Sequence[str] = (),
    progress: StageProgress | None = None,
    condition: Condition | None = None,
    given: Mapping[RowName, Row] | None = None,
) -> Evaluation:
    """Answer all clips in three ways, and compare.

    Args:
        model: The speech LLM.
        processor: The model's.
        records: The clips, see `select_records`.
        config: How.
        transcriber: Whisper, for the row "cascade"; None leaves it out.
        notes: To be passed on to the report.
        progress: Told how far it is.
        condition: What the clips go through before cascade and speech hear them; None for nothing.
        given: Rows that are known already, such as "text", which depends on no condition.

    Raises:
        ValueError: The transcriber does not know the language of a record.
    """
    records = list(records)
    if transcriber is not None:
        check_languages(records, transcriber.model.generation_config)
    hear = hear_clean if condition is None else hear_under(condition, records)
    messages = task_messages(records, config, model.config.prompt)
    aligned = model.config.adapter_type == "cformer"
    notes = list(notes)
    seconds: dict[str, float] = {}
    stages = _Stages(progress, seconds)
    decoding = Decoding(max_new_tokens=config.max_new_tokens)

    def from_text(stage: str, transcripts: list[str]) -> Row:
        answers = answer_from_text(
            model,
            processor,
            transcripts,
            messages,
            decoding=decoding,
            batch_size=config.batch_size,
            progress=stages.start(stage),
        )
        return Row(answers, transcripts)

    rows: dict[RowName, Row] = dict(given or {})
    if "text" not in rows:
        rows["text"] = from_text("text", [r.text for r in records])
    if transcriber is not None and "cascade" not in rows:
        heard = transcriber.transcribe(
            records, progress=stages.start("cascade: transcribing"), hear=hear
        )
        read = from_text("cascade: answering", as_written(heard, records))
        rows["cascade"] = Row(read.answers, heard)
    spoken = answer_from_speech(
        model,
        processor,
        records,
        messages,
        decoding=decoding,
        batch_size=config.batch_size,
        progress=stages.start("speech"),
        hear=hear,
    )
    nearest = None
    if aligned:
        nearest = nearest_embedding_transcripts(
            model,
            processor,
            records,
            batch_size=config.batch_size,
            progress=stages.start("nearest embeddings"),
            hear=hear,
        )
    else:
        notes.append("no transcripts from the adapter: it does not make one output per token")
    rows["speech"] = Row(spoken, nearest)
    # with the prompts that the recorded responses were written for, whatever this task asks
    dataset = ClipDataset(records, processor, prompt=model.config.prompt, hear=hear)
    collator = Collator(processor, full_window=model.config.full_window)
    device = model.embedding_weight().device

    def batches(stage: str) -> Iterator[Mapping[str, Any]]:
        found = batches_of(dataset, collator, config.batch_size)
        return _counted(found, len(records), stages.start(stage))

    clip_meters = measure_clips(model, batches("meters"), device=device)
    meters = clip_meters.means().figures()
    untouched = None
    if model.config.plain_lora:
        drift = measure_drift(model, batches("drift"), device=device)
        clip_meters.parts.update(drift.parts)
        meters[DRIFT_KL] = drift.mean(DRIFT_KL) or 0.0
        with model.untouched():
            untouched = from_text("untouched", [r.text for r in records]).answers
        meters[ANSWERS_CHANGED] = answers_changed(rows["text"].answers, untouched)
        notes.append("plain LoRA: text and cascade are answered by the adapted language model")
    stages.stop()
    answered = sum(record.response is not None for record in records)
    if answered < len(records):
        notes.append(
            f"the meters of responses cover the {answered} of {len(records)} "
            "clips whose response is known"
        )
    return Evaluation(
        config=config,
        records=records,
        rows=rows,
        references=references(records, config.task),
        scores=score_rows(config.task, records, rows),
        gaps=score_gaps(config.task, records, rows, seed=config.seed),
        meters=meters,
        notes=notes,
        seconds=seconds,
        condition=CLEAN if condition is None else condition.name,
        clip_meters=clip_meters,
        untouched=untouched,
    )


def _counted(
    batches: Iterable[Mapping[str, Any]], total: int, progress: Callable[[int, int], None]
) -> Iterator[Mapping[str, Any]]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch["input_ids"])
        progress(done, total)


class _Stages:
    """Names and times one stage after the other."""

    def __init__(self, progress: StageProgress | None, seconds: dict[str, float]) -> None:
        self.progress = progress
        self.seconds = seconds
        self.name: str | None = None
        self.began = 0.0

    def start(self, name: str) -> Callable[[int, int], None]:
        self.stop()
        self.name, self.began = name, time.perf_counter()

        def advance(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        return advance

    def stop(self) -> None:
        if self.name is not None:
            self.seconds[self.name] = time.perf_counter() - self.began
        self.name = None
