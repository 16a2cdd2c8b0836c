"""What somebody said or answered, as token ids: text in which nothing is a special token."""

from __future__ import annotations

from typing import Any

_WORD = "a"  # one that stands before another


def literal_ids(tokenizer: Any, text: str, *, behind_a_word: bool) -> tuple[list[int], list[int]]:
    """Token ids of a text.

    Args:
        tokenizer: the language model's.
        text: without spaces around it.
        behind_a_word: with the space that parts it from a word before it. Some tokenizers (Llama's)
            begin every text with a space of their own, which would be a second one.

    Returns:
        The ids, and for each where its token ends, in characters of ``text``; a tokenizer without
        a fast implementation cannot tell, and there are no ends.
    """
    if not text:
        return [], []
    if behind_a_word:
        ids, ends = _encode(tokenizer, f"{_WORD} {text}")
        word, _ = _encode(tokenizer, _WORD)
        if ids[: len(word)] == word:
            before = len(_WORD) + 1
            return ids[len(word) :], [max(0, end - before) for end in ends[len(word) :]]
        text = f" {text}"
    ids, ends = _encode(tokenizer, text)
    return ids, [max(0, end - behind_a_word) for end in ends]


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    fast = tokenizer.is_fast
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=fast
    )
    ends = [end for _, end in encoded["offset_mapping"]] if fast else []
    return encoded["input_ids"], ends
