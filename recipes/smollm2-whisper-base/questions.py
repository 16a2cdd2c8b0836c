"""Speak the questions of questions.tsv: a manifest for `blspkd eval --task qa`.

    python recipes/smollm2-whisper-base/questions.py real
    blspkd eval RUN real/questions.jsonl --task qa

Each line of questions.tsv is a question as a recogniser writes it, a tab, and what a right answer
has in it, by `|`. The user turn is the question alone. The clips are spoken as `speak.py` speaks,
and lie beside its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from speak import DEFAULT_VOICES, Clip, speak  # noqa: E402  # it lies in the folder above
from voices import check_voices  # noqa: E402


def read_questions(path: Path) -> list[tuple[str, list[str]]]:
    """Questions and the texts, one of which a right answer has in it.

    Raises:
        ValueError: A line has no answer.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        question, _, answers = line.partition("\t")
        accepted = [answer.strip() for answer in answers.split("|") if answer.strip()]
        if not question.strip() or not accepted:
            raise ValueError(f"{path}:{number}: expected QUESTION<tab>ANSWER|ANSWER, got {line!r}")
        questions.append((question.strip(), accepted))
    return questions


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--questions",
    default=HERE / "questions.tsv",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--voices", default=",".join(DEFAULT_VOICES), help="Comma-separated, taken in turn.")
def main(out: Path, questions: Path, voices: str) -> None:
    """Speak the questions into the folder OUT, and write OUT/questions.jsonl."""
    cast = [voice.strip() for voice in voices.split(",") if voice.strip()]
    check_voices(cast)
    lines = []
    for index, (question, accepted) in enumerate(read_questions(questions)):
        clip = Clip(question, question, cast[index % len(cast)], rate=1.0, pitch=1.0)
        row = {
            "audio": clip.path.as_posix(),
            "text": question,
            "id": clip.id,
            "duration": round(speak(clip, out), 3),
            "voice": clip.voice,
            "answers": accepted,
            "messages": [{"role": "user", "content": "{speech}"}],
        }
        lines.append(json.dumps(row) + "\n")
    (out / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    click.echo(f"{out / 'questions.jsonl'}: {len(lines)} questions")


if __name__ == "__main__":
    main()
