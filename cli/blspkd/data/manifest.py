"""Manifests: jsonl files with one spoken clip a line.

Fields: `audio` (path, relative to the manifest's folder or absolute), `text` (the transcript),
and optionally `id`, `duration` (seconds), `response` (what the LLM wrote for the transcript),
`response_finished` (whether it ended by itself), `messages` (the chat around the speech), `lang`.
Unknown columns are kept as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPEECH_PLACEHOLDER = "{speech}"
"""Where in a chat message the speech (or its transcript) goes."""

_TYPES: dict[str, tuple[type, ...]] = {
    "audio": (str,),
    "text": (str,),
    "id": (str,),
    "duration": (int, float),
    "response": (str,),
    "response_finished": (bool,),
    "messages": (list,),
    "lang": (str,),
}
_JSON_NAMES = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names file, line, field and remedy.

    Attributes:
        reason: The kind of fault in a few words, such as "broken line".
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """One clip of a manifest.

    Attributes:
        audio: The sound file, resolved against the manifest's folder.
        text: The transcript.
        id: A name that is unique in the manifest.
        duration: Seconds, where known.
        response: What the LLM answered to the transcript.
        response_finished: Whether the response ended by itself; False where it was cut off at
            the token limit, so that no end-of-turn may be learnt from it.
        messages: The chat around the speech: `{"role": ..., "content": ...}` each, exactly one
            content with the placeholder `{speech}` in it, once.
        lang: The language of the speech.
        extra: Columns that this program does not know, kept as they were.
    """

    audio: Path
    text: str
    id: str
    duration: float | None = None
    response: str | None = None
    response_finished: bool | None = None
    messages: list[dict[str, str]] | None = None
    lang: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_manifest(
    path: str | os.PathLike[str],
    *,
    require: Sequence[str] = ("audio", "text"),
    check_audio: bool = True,
) -> list[Record]:
    """Read a manifest and check every line of it.

    Args:
        path: The jsonl file.
        require: Fields that every line must have; a required string must not be blank.
        check_audio: Whether each audio file must exist.

    Returns:
        The records in the order of the lines (blank lines are skipped).

    Raises:
        ManifestError: The file is missing or empty, or a line is broken; the first fault found.
    """
    path = Path(path)
    records: list[Record] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        record = parse_line(
            line, path=path, number=number, require=require, check_audio=check_audio
        )
        if record.id in first_line:
            raise ManifestError(
                f"{path}:{number}: field 'id': {record.id!r} already stands in line "
                f"{first_line[record.id]}; make the ids unique or leave them out",
                reason="duplicate id",
            )
        first_line[record.id] = number
        records.append(record)
    if not records:
        raise ManifestError(
            f"{path}: the manifest is empty; expected one json object a line", reason="empty"
        )
    return records


def read_lines(path: Path) -> list[str]:
    """Read the lines of a manifest.

    Raises:
        ManifestError: The file is missing, a folder or not UTF-8 text.
    """
    if not path.is_file():
        what = "is a folder, expected a jsonl file" if path.is_dir() else "no such manifest"
        raise ManifestError(f"{path}: {what}; `blspkd prepare` makes a manifest", reason="missing")
    try:
        # not splitlines(): that also breaks at characters which json leaves unescaped
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); expected one json "
            "object a line",
            reason="not text",
        ) from error


def parse_line(
    line: str,
    *,
    path: Path,
    number: int,
    require: Sequence[str] = ("audio", "text"),
    check_audio: bool = True,
) -> Record:
    """Read one line of a manifest.

    Args:
        line: The json object.
        path: The manifest, for messages and to resolve relative audio paths.
        number: The line's number, from 1.
        require: As in `read_manifest`.
        check_audio: As in `read_manifest`.

    Raises:
        ManifestError: The line is no json object, or a field is missing or wrong.
    """
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{where}: broken json at column {error.colno} ({error.msg}); expected one object a "
            "line",
            reason="broken line",
        ) from error
    if not isinstance(row, dict):
        raise ManifestError(
            f"{where}: expected a json object, got {_JSON_NAMES[type(row)]}", reason="broken line"
        )
    values = _checked_fields(row, where, require)
    audio = path.parent / values.pop("audio", "")
    if check_audio and "audio" in require and not audio.is_file():
        raise ManifestError(
            f"{where}: field 'audio': no such file: {audio}; paths are relative to the "
            "manifest's folder",
            reason="missing",
        )
    values.setdefault("id", f"{audio.stem}-{number}")
    values.setdefault("text", "")
    extra = {key: value for key, value in row.items() if key not in _TYPES}
    return Record(audio=audio, extra=extra, **values)


def _checked_fields(row: dict[str, Any], where: str, require: Sequence[str]) -> dict[str, Any]:
    for name in require:
        if row.get(name) is None:
            have = ", ".join(sorted(row)) or "none"
            raise ManifestError(
                f"{where}: field {name!r} is missing (fields here: {have}); add it",
                reason="missing field",
            )
    values: dict[str, Any] = {}
    for name, types in _TYPES.items():
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ManifestError(
                f"{where}: field {name!r}: expected {_JSON_NAMES[types[0]]}, got "
                f"{_JSON_NAMES[type(value)]} ({json.dumps(value)[:40]})",
                reason="wrong type",
            )
        if name in require and isinstance(value, str) and not value.strip():
            noun = "transcript" if name == "text" else name
            raise ManifestError(
                f"{where}: field {name!r} is empty; fill it or leave the line out",
                reason=f"empty {noun}",
            )
        values[name] = value
    if "id" in values and not values["id"].strip():
        del values["id"]
    if "duration" in values:
        duration = values["duration"] = float(values["duration"])
        if not (math.isfinite(duration) and duration > 0):
            raise ManifestError(
                f"{where}: field 'duration': expected seconds above 0, got {duration:g}; "
                "`blspkd prepare` measures it",
                reason="wrong value",
            )
    if "messages" in values:
        _check_messages(values["messages"], where)
    return values


def _check_messages(messages: list[Any], where: str) -> None:
    places = 0
    for index, message in enumerate(messages):
        good = (
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(value, str) for value in message.values())
        )
        if not good:
            raise ManifestError(
                f"{where}: field 'messages': item {index}: expected an object with the strings "
                f"'role' and 'content', got {json.dumps(message)[:60]}",
                reason="wrong value",
            )
        places += message["content"].count(SPEECH_PLACEHOLDER)
    if places != 1:
        raise ManifestError(
            f"{where}: field 'messages': expected the placeholder {SPEECH_PLACEHOLDER} exactly "
            f"once over all contents, got it {places} times",
            reason="wrong value",
        )


def write_manifest(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write a manifest in one step: a reader finds the old file or the new, never half of one.

    Audio below the manifest's folder is written relative to it, other audio by its absolute
    path. Fields that are None are left out; columns of `extra` come last.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(format_record(record, folder=path.parent) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def format_record(record: Record, *, folder: Path) -> str:
    """Write one record as a line of json (without the line's end), for a manifest in `folder`."""
    audio, home = record.audio.absolute(), folder.absolute()
    if not audio.is_relative_to(home):
        audio, home = audio.resolve(), home.resolve()  # "..", links
    row: dict[str, Any] = {
        "audio": (audio.relative_to(home) if audio.is_relative_to(home) else audio).as_posix()
    }
    for name in _TYPES:
        value = getattr(record, name)
        if name != "audio" and value is not None:
            row[name] = value
    return json.dumps({**row, **record.extra}, ensure_ascii=False)
