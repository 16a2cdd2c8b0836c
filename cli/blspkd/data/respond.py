"""The language model's own answers to the transcripts: what speech is to be answered with.

Written ahead of training (arXiv 2405.19041, sec. 3.1), greedily, and a line at a time, so that an
interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blspkd.model.decoding import Decoding, check_length
from blspkd.model.processing import BlspKDProcessor, TokenizedTurn

from .manifest import Record, format_record, parse_line, read_lines
from .turns import record_messages


@dataclass(frozen=True)
class RespondConfig:
    """How the responses are written.

    Attributes:
        prompt: of records without messages of their own.
        max_new_tokens: a longer response is cut off there, and marked as not finished.
        batch_size: transcripts answered at once.
    """

    prompt: str
    max_new_tokens: int = 48
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def answered(path: Path) -> list[Record]:
    """What an earlier run left in ``path``; a last line that was cut off is removed from the file.

    Raises:
        ManifestError: if any other line is broken.
    """
    if not path.exists():
        return []
    written = path.read_bytes()
    # the writer ends every line; what follows the last end is not whole, maybe not even UTF-8
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        os.truncate(path, whole)
    return [
        parse_line(line, path=path, number=number, check_audio=False)
        for number, line in enumerate(read_lines(path), start=1)
        if line.strip()
    ]


def respond(
    records: Sequence[Record],
    out: Path,
    model: PreTrainedModel,
    processor: BlspKDProcessor,
    config: RespondConfig,
    *,
    anew: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Append each record, with the language model's response, to ``out``.

    Args:
        records: those that ``out`` has already, by id, are passed over.
        out: a manifest, appended to and flushed after every batch.
        model: a causal LM.
        processor: its processor.
        config: how.
        anew: write ``out`` from its beginning, whatever it holds.
        progress: told (clips done, clips to do).

    Returns:
        How many responses were written.

    Raises:
        ValueError: The language model does not read as many tokens as the longest conversation and
            its response may have; nothing is written then.
    """
    done = set() if anew else {record.id for record in answered(out)}
    todo = [record for record in records if record.id not in done]
    turns = [
        processor.tokenize_turn(record_messages(record, config.prompt), record.text)
        for record in todo
    ]
    longest = max((len(turn.input_ids) for turn in turns), default=0)
    check_length(model.config, longest, config.max_new_tokens)
    if anew:
        out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with out.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), config.batch_size):
            part = slice(start, start + config.batch_size)
            answers = _answers(turns[part], model, processor, config)
            for record, (text, finished) in zip(todo[part], answers, strict=True):
                complete = dataclasses.replace(record, response=text, response_finished=finished)
                file.write(format_record(complete, folder=out.parent) + "\n")
            file.flush()
            written += len(turns[part])
            if progress is not None:
                progress(written, len(todo))
    return written


@torch.no_grad()
def _answers(
    turns: Sequence[TokenizedTurn],
    model: Any,
    processor: BlspKDProcessor,
    config: RespondConfig,
) -> Iterator[tuple[str, bool]]:
    """Each turn's response, and whether it came to its end."""
    batch = processor.pad_turns(turns, padding_side="left")
    device = next(model.parameters()).device
    tokens: Tensor = model.generate(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].long().to(device),
        **Decoding(max_new_tokens=config.max_new_tokens).options(processor),
    )
    new = tokens[:, batch["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    end_ids = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=device)
    finished = torch.isin(new, end_ids).any(dim=1).tolist()
    yield from zip(processor.decode_responses(new), finished, strict=True)
