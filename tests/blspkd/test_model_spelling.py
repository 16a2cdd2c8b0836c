"""Spelling codes: near for tokens that are spelled alike, and kept with the weights."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.evaluation.meters import nearest_tokens
from blspkd.model import pretrained, spelling
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.loading import load_processor
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.objective import LossWeights, Objective
from blspkd.model.spelling import spelling_codes

WIDTH = 8
STEMS = ("light", "night", "right", "fight", "bureau", "window", "leaned", "learned", "open")
WORDS = [f"{mark}{word}" for word in STEMS for mark in ("", "\u0120")] * 4


@pytest.fixture
def spelled(tiny_parts):
    torch.manual_seed(0)
    config = BlspKDConfig(
        str(tiny_parts.encoder),
        str(tiny_parts.language_model),
        adapter={"hidden_size": 32, "num_pre_layers": 1, "num_post_layers": 1, "num_heads": 4},
        plora=None,
        speech_embedding="soft",
        token_spelling=WIDTH,
    )
    return BlspKDForConditionalGeneration.from_parts(config)


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_what_is_spelled_alike_has_near_codes(mark):
    words = [word.replace("\u0120", mark) for word in WORDS]
    codes = spelling_codes(words, 16)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(len(words)))
    near = dict(zip(words, (codes @ codes[words.index("light")]).tolist(), strict=True))
    assert near["light"] > near["night"] > near["window"]
    assert near["light"] > near[f"{mark}light"] > near[f"{mark}window"]


def test_all_components_keep_the_cosines_of_the_centred_features():
    features = [dict(spelling._features(word)) for word in WORDS]
    counts = Counter(name for one in features for name in one)
    names = [name for name, count in counts.items() if count >= spelling.RARE]
    table = torch.tensor([[one.get(name, 0.0) for name in names] for one in features])
    centred = F.normalize(table - table.mean(dim=0), dim=-1)
    codes = spelling_codes(WORDS, len(names))
    torch.testing.assert_close(codes @ codes.T, centred @ centred.T, atol=1e-4, rtol=0)


def test_more_components_than_features_are_refused():
    with pytest.raises(ValueError, match="token_spelling must be at most that, got 500"):
        spelling_codes(WORDS, 500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_spelling": -1}, "must be 0 or more"),
        ({"token_spelling": 8, "adapter_type": "conv"}, "adapter_type to cformer"),
    ],
)
def test_spellings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlspKDConfig(**options)


def test_keys_are_embedding_and_spelling_in_equal_parts(spelled):
    weight, spelling = spelled.embedding_weight(), spelled.spelling
    torch.manual_seed(1)
    one, other = torch.randn(2, 5, spelled.adapter.config.output_size)
    width = weight.shape[1]
    keys = spelled.token_keys()
    torch.testing.assert_close(
        one @ keys.T,
        (one[:, :width] @ F.normalize(weight, dim=-1).T + one[:, width:] @ spelling.float().T)
        / 2**0.5,
    )
    torch.testing.assert_close(nearest_tokens(spelled, keys[3:9] * 7), torch.arange(3, 9))
    share = (F.normalize(other, dim=-1) @ keys.T * spelled.config.token_scale).softmax(-1)
    torch.testing.assert_close(spelled.readable(other), share @ weight, atol=1e-5, rtol=1e-4)


def test_the_language_model_never_reads_the_spelling_itself(spelled):
    spelled.config.speech_embedding = "direct"
    vectors = torch.randn(2, 3, spelled.adapter.config.output_size)
    torch.testing.assert_close(spelled.readable(vectors), vectors[..., :-WIDTH])


def test_the_token_loss_teaches_the_spelling_too(spelled, tiny_corpus):
    processor = load_processor(spelled.config)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="{speech}")
    batch = Collator(processor)([dataset[i] for i in range(3)])
    weights = LossWeights(token=1, input_kl=1, response_kl=1)
    output = spelled(**batch, objective=Objective(weights))
    rows = output.speech_vectors[output.adapter.attention_mask]
    scores = F.normalize(rows, dim=-1) @ spelled.token_keys().T * spelled.config.token_scale
    text = batch["input_ids"][batch["speech_mask"].bool()]
    torch.testing.assert_close(output.losses["token"], F.cross_entropy(scores, text))
    output.loss.backward()
    assert (spelled.adapter.output_projection.weight.grad[-WIDTH:].norm(dim=-1) > 0).all()


def test_the_codes_of_training_are_those_of_use(spelled, tmp_path, monkeypatch):
    spelled.spelling.copy_(torch.randn_like(spelled.spelling))  # as another library finds them
    spelled.save_pretrained(tmp_path)
    monkeypatch.delattr(pretrained, "spelling_codes")
    loaded = BlspKDForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.spelling, spelled.spelling)
    assert torch.equal(loaded.token_keys(), spelled.token_keys())


def test_a_next_stage_takes_the_codes_along(spelled, tmp_path):
    expected = torch.randn_like(spelled.spelling)
    before = spelled.spelling.clone()
    spelled.spelling.copy_(expected)
    spelled.save_pretrained(tmp_path)
    spelled.spelling.copy_(before)
    assert spelled.take_weights(tmp_path) == []
    assert torch.equal(spelled.spelling, expected)
