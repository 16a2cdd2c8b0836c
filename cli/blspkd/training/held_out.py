"""What a run looks at while it trains: held-out clips, measured and answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blspkd.data.batches import ClipDataset, Collator, batches_of
from blspkd.data.manifest import Record
from blspkd.data.turns import record_messages
from blspkd.evaluation.answers import answer_from_speech, answer_from_text
from blspkd.evaluation.meters import measure
from blspkd.evaluation.metrics import word_error_rate, word_errors
from blspkd.model.modeling import BlspKDForConditionalGeneration

EVAL_BATCH_SIZE = 16


@dataclass(frozen=True)
class HeldOut:
    """The held-out sets of a run.

    Attributes:
        sets: by name.
        collator: batches them.
        answer_limit: how many clips of each are answered.
    """

    sets: Mapping[str, ClipDataset]
    collator: Collator
    answer_limit: int

    def measure(self, model: BlspKDForConditionalGeneration) -> dict[str, float]:
        """The meters of each set, named ``SET/METER``."""
        figures = {}
        device = model.embedding_weight().device
        for name, dataset in self.sets.items():
            batches = batches_of(dataset, self.collator, EVAL_BATCH_SIZE)
            meters = measure(model, batches, device=device)
            figures.update({f"{name}/{meter}": v for meter, v in meters.figures().items()})
        return figures

    def answer(self, model: BlspKDForConditionalGeneration) -> dict[str, float]:
        """Answers to speech against answers to text, named ``SET/FIGURE``.

        ``same_answer`` is the fraction of clips with the very same answer; ``repeat_wer`` the word
        error rate, against the transcript, of those that ask for a repetition (their ``task``
        column says "repeat").
        """
        figures: dict[str, float] = {}
        for name, dataset in self.sets.items():
            records = dataset.records[: self.answer_limit]
            if not records:
                continue
            from_text, from_speech = self._answers(model, dataset, records)
            same = [a == b for a, b in zip(from_text, from_speech, strict=True)]
            figures[f"{name}/same_answer"] = sum(same) / len(same)
            repeats = [
                i for i, record in enumerate(records) if record.extra.get("task") == "repeat"
            ]
            if repeats:
                figures[f"{name}/repeat_wer"] = word_error_rate(
                    [word_errors(records[i].text, from_speech[i]) for i in repeats]
                )
        return figures

    def _answers(
        self, model: BlspKDForConditionalGeneration, dataset: ClipDataset, records: list[Record]
    ) -> tuple[list[str], list[str]]:
        processor = dataset.processor
        messages = [record_messages(record, dataset.prompt) for record in records]
        from_text = answer_from_text(
            model,
            processor,
            [one.text for one in records],
            messages,
            batch_size=EVAL_BATCH_SIZE,
        )
        from_speech = answer_from_speech(
            model, processor, records, messages, batch_size=EVAL_BATCH_SIZE
        )
        return from_text, from_speech
