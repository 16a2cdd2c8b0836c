"""Whether a Whisper model can write down what is spoken in a manifest's languages."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig

from blspkd.data.languages import language_code
from blspkd.data.manifest import Record


def check_languages(records: Sequence[Record], generation_config: GenerationConfig) -> None:
    """Refuse a language that Whisper would refuse only when it comes to that record.

    Args:
        records: The clips; one without a language counts as English.
        generation_config: A Whisper model's. One that is not multilingual asks for no language.

    Raises:
        ValueError: The model does not know a record's language.
    """
    if not getattr(generation_config, "is_multilingual", False):
        return
    known = getattr(generation_config, "lang_to_id", {})
    for record in records:
        if f"<|{language_code(record.lang)}|>" not in known:
            names = ", ".join(sorted(token.strip("<|>") for token in known))
            raise ValueError(
                f"record {record.id!r}: lang: expected a language that the cascade's Whisper model "
                f"knows ({names}), got {record.lang!r}; correct it, or name another model with "
                "--transcriber"
            )
