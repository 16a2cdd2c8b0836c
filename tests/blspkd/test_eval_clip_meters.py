"""Each clip's meters are those of the clip alone, and their sums are the set's."""

import pytest
import torch

from blspkd.data.batches import ClipDataset, Collator, batches_of
from blspkd.data.manifest import read_manifest
from blspkd.evaluation.meters import measure, measure_clips
from blspkd.model.loading import load_model


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_corpus):
    model, processor = load_model(tiny_model)
    records = read_manifest(tiny_corpus.manifest)
    records[2] = type(records[2])(records[2].audio, records[2].text, records[2].id)  # no response
    return model, processor, records


def batches(processor, records, size):
    dataset = ClipDataset(records, processor, prompt="Say: {speech}")
    return batches_of(dataset, Collator(processor), size)


def test_a_clip_s_figures_are_those_of_the_clip_alone(setting):
    model, processor, records = setting
    found = measure_clips(model, batches(processor, records, 4))
    assert found.clips == len(records)
    for name, pairs in found.parts.items():
        assert len(pairs) == len(records), name
        for record, (total, count) in zip(records, pairs, strict=True):
            alone = getattr(measure(model, batches(processor, [record], 1)), name)
            if count == 0:
                assert alone is None, name
            else:
                assert total / count == pytest.approx(alone, rel=1e-4, abs=1e-5), name
    assert found.parts["response_kl"][2] == (0.0, 0)


def test_items_weigh_the_same_whatever_clip_they_are_in(setting):
    model, processor, records = setting
    whole = measure(model, batches(processor, records, 3))
    pairs = measure_clips(model, batches(processor, records, 6)).parts["input_kl"]
    tokens = [len(processor.tokenizer(" " + r.text).input_ids) for r in records]
    assert [count for _, count in pairs] == tokens
    expected = sum(total for total, _ in pairs) / sum(tokens)
    assert whole.input_kl == pytest.approx(expected, rel=1e-5)
    assert torch.is_grad_enabled()
