"""Teacher and student in one model: equal where they must be, apart where they may."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.model.bases import load_language_model, load_tokenizer
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.loading import load_model, load_processor
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.objective import LossWeights, Objective, loss_items

EVERYTHING = LossWeights(token=1, input_kl=1, response_kl=1, response_ce=1, quantity=1)


def test_putting_the_parts_together_changes_no_weight_of_theirs(tiny_model, tiny_parts):
    model, _ = load_model(tiny_model)
    before = load_language_model(str(tiny_parts.language_model), dtype=torch.float32).state_dict()
    after = {
        name.replace(".base_layer", ""): value
        for name, value in model.language_model.state_dict().items()
        if "lora_" not in name
    }
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_is_answered_as_the_bare_language_model_answers_it(tiny_model, tiny_parts):
    model, processor = load_model(tiny_model)
    bare = load_language_model(str(tiny_parts.language_model), dtype=torch.float32)
    turn = processor.tokenize_turn([{"role": "user", "content": "{speech}"}], "where is my hat")
    ids = torch.tensor([turn.input_ids])
    with torch.no_grad():
        expected = bare(ids).logits
        assert torch.equal(model.language_model(ids).logits, expected)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    answer = model.generate_from_text(ids, **options)
    assert torch.equal(answer, bare.generate(ids, **options)[:, ids.shape[1] :])


def test_speech_that_reads_as_the_text_has_no_divergence(hearing_the_text):
    model, batch = hearing_the_text
    output = model(**batch, objective=Objective(LossWeights(quantity=0), temperature=2.0))
    assert torch.equal(output.student.hidden_states, output.teacher.hidden_states)
    assert output.losses["input_kl"] == 0
    assert output.losses["response_kl"] == 0


def test_the_teacher_is_the_bare_model_on_the_transcript(model_and_batch, tiny_parts):
    model, batch = model_and_batch
    bare = load_language_model(str(tiny_parts.language_model), dtype=torch.float32)
    with torch.no_grad():
        output = model(**{**batch, "prompt_length": 0})
        expected = bare.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long()
        ).last_hidden_state
    real = batch["attention_mask"]
    torch.testing.assert_close(output.teacher.hidden_states[real], expected[real])
    assert not torch.allclose(output.student.hidden_states[real], expected[real], atol=1e-2)


def test_a_prompt_read_once_is_as_good_as_one_read_by_every_row(model_and_batch):
    model, batch = model_and_batch
    assert batch["prompt_length"] > 5
    objective = Objective(EVERYTHING)
    model(**batch, objective=objective).loss.backward()
    shared = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**{**batch, "prompt_length": 0}, objective=objective).loss.backward()
    for name, gradient in shared.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient, atol=2e-5, rtol=1e-3, msg=name
        )


def test_gradients_reach_what_is_trained_and_nothing_else(model_and_batch):
    model, batch = model_and_batch
    model.train()
    model(**batch, objective=Objective(EVERYTHING)).loss.backward()
    trained = model.trained_names()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    assert any(name.startswith("adapter.") for name in trained)
    assert any("lora_" in name for name in trained)
    assert not any(name.startswith("speech_encoder.") for name in trained)


@pytest.mark.parametrize("name", ["token", "input_kl", "response_kl", "response_ce", "quantity"])
def test_a_loss_alone_is_the_loss_among_others(model_and_batch, name):
    model, batch = model_and_batch
    weights = dict.fromkeys(("token", "input_kl", "response_kl", "response_ce", "quantity"), 0.0)
    alone = model(**batch, objective=Objective(LossWeights(**{**weights, name: 2.0})))
    together = model(**batch, objective=Objective(EVERYTHING))
    assert set(alone.losses) == {name}
    torch.testing.assert_close(alone.losses[name], together.losses[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.loss.detach(), 2 * alone.losses[name])


def test_micro_batches_add_up_to_the_whole_batch(model_and_batch, tiny_corpus, tiny_model):
    model, _ = model_and_batch
    _, processor = load_model(tiny_model)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="Say: {speech}")
    clips, collator = [dataset[i] for i in range(6)], Collator(processor)
    whole, parts = collator(clips), [collator(clips[:1]), collator(clips[1:])]
    objective = Objective(EVERYTHING)
    model(**whole, objective=objective).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    counts = [loss_items(part["speech_mask"], part["labels"]) for part in parts]
    total = {name: counts[0][name] + counts[1][name] for name in counts[0]}
    for part in parts:
        model(**part, objective=objective, num_items=total).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-3)


def test_saved_are_only_trained_weights_and_they_come_back(model_and_batch, tmp_path):
    model, batch = model_and_batch
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == model.trained_names()
    again, _ = load_model(tmp_path)
    with torch.no_grad():
        a, b = model(**batch), again(**batch)
    assert torch.equal(a.student.hidden_states, b.student.hidden_states)


def test_a_checkpoint_of_another_language_model_is_refused(tiny_model, tiny_parts, tmp_path):
    other = load_language_model(str(tiny_parts.language_model), dtype=torch.float32)
    with torch.no_grad():
        other.model.embed_tokens.weight.neg_()
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another language_model"):
        BlspKDForConditionalGeneration.from_pretrained(tiny_model, language_model=str(tmp_path))


def test_weights_that_do_not_fit_are_refused(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    weights = load_file(tiny_model / "model.safetensors")
    first = sorted(weights)[0]
    weights["stray"] = weights.pop(first)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing"):
        BlspKDForConditionalGeneration.from_pretrained(tmp_path)


def test_a_pickle_is_never_read(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        BlspKDForConditionalGeneration.from_pretrained(tmp_path)


def test_the_convolutional_baseline_trains_on_responses(tiny_parts, tiny_corpus):
    config = BlspKDConfig(
        str(tiny_parts.encoder),
        str(tiny_parts.language_model),
        adapter_type="conv",
        adapter={"bottleneck_size": 16},
        plora=None,
    )
    torch.manual_seed(0)
    model = BlspKDForConditionalGeneration.from_parts(config)
    processor = load_processor(config)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="{speech}")
    batch = Collator(processor)([dataset[i] for i in range(3)])
    weights = LossWeights(input_kl=0, quantity=0, response_kl=1, response_ce=1)
    output = model(**batch, objective=Objective(weights))
    output.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    assert output.student.hidden_states.shape[1] != output.teacher.hidden_states.shape[1]
    with pytest.raises(ValueError, match="adapter_type to cformer"):
        model(**batch, objective=Objective(LossWeights()))


def test_soft_embeddings_lie_among_the_text_embeddings(tiny_model, tiny_corpus):
    model, processor = load_model(tiny_model)
    config = copy.deepcopy(model.config)
    config.speech_embedding = "soft"
    model.config = config
    batch = processor(list(tiny_corpus.audio[:2]), prompt="{speech}")
    with torch.no_grad():
        out = model.embed_speech(
            input_features=batch["input_features"],
            feature_attention_mask=batch["feature_attention_mask"],
        )
        embeds = model.readable(out.hidden_states)
    weight = model.embedding_weight()
    cosine = torch.nn.functional.cosine_similarity(
        out.hidden_states[:, :, None], weight[None, None], dim=-1
    )
    expected = (cosine * config.token_scale).softmax(-1) @ weight
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": {"num_layers": 3}}, "num_layers"),
        ({"adapter": {"output_size": 7}}, "output_size is 7"),
        ({"adapter_type": "qformer"}, "cformer, conv"),
        ({"prompt": "no place"}, "exactly once"),
    ],
)
def test_bad_configurations(tiny_parts, options, message):
    parts = {"encoder": str(tiny_parts.encoder), "language_model": str(tiny_parts.language_model)}
    with pytest.raises(ValueError, match=message):
        BlspKDForConditionalGeneration.from_parts(BlspKDConfig(**parts, **options))


def _droppy(kind, tokens):
    """A language model that drops out in modules (GPT-2), or by rates of its layers (OPT)."""
    rates = {"pad_token_id": 0, "bos_token_id": None}
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5}
        layers = {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "dropout": 0.5,
            "attention_dropout": 0.5,
        }
        return OPTForCausalLM(OPTConfig(vocab_size=tokens, **sizes, **layers, **rates))
    pdrops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.5)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=tokens, n_embd=32, n_layer=2, n_head=4, **pdrops, **rates)
    )


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_only_what_learns_drops_out(
    kind, recomputed, tiny_parts, tiny_corpus, tiny_model_section, tmp_path
):
    own = tmp_path / "own"
    shutil.copytree(tiny_parts.language_model, own)
    torch.manual_seed(0)
    _droppy(kind, len(load_tokenizer(str(own)))).save_pretrained(own)
    plora = {"r": 4, "lora_dropout": 0.5}
    adapter = {**tiny_model_section["adapter"], "dropout": 0.0}
    config = BlspKDConfig(str(tiny_parts.encoder), str(own), adapter=adapter, plora=plora)
    model = BlspKDForConditionalGeneration.from_parts(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    if recomputed:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    processor = load_processor(config)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="Say: {speech}")
    batch = Collator(processor, share_prompt=not recomputed)([dataset[i] for i in range(3)])
    model.eval()
    with torch.no_grad():
        still = model(**batch)
    model.train()
    first, second = model(**batch), model(**batch)
    for output in (first, second):
        assert torch.equal(output.teacher.hidden_states, still.teacher.hidden_states)
    assert not torch.equal(first.student.hidden_states, second.student.hidden_states)
    # where PLoRA's dropout does not act, nothing else drops out
    with torch.no_grad(), model.untouched():
        assert torch.equal(model(**batch).teacher.hidden_states, still.teacher.hidden_states)
        bare = model(**batch).student.hidden_states
        assert torch.equal(bare, model(**batch).student.hidden_states)
    calls = []
    layer = model.language_model.get_decoder().get_submodule(
        "h.0.ln_2" if kind == "gpt2" else "layers.0.fc1"
    )
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(**batch, objective=Objective(EVERYTHING)).loss
    before = len(calls)
    loss.backward()
    assert len(calls) - before == int(recomputed)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).student.hidden_states, still.student.hidden_states)
