"""What all runs of a matrix have in common: the answers to text, and the cascade's.

The language model is frozen and PLoRA leaves text alone, so both are made once and kept beside the
result files. With plain LoRA a run has its own; what Whisper heard is shared even then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blspkd.data.manifest import Record
from blspkd.evaluation.answers import answer_from_text
from blspkd.evaluation.cascade import FALLBACK, Transcriber, as_written
from blspkd.evaluation.conditions import Condition, hear_clean, hear_under
from blspkd.evaluation.evaluate import CLEAN
from blspkd.evaluation.tasks import EvalConfig, Row, RowName, task_messages
from blspkd.model.decoding import Decoding
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

NAME = "text-and-cascade.json"


def compact(value: Any, depth: int = 0) -> str:
    """JSON with an indented line for each entry of an object, and lists on one line.

    Numbers have five significant digits, which is more than any of them is sure to.
    """
    if isinstance(value, dict) and value:
        pad = " " * (depth + 1)
        lines = [f"{pad}{json.dumps(str(k))}: {compact(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
    return json.dumps(_rounded(value), ensure_ascii=False, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.5g}")
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value


def write(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(compact(value) + "\n", encoding="utf-8")
    unfinished.replace(path)


@dataclass
class Listener:
    """A trained model, and a recogniser for the cascade if there is one.

    Attributes:
        model: The speech LLM.
        processor: The model's.
        transcriber: Whisper; None for no cascade.
    """

    model: BlspKDForConditionalGeneration
    processor: BlspKDProcessor
    transcriber: Transcriber | None


def made_with(listener: Listener, dtype: str, max_new_tokens: int) -> dict[str, Any]:
    """What common answers depend on: parts, arithmetic, and how is listened and answered."""
    config = listener.model.config
    found = {
        "encoder": config.encoder_fingerprint,
        "language_model": config.language_model_fingerprint,
        "dtype": dtype,
        "prompt": config.prompt,
        "max_new_tokens": max_new_tokens,
    }
    if listener.transcriber is not None:
        found["cascade"] = {key: json.loads(json.dumps(how)) for key, how in FALLBACK.items()}
    return found


class Shared:
    """The file of common answers.

    Args:
        folder: Of the result files.
        made_with: Whose answers they are: parts and options.

    Raises:
        ValueError: The file holds answers that were made otherwise.
    """

    def __init__(self, folder: Path, made_with: dict[str, Any]) -> None:
        self.path = folder / NAME
        self.entries: dict[str, dict[str, list[str]]] = {}
        self.made_with = made_with
        if self.path.exists():
            found = json.loads(self.path.read_text("utf-8"))
            if found["made_with"] != made_with:
                raise ValueError(
                    f"{self.path} was made with {found['made_with']}, not with {made_with}: use "
                    "another --results folder, or delete the file and every result beside it"
                )
            self.entries = found["entries"]

    def rows(
        self,
        listener: Listener,
        name: str,
        records: Sequence[Record],
        config: EvalConfig,
        condition: Condition | None = None,
    ) -> dict[RowName, Row]:
        """The rows "text" and "cascade" of a set, of the untouched language model.

        Args:
            listener: Makes them if they are not there yet.
            name: The set's.
            records: Its clips.
            config: Task and options.
            condition: What the clips go through before Whisper hears them.
        """
        model, processor = listener.model, listener.processor
        messages = task_messages(records, config, model.config.prompt)
        options = {
            "decoding": Decoding(max_new_tokens=config.max_new_tokens),
            "batch_size": config.batch_size,
        }
        texts = [record.text for record in records]
        key = f"{name}, {config.task}"
        if self._lacks(key, records):
            with model.untouched():
                answers = answer_from_text(model, processor, texts, messages, **options)
            self._keep(key, records, {"answers": answers})
        rows: dict[RowName, Row] = {"text": Row(self._of(key, "answers", records), texts)}
        if listener.transcriber is None:
            return rows
        heard = self.heard(listener, name, records, condition)
        key += f", {_sound(condition)}"
        if self._lacks(key, records):
            with model.untouched():
                read = as_written(heard, records)
                answers = answer_from_text(model, processor, read, messages, **options)
            self._keep(key, records, {"answers": answers})
        rows["cascade"] = Row(self._of(key, "answers", records), heard)
        return rows

    def heard(
        self,
        listener: Listener,
        name: str,
        records: Sequence[Record],
        condition: Condition | None = None,
    ) -> list[str]:
        """What Whisper hears of a set, whatever is then asked.

        Args:
            listener: Its recogniser, for what is not there yet.
            name: The set's.
            records: Its clips.
            condition: What they go through before.
        """
        assert listener.transcriber is not None
        key = f"{name}, {_sound(condition)}"
        if self._lacks(key, records):
            hear = hear_clean if condition is None else hear_under(condition, records)
            found = listener.transcriber.transcribe(records, hear=hear)
            self._keep(key, records, {"heard": found})
        return self._of(key, "heard", records)

    def _lacks(self, key: str, records: Sequence[Record]) -> bool:
        known = set(self.entries.get(key, {}).get("ids", []))
        return not all(record.id in known for record in records)

    def _keep(self, key: str, records: Sequence[Record], texts: dict[str, list[str]]) -> None:
        self.entries[key] = {"ids": [record.id for record in records], **texts}
        write(self.path, {"made_with": self.made_with, "entries": self.entries})

    def _of(self, key: str, kind: str, records: Sequence[Record]) -> list[str]:
        entry = self.entries[key]
        by_id = dict(zip(entry["ids"], entry[kind], strict=True))
        return [by_id[record.id] for record in records]


def _sound(condition: Condition | None) -> str:
    return CLEAN if condition is None else condition.name


def adapted_rows(
    listener: Listener, records: Sequence[Record], config: EvalConfig, shared: dict[RowName, Row]
) -> dict[RowName, Row]:
    """The rows of a run whose LoRA acts on text too: its own answers to what Whisper heard."""
    if "cascade" not in shared:
        return {}
    model = listener.model
    heard = shared["cascade"].transcripts
    assert heard is not None
    answers = answer_from_text(
        model,
        listener.processor,
        as_written(heard, records),
        task_messages(records, config, model.config.prompt),
        decoding=Decoding(max_new_tokens=config.max_new_tokens),
        batch_size=config.batch_size,
    )
    return {"cascade": Row(answers, heard)}
