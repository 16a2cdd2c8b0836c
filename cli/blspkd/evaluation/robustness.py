"""One evaluation under several conditions, and what is made of clips without speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blspkd.data.manifest import Record
from blspkd.model.decoding import Decoding
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .cascade import Transcriber
from .conditions import Condition
from .evaluate import Evaluation, StageProgress, evaluate
from .nothing import NothingHeard, hear_out_nothing
from .tables import lined_up
from .tasks import EvalConfig

SHOWN = ("transcript_wer", "self_rouge_l", "same_answer")
"""Metrics of cascade and speech that are shown by condition."""


@dataclass(frozen=True)
class Robustness:
    """What was found under each condition.

    Attributes:
        clean: The clips as they are.
        conditions: Under each condition, by its name.
        nothing: What was made of clips without speech; None if that was not asked for.
    """

    clean: Evaluation
    conditions: dict[str, Evaluation]
    nothing: NothingHeard | None = None

    def by_condition(self) -> dict[str, Evaluation]:
        """All of them, the clips as they are first."""
        return {self.clean.condition: self.clean, **self.conditions}


def evaluate_conditions(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    records: Sequence[Record],
    config: EvalConfig,
    conditions: Sequence[Condition],
    *,
    transcriber: Transcriber | None,
    no_speech: int = 0,
    notes: Sequence[str] = (),
    progress: StageProgress | None = None,
) -> Robustness:
    """Evaluate clips as they are, and then under each condition; the row "text" is made once.

    Args:
        model: The speech LLM.
        processor: The model's.
        records: The clips, see `select_records`.
        config: How.
        conditions: What the clips go through.
        transcriber: Whisper, for the row "cascade"; None leaves it out.
        no_speech: How many clips of each kind without speech.
        notes: To be passed on to the report.
        progress: Told how far it is.
    """
    clean = evaluate(
        model, processor, records, config, transcriber=transcriber, notes=notes, progress=progress
    )
    found = {}
    for condition in conditions:

        def advance(stage: str, done: int, total: int, name: str = condition.name) -> None:
            if progress is not None:
                progress(f"{name}: {stage}", done, total)

        found[condition.name] = evaluate(
            model,
            processor,
            records,
            config,
            transcriber=transcriber,
            progress=advance,
            condition=condition,
            given={"text": clean.rows["text"]},
        )
    nothing = None
    if no_speech:
        nothing = hear_out_nothing(
            model,
            processor,
            prompt=config.prompt or model.config.prompt,
            count=no_speech,
            transcriber=transcriber,
            decoding=Decoding(max_new_tokens=config.max_new_tokens),
            batch_size=config.batch_size,
        )
    return Robustness(clean, found, nothing)


def condition_cells(robustness: Robustness) -> list[list[str]]:
    """Header and body of the table by condition; empty if there was only one."""
    if not robustness.conditions:
        return []
    cells = [["condition", "row", *(name.replace("_", " ") for name in SHOWN), "input kl"]]
    for name, found in robustness.by_condition().items():
        for row in ("cascade", "speech"):
            scores = {str(one): score for one, score in found.scores.items()}.get(row)
            if scores is None:
                continue
            kl = found.meters.get("input_kl") if row == "speech" else None
            values = [*(scores.get(metric) for metric in SHOWN), kl]
            cells.append([name, row, *("-" if v is None else f"{v:.3f}" for v in values)])
    return cells


def nothing_cells(nothing: NothingHeard | None) -> list[list[str]]:
    """Header and body of the table of clips without speech; empty if there were none."""
    if nothing is None:
        return []
    cells = [["no speech but", "row", "clips", "pretends %", "words", "answer differs %"]]
    for row, by_kind in nothing.found.items():
        for kind, one in by_kind.items():
            pretends = "-" if one.pretends is None else f"{100 * one.pretends:.0f}"
            words = "-" if one.words is None else f"{one.words:.1f}"
            differs = f"{100 * one.answers_differ:.0f}"
            cells.append([kind, row, str(one.clips), pretends, words, differs])
    return cells


def condition_lines(robustness: Robustness) -> str:
    """The table by condition as lines of text; empty if there was only one."""
    return lined_up(condition_cells(robustness), left=2)


def nothing_lines(nothing: NothingHeard | None) -> str:
    """The table of clips without speech as lines of text; empty if there were none."""
    return lined_up(nothing_cells(nothing), left=2)
