"""The languages of manifests and the tokens by which Whisper knows them."""

from __future__ import annotations

from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE


def language_code(lang: str | None) -> str:
    """Whisper's code of a language; English if none is told.

    Args:
        lang: A code, a name in English, a tag with a region as Common Voice has it ("zh-CN"), or
            Whisper's own token ("<|zh|>").

    Returns:
        A code, maybe of a language that no Whisper model knows.
    """
    language = (lang or "en").strip().strip("<|>").lower()
    primary = language.replace("_", "-").partition("-")[0]
    return TO_LANGUAGE_CODE.get(language) or TO_LANGUAGE_CODE.get(primary, primary)
