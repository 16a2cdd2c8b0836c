"""The three ways to answer: what they may and may not depend on."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blspkd.data import read_manifest
from blspkd.evaluation.answers import (
    answer_from_speech,
    answer_from_text,
    nearest_embedding_transcripts,
)
from blspkd.evaluation.cascade import Transcriber
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_config, load_model
from blspkd.model.prompts import as_messages

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def records(tiny_corpus):
    return read_manifest(tiny_corpus.manifest)


@pytest.fixture(scope="module")
def messages(records):
    # prompts of different length, so that batches need padding
    return [as_messages("Say" + " it" * i + ": {speech}") for i in range(len(records))]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_answer_does_not_depend_on_its_batch(loaded, records, messages, num_beams):
    decoding = Decoding(max_new_tokens=6, num_beams=num_beams)
    texts = [record.text for record in records]
    one, four = (
        answer_from_speech(*loaded, records, messages, decoding=decoding, batch_size=size)
        for size in (1, 4)
    )
    assert one == four
    assert len(set(one)) > 1  # or the comparison would say nothing
    one, four = (
        answer_from_text(*loaded, texts, messages, decoding=decoding, batch_size=size)
        for size in (1, 4)
    )
    assert one == four
    assert len(set(one)) > 1


def test_the_recognised_text_does_not_depend_on_its_batch(loaded, records):
    one, four = (nearest_embedding_transcripts(*loaded, records, batch_size=s) for s in (1, 4))
    assert one == four


def test_the_text_answer_is_the_untouched_language_model_s(loaded, records, messages, tiny_parts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_parts.language_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_parts.language_model)
    expected = []
    for record, chat in zip(records, messages, strict=True):
        said = chat[0]["content"].replace("{speech}", record.text)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        new = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    texts = [record.text for record in records]
    assert answer_from_text(*loaded, texts, messages, decoding=SHORT) == expected


def test_a_chat_model_s_own_sampling_and_penalties_are_overridden(loaded, records, messages):
    model, processor = loaded
    before = answer_from_speech(model, processor, records, messages, decoding=SHORT)
    own = model.language_model.generation_config
    saved = own.to_dict()
    own.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=9.0)
    try:
        after = answer_from_speech(model, processor, records, messages, decoding=SHORT)
    finally:
        own.update(**saved)
    assert after == before


def test_drawing_is_wider_than_greedy_and_repeats_with_its_seed(loaded, records, messages):
    def draw(seed):
        torch.manual_seed(seed)
        hot = Decoding(max_new_tokens=6, temperature=3.0)
        return answer_from_speech(*loaded, records, messages, decoding=hot)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_nearest_tokens_by_an_explicit_loop(loaded, records):
    model, processor = loaded
    batch = processor([records[2].audio], prompt="{speech}")
    adapter = model.embed_speech(
        input_features=batch["input_features"],
        feature_attention_mask=batch["feature_attention_mask"],
    )
    ids = []
    for vector in adapter.hidden_states[0]:
        cosines = [
            torch.nn.functional.cosine_similarity(vector, embedding, dim=0).item()
            for embedding in model.embedding_weight()
        ]
        ids.append(max(range(len(cosines)), key=cosines.__getitem__))
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert nearest_embedding_transcripts(model, processor, records)[2] == expected


def test_a_model_in_training_is_answered_without_dropout_and_trains_on(loaded, records, messages):
    model, processor = loaded
    calm = answer_from_speech(model, processor, records, messages, decoding=SHORT)
    model.train()
    try:
        assert answer_from_speech(model, processor, records, messages, decoding=SHORT) == calm
        assert model.training
        assert model.adapter.training
    finally:
        model.eval()


def test_progress_counts_clips(loaded, records, messages):
    seen = []
    answer_from_speech(
        *loaded,
        records,
        messages,
        decoding=SHORT,
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 6), (6, 6)]


def test_messages_must_match_the_clips(loaded, records, messages):
    with pytest.raises(ValueError, match="got 1 for 6 clips"):
        answer_from_speech(*loaded, records, messages[:1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("num_beams", 0), ("temperature", -1.0), ("top_p", 0.0)],
)
def test_impossible_decoding_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Decoding(**{field: value})


def test_the_transcriber_hears_thirty_padded_seconds_whoever_else_speaks(tiny_parts, records):
    transcriber = Transcriber.load(
        str(tiny_parts.encoder), dtype=torch.float32, device=torch.device("cpu")
    )
    shapes = []
    hook = transcriber.model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((*args, *kwargs.values())[0].shape), with_kwargs=True
    )
    state = torch.get_rng_state()
    together = transcriber.transcribe(records[:3])
    alone = [transcriber.transcribe([record])[0] for record in records[:3]]
    hook.remove()
    assert together == alone
    assert len(set(alone)) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert {shape[-1] for shape in shapes} == {3000}


def test_the_transcriber_listens_in_the_record_s_language(tiny_parts, tiny_corpus, records):
    from dataclasses import replace

    transcriber = Transcriber.load(
        str(tiny_parts.encoder), dtype=torch.float32, device=torch.device("cpu")
    )
    german = [replace(records[0], lang="de"), records[0]]
    heard = transcriber.transcribe(german)
    assert heard[0] != heard[1]
    assert heard[1] == transcriber.transcribe(records[:1])[0]


def test_loading_names_what_is_wrong(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="no such folder"):
        load_config(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json and model\.safetensors missing"):
        load_config(tmp_path)
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-5 can be used"):
        load_config(tmp_path)


def test_a_moved_part_can_be_named_and_a_wrong_one_is_refused(tiny_model, tiny_parts, tmp_path):
    import shutil

    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_parts.language_model, moved)
    load_model(tiny_model, language_model=str(moved))
    plain = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        plain.get_input_embeddings().weight.neg_()
    plain.save_pretrained(moved)
    with pytest.raises(ValueError, match="trained on another language_model"):
        load_model(tiny_model, language_model=str(moved))
