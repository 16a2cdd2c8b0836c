"""`blspkd chat` as it is typed, and the conversation behind it."""

import io
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from blspkd.__main__ import main
from blspkd.commands.chat import named_file
from blspkd.evaluation.clips import answer_clips, read_clips
from blspkd.evaluation.conversation import Conversation
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_model

SHORT = Decoding(max_new_tokens=5)
PROMPT = "Say: {speech}"


@pytest.fixture
def parts(tiny_model):
    return load_model(tiny_model)


@pytest.fixture
def conversation(parts):
    return Conversation(*parts, prompt=PROMPT, decoding=SHORT)


@pytest.fixture
def chat(tiny_model, capsys, monkeypatch):
    def call(*arguments, model=tiny_model, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        options = ["--max-new-tokens", "5", "--prompt", PROMPT]
        code = main(["chat", str(model), *map(str, arguments), *options])
        out = capsys.readouterr()
        return code, out.out.splitlines(), out.err

    return call


def test_a_recording_is_answered_as_generate_does(parts, conversation, tiny_corpus):
    first = tiny_corpus.audio[0]
    clips = read_clips([first], prompt=PROMPT)
    assert [conversation.listen(first)] == answer_clips(*parts, clips, decoding=SHORT)
    assert conversation.spoken > 0


def test_each_turn_is_read_with_all_before_it(parts, conversation, tiny_corpus):
    model, processor = parts
    first = tiny_corpus.audio[0]
    answers = [conversation.listen(first), conversation.say("why"), conversation.say("and then")]
    messages = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": answers[1]},
        {"role": "user", "content": "and then"},
    ]
    assert conversation.messages[:-1] == messages
    with torch.no_grad():
        batch = processor(first, messages=messages)
        tokens = model.generate(**batch, **SHORT.options(processor))
    assert processor.decode_responses(tokens) == [answers[2]]


def test_another_recording_begins_anew(parts, conversation, tiny_corpus):
    one, two = tiny_corpus.audio[:2]
    conversation.listen(one)
    conversation.say("why")
    answer = conversation.listen(two)
    fresh = Conversation(*parts, prompt=PROMPT, decoding=SHORT)
    assert answer == fresh.listen(two)
    assert conversation.messages == fresh.messages
    assert conversation.say("why") == fresh.say("why")


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(conversation, tiny_corpus, tmp_path):
    with pytest.raises(ValueError, match="begins with a recording"):
        conversation.say("why")
    conversation.listen(tiny_corpus.audio[0])
    before, spoken = list(conversation.messages), conversation.spoken
    with pytest.raises(ValueError, match="cannot be in a text"):
        conversation.say("what is {speech}")
    with pytest.raises(ValueError, match="no such audio file"):
        conversation.listen(tmp_path / "no.wav")
    longest = conversation.model.language_model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"but the language model reads {longest}: allow shorter"):
        conversation.say("why " * longest)
    assert (conversation.messages, conversation.spoken) == (before, spoken)
    assert conversation.say("why")


def test_what_is_spoken_counts_for_the_length(conversation, tiny_corpus):
    conversation.listen(tiny_corpus.audio[0])
    config = conversation.model.language_model.config
    prompt = len(conversation.processor.tokenize_turn(conversation.messages[:1]).input_ids) - 1
    needed = prompt + conversation.spoken + SHORT.max_new_tokens
    config.max_position_embeddings = needed
    conversation.listen(tiny_corpus.audio[0])
    config.max_position_embeddings = needed - 1
    with pytest.raises(ValueError, match=f"has {needed - SHORT.max_new_tokens} tokens"):
        conversation.listen(tiny_corpus.audio[0])


def test_an_answer_cannot_take_the_recordings_place(conversation, tiny_corpus, monkeypatch):
    monkeypatch.setattr(
        type(conversation.processor), "decode_responses", lambda self, ids: ["a {speech} b"]
    )
    assert conversation.listen(tiny_corpus.audio[0]) == "a { speech } b"
    assert conversation.say("why")


def test_lines_are_turns(chat, conversation, tiny_corpus):
    one, two = tiny_corpus.audio[:2]
    expected = [conversation.listen(one), conversation.say("why"), conversation.listen(two)]
    code, out, err = chat(one, stdin=f"why\n\n  '{two}'\n")
    assert (code, out) == (0, expected)
    assert "Error" not in err
    code, out, _ = chat(stdin=f"{one}\nwhy\n{two}")
    assert (code, out) == (0, expected)


def test_a_failed_turn_is_told_and_the_next_one_taken(chat, conversation, tiny_corpus):
    one = tiny_corpus.audio[0]
    code, out, err = chat(stdin=f"why\nno.wav\n{one}\n")
    assert (code, out) == (1, [conversation.listen(one)])
    assert err.startswith("Error: a conversation begins with a recording")
    assert "no.wav: no such audio file" in err


def test_no_speech_is_told(chat, tiny_model, tiny_corpus, tmp_path):
    deaf = shutil.copytree(tiny_model, tmp_path / "deaf")
    config = json.loads((deaf / "config.json").read_text())
    (deaf / "config.json").write_text(json.dumps({**config, "logprob_threshold": -1e-6}))
    clip = tiny_corpus.audio[0]
    code, out, err = chat(clip, model=deaf)
    assert (code, len(out)) == (0, 1)
    assert f"warning: no speech was heard in {clip}" in err
    assert "warning" not in chat(clip)[2]


def test_silence_is_told(chat, conversation, tiny_corpus, tmp_path):
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16_000), 16_000)
    code, out, err = chat(silent, stdin=f"{tiny_corpus.audio[0]}\n{silent}\n")
    assert (code, len(out)) == (0, 3)
    assert err.splitlines() == [f"warning: {silent} is silent; its answer means nothing"] * 2


def test_a_word_is_a_turn_even_where_a_file_has_its_name(
    chat, conversation, tiny_corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_corpus.audio[0], "why")
    heard, said = conversation.listen(tiny_corpus.audio[0]), conversation.say("why")
    assert chat("why", stdin="why\n./why\n")[:2] == (0, [heard, said, heard])


def test_a_prompt_without_a_place_for_speech_is_wrong_usage(tiny_model, capsys):
    assert main(["chat", str(tiny_model), "--prompt", "hello"]) == 2
    assert "{speech} exactly once" in capsys.readouterr().err


def test_bad_audio_is_told_before_any_weights_are_loaded(chat, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("blspkd.model.loading.load_model", never)
    code, out, err = chat(tmp_path / "no.wav")
    assert (code, out) == (1, [])
    assert "no such audio file" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_asked_until_its_end(chat, conversation, tiny_corpus, monkeypatch):
    lines = iter([str(tiny_corpus.audio[0]), "", "no.wav"])
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = chat(stdin=Terminal())
    assert (code, out) == (0, [conversation.listen(tiny_corpus.audio[0])])
    assert prompts == ["> "] * 4
    assert "Ctrl-D ends" in err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("there.dat", True),
        ("'there.dat'", True),
        ("gone.wav", True),
        ("~/gone.FLAC", True),
        ("gone.dat", False),
        ("bare", False),
        ("./bare", True),
        ("did you hear gone.wav", False),
        ("why", False),
        ("'", False),
        ("why? " * 2_000, False),
    ],
)
def test_a_line_that_names_a_file(line, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("there.dat", "bare"):
        (tmp_path / name).write_bytes(b"")
    assert (named_file(line) is not None) == named
