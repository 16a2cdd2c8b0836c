"""The encoder without 30 s of padding: the stock one where that runs, batch = single elsewhere."""

import pytest
import torch

from blspkd.model.bases import fingerprint, load_encoder, load_transcriber, resolve
from blspkd.model.encoder import SpeechEncoder


@pytest.fixture(scope="module")
def stock(tiny_parts):
    return load_encoder(str(tiny_parts.encoder), dtype=torch.float32)


def test_equals_the_stock_encoder_on_a_full_window(stock):
    features = torch.randn(1, 80, 3000)
    with torch.no_grad():
        ours, mask = SpeechEncoder(stock)(features, torch.ones(1, 3000))
        theirs = stock(features).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert mask.all()


def test_a_clip_is_encoded_alike_in_any_batch(stock):
    encoder = SpeechEncoder(stock)
    features = torch.randn(2, 80, 101)
    mask = torch.ones(2, 101, dtype=torch.bool)
    mask[0, 60:] = False
    features[0, :, 60:] = float("nan")  # whatever stands in the padding must not matter
    with torch.no_grad():
        batch, batch_mask = encoder(features, mask)
        alone, alone_mask = encoder(features[:1, :, :60], mask[:1, :60])
    assert batch_mask.sum(dim=1).tolist() == [30, 51]
    torch.testing.assert_close(batch[0, :30], alone[0], atol=1e-5, rtol=0)
    assert alone_mask.all()


def test_full_window_is_the_stock_encoder_cut_to_the_real_frames(stock):
    features = torch.randn(2, 80, 3000)
    mask = torch.arange(3000) < torch.tensor([[101], [60]])
    with torch.no_grad():
        ours, real = SpeechEncoder(stock, full_window=True)(features, mask)
        theirs = stock(features).last_hidden_state
    assert real.sum(dim=1).tolist() == [51, 30]
    assert torch.equal(ours, theirs[:, :51])


def test_more_than_the_window_is_refused(stock):
    with pytest.raises(ValueError, match="window is 3000"):
        SpeechEncoder(stock)(torch.randn(1, 80, 3001), torch.ones(1, 3001))


def test_fingerprint_survives_a_cast_and_sees_a_change(stock):
    before = fingerprint(stock)
    half = load_encoder(stock.config.name_or_path, dtype=torch.bfloat16)
    assert fingerprint(half) == before
    with torch.no_grad():
        half.layers[0].fc1.weight.neg_()
    assert fingerprint(half) != before


def test_a_language_model_is_no_encoder(tiny_parts):
    with pytest.raises(ValueError, match="must be a Whisper model"):
        load_encoder(str(tiny_parts.language_model), dtype=torch.float32)


def test_a_checkpoint_without_decoder_gives_no_transcriber(stock, tiny_parts, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in tiny_parts.encoder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_parts.encoder / "model.safetensors")
    encoder_only = {k: v for k, v in weights.items() if ".encoder." in k}
    save_file(encoder_only, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_transcriber(str(tmp_path), dtype=torch.float32) is None
    loaded = load_encoder(str(tmp_path), dtype=torch.float32)
    assert fingerprint(loaded) == fingerprint(stock)


@pytest.mark.parametrize("reference", ["", "./nowhere/model", "blspkd:no/such"])
def test_references_that_lead_nowhere(reference):
    with pytest.raises(ValueError, match=r"no pretrained|no model at|names no folder"):
        resolve(reference)
