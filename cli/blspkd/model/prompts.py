"""The chat around an utterance: where the speech goes, and what a chat template adds."""

from __future__ import annotations

from typing import Any

PLACEHOLDER = "{speech}"
Messages = list[dict[str, str]]

_ANSWER = "an answer"


def as_messages(prompt: str) -> Messages:
    """A single user turn that says ``prompt``, which contains ``{speech}``."""
    return [{"role": "user", "content": prompt}]


def check_prompt(prompt: str) -> None:
    """Refuse a user turn that does not say, once, where the speech goes.

    Raises:
        ValueError: it has ``{speech}`` in it never, or twice.
    """
    if prompt.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"prompt: expected {PLACEHOLDER} exactly once, where the speech goes; got {prompt!r}"
        )


def render(tokenizer: Any, messages: Messages) -> tuple[str, str]:
    """The chat template's text before and after the utterance, up to where the answer begins.

    Args:
        tokenizer: the language model's; without a template there can be only one message.
        messages: chat turns, one of which contains ``{speech}``, once.

    Raises:
        ValueError: they do not, or the template cannot have them.
    """
    marked = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if marked != 1:
        raise ValueError(
            f"the messages must contain {PLACEHOLDER} exactly once, found {marked} times: "
            f"{messages!r}"
        )
    if tokenizer.chat_template is None:
        if len(messages) > 1:
            raise ValueError(
                "the tokenizer has no chat template, so there can be only one message, got "
                f"{len(messages)}"
            )
        text = (tokenizer.bos_token or "") + messages[0]["content"]
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"the chat template did not keep {PLACEHOLDER} as it is; its output was {text!r}"
        )
    before, after = text.split(PLACEHOLDER)
    return before, after


def end_of_answer(tokenizer: Any) -> int:
    """Id of the token by which an answer ends.

    What the chat template puts behind an answer, if that begins with a token made for such things:
    Gemma's ends its turns otherwise than its documents. Else the end of a document.
    """
    if tokenizer.chat_template is not None:
        chat = [*as_messages("a question"), {"role": "assistant", "content": _ANSWER}]
        _, _, behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(_ANSWER)
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}:
            return int(ids[0])
    return int(tokenizer.eos_token_id)
