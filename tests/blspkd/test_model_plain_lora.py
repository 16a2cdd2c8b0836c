"""Plain LoRA in place of PLoRA: everywhere, for the teacher as well."""

import copy

import pytest
import torch

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.evaluation.answers import answer_from_speech, answer_from_text
from blspkd.evaluation.drift import measure_drift
from blspkd.evaluation.evaluate import evaluate
from blspkd.evaluation.tasks import EvalConfig
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_model
from blspkd.model.objective import LossWeights, Objective
from blspkd.model.prompts import as_messages

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture
def loaded(tiny_model):
    """The tiny model, whose matrices are not zero, with them acting everywhere."""
    model, processor = load_model(tiny_model)
    model.config.plain_lora = True
    return model, processor


@pytest.fixture(scope="module")
def records(tiny_corpus):
    return read_manifest(tiny_corpus.manifest)


@pytest.fixture(scope="module")
def merged(tiny_model):
    """An oracle: a plain language model whose weights have B A added to them."""
    model, _ = load_model(tiny_model)
    language_model = model.language_model
    weights = dict(language_model.state_dict())
    plain = copy.deepcopy(language_model.config)
    oracle = type(language_model)(plain)
    state = oracle.state_dict()
    for name in state:
        prefix = name.removesuffix(".weight")
        state[name] = weights.get(name, weights.get(f"{prefix}.base_layer.weight"))
        down, up = (
            next((w for n, w in weights.items() if n.startswith(f"{prefix}.lora_{x}")), None)
            for x in "AB"
        )
        if down is not None:
            state[name] = state[name] + up @ down  # r = lora_alpha
    assert all(tensor is not None for tensor in state.values())
    oracle.load_state_dict(state)
    return oracle.eval()


def test_text_is_answered_by_the_adapted_language_model(loaded, merged, records):
    model, processor = loaded
    messages = [as_messages("Say: {speech}")] * len(records)
    texts = [record.text for record in records]
    answers = answer_from_text(model, processor, texts, messages, decoding=SHORT)
    expected = []
    for text, chat in zip(texts, messages, strict=True):
        ids = torch.tensor([processor.tokenize_turn(chat, text).input_ids])
        options = SHORT.options(processor)
        tokens = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        expected += processor.decode_responses(tokens[:, ids.shape[1] :])
    assert answers == expected
    with model.untouched():
        untouched = answer_from_text(model, processor, texts, messages, decoding=SHORT)
    assert untouched != answers
    model.config.plain_lora = False
    assert answer_from_text(model, processor, texts, messages, decoding=SHORT) == untouched


def test_speech_is_answered_with_every_position_adapted(loaded, merged, records):
    model, processor = loaded
    messages = [as_messages("Say: {speech}")] * len(records)
    everywhere = answer_from_speech(model, processor, records, messages, decoding=SHORT)
    model.config.plain_lora = False
    model.language_model = merged  # no PLoRA layers left: the mask means nothing to it
    assert everywhere == answer_from_speech(model, processor, records, messages, decoding=SHORT)


def batch_of(processor, records, **options):
    dataset = ClipDataset(records, processor, prompt="Say: {speech}")
    return Collator(processor, **options)([dataset[i] for i in range(len(records))])


def test_the_teacher_moves_and_the_prompt_teaches(loaded, records):
    model, processor = loaded
    batch = batch_of(processor, records[:3])
    assert batch["prompt_length"] > 0
    adapted = model(**batch).teacher.hidden_states
    with model.untouched():
        untouched = model(**batch).teacher.hidden_states
    assert not torch.allclose(adapted, untouched, atol=1e-3)

    model.train()
    objective = Objective(LossWeights(input_kl=0, response_kl=0, response_ce=1, quantity=0))
    torch.manual_seed(0)
    shared = model(**batch, objective=objective).loss
    torch.manual_seed(0)
    apart = model(**batch_of(processor, records[:3], share_prompt=False), objective=objective).loss
    assert shared.detach() == pytest.approx(apart.detach())
    shared.backward()
    down = next(p for n, p in model.named_parameters() if "lora_A" in n)
    assert down.grad.abs().max() > 0
    assert model.language_model.training


def test_a_teacher_drops_nothing_out(loaded, records):
    model, processor = loaded
    for module in model.language_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    batch = batch_of(processor, records[:2])
    model.eval()
    still = model(**batch)
    model.train()
    trained = [model(**batch) for _ in range(2)]
    for one in trained:
        torch.testing.assert_close(one.teacher.hidden_states, still.teacher.hidden_states)


def test_drift_is_the_distance_from_the_untouched_language_model(loaded, records):
    model, processor = loaded
    batch = batch_of(processor, records)
    found = measure_drift(model, [batch])
    tokens = batch["speech_mask"].sum(1) + (batch["labels"] != -100).sum(1)
    assert [count for _, count in found.parts["text_drift_kl"]] == tokens.tolist()
    assert found.mean("text_drift_kl") > 0.01
    model.config.plain_lora = False
    assert measure_drift(model, [batch]).mean("text_drift_kl") == 0


def test_an_evaluation_reports_the_drift(loaded, records):
    model, processor = loaded
    config = EvalConfig(task="continue", max_new_tokens=5)
    found = evaluate(model, processor, records[:3], config, transcriber=None)
    assert found.meters["text_drift_kl"] > 0
    assert 0 < found.meters["text_answers_changed"] <= 1
    assert found.untouched != found.rows["text"].answers
    assert any("plain LoRA" in note for note in found.notes)
    model.config.plain_lora = False
    plain = evaluate(model, processor, records[:3], config, transcriber=None)
    assert plain.untouched is None
    assert plain.rows["text"].answers == found.untouched
    assert "text_drift_kl" not in plain.meters


def test_the_switch_is_kept_and_needs_plora(tmp_path):
    BlspKDConfig("e", "l", plora={}, plain_lora=True).save_pretrained(tmp_path)
    assert BlspKDConfig.from_pretrained(tmp_path).plain_lora
    with pytest.raises(ValueError, match="plain_lora"):
        BlspKDConfig("e", "l", plain_lora=True)
