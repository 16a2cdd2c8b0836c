"""Chat-training dialogs over the little world, and their tokens as the product concatenates them.

The product puts speech where `{speech}` stands in a chat message. It tokenises three pieces apart
and concatenates the ids: what stands before the speech, the transcript, what stands after it. Where
the first piece ends in a space, the space moves to the transcript ("Repeat:" + " the cow"), so
that words have the leading space that they have inside a sentence. `dialog_ids` does the same.
"""

import random
from dataclasses import dataclass

from facts import facts
from transformers import PreTrainedTokenizerFast
from world import free_sentence, questions, vocabulary, word_salad

SPEECH = "{speech}"
PROMPTS = {
    "repeat": "Repeat: {speech}",
    "continue": "Continue: {speech}",
    "question": "{speech}",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Dialog:
    """One user turn and its answer.

    Attributes:
        prompt: the user's message with `{speech}` in the transcript's place.
        text: the transcript.
        response: what the assistant answers.
    """

    prompt: str
    text: str
    response: str


def prompt_pieces(tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> list[list[int]]:
    """The ids of the three pieces: before the transcript, the transcript, after it."""
    messages = [{"role": "user", "content": prompt}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = chat.split(SPEECH)
    if before.endswith(" "):
        before, text = before[:-1], " " + text
    return [tokenizer(p, add_special_tokens=False)["input_ids"] for p in (before, text, after)]


def dialog_ids(tokenizer: PreTrainedTokenizerFast, dialog: Dialog) -> tuple[list[int], int]:
    """The ids of prompt and response with its end token, and how many of them the prompt has."""
    pieces = prompt_pieces(tokenizer, dialog.prompt, dialog.text)
    prompt = [token for piece in pieces for token in piece]
    response = tokenizer(dialog.response, add_special_tokens=False)["input_ids"]
    return [*prompt, *response, tokenizer.eos_token_id], len(prompt)


class DialogSource:
    """Draws training dialogs without end; nothing in them is held out.

    Four tenths are repetitions (half of them of words in no order, which teaches copying),
    a quarter continuations, the rest spoken turns without an instruction: questions are
    answered, and of a sentence the assistant says what it has heard.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.words = vocabulary()
        self.facts = facts()
        self.questions = questions()

    def __call__(self) -> Dialog:
        """Draws one dialog."""
        kind = self.rng.random()
        if kind < 0.4:
            text = self._text_to_repeat()
            dialog = Dialog(PROMPTS["repeat"], text, text)
        elif kind < 0.65:
            dialog = Dialog(PROMPTS["continue"], *self._continuation())
        elif kind < 0.95:
            dialog = Dialog(PROMPTS["question"], *self.rng.choice(self.questions))
        else:
            text = free_sentence(self.rng).text
            dialog = Dialog(PROMPTS["question"], text, f"you said {text}")
        return self._with_other_space(dialog) if self.rng.random() < 0.1 else dialog

    def _text_to_repeat(self) -> str:
        kind = self.rng.random()
        if kind < 0.4:
            return word_salad(self.rng, self.words)
        if kind < 0.5:
            return " ".join(self._made_up_word() for _ in range(self.rng.randint(1, 3)))
        if kind < 0.6:
            return self.rng.choice(self.facts).statement
        if kind < 0.7:
            return self.rng.choice(self.questions)[0]
        return free_sentence(self.rng).text

    def _made_up_word(self) -> str:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(self.rng.choices(letters, k=self.rng.randint(2, 6)))

    def _continuation(self) -> tuple[str, str]:
        if self.rng.random() < 0.35:
            fact = self.rng.choice(self.facts)
            return fact.beginning, fact.ending
        sentence = free_sentence(self.rng)
        return sentence.text, sentence.continuation

    def _with_other_space(self, dialog: Dialog) -> Dialog:
        """The same turn with the leading space where there is none, and the reverse."""
        if " {speech}" in dialog.prompt:
            prompt = dialog.prompt.replace(" {speech}", "{speech}")
        else:
            prompt = " {speech}"
        return Dialog(prompt, dialog.text, dialog.response)
