"""Which languages the cascade is asked for, by the rules of Whisper's own `generate`."""

from pathlib import Path

import pytest
from transformers import GenerationConfig

from blspkd.data.manifest import Record
from blspkd.evaluation.languages import check_languages

KNOWN = GenerationConfig(is_multilingual=True, lang_to_id={"<|en|>": 1, "<|de|>": 2})


def spoken(lang):
    return [Record(audio=Path("a.wav"), text="x", id="a", lang=lang)]


@pytest.mark.parametrize("lang", [None, "en", "EN", "de", "German", "<|de|>", "en-US", "de_AT"])
def test_code_name_token_and_region_are_known(lang):
    check_languages(spoken(lang), KNOWN)


@pytest.mark.parametrize("lang", ["xx", "fr", "fr-CA", "klingon"])
def test_an_unknown_language_is_named(lang):
    with pytest.raises(ValueError, match=rf"record 'a': lang: .*\(de, en\), got '{lang}'"):
        check_languages(spoken(lang), KNOWN)


def test_a_model_of_one_language_is_asked_for_none():
    check_languages(spoken("xx"), GenerationConfig(is_multilingual=False))
