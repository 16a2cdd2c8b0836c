"""The aligner on clips whose word boundaries are known, because they were joined from two."""

import os
import subprocess

import numpy as np
import pytest
import soundfile
import soxr
import torch

from blspkd.data.alignment import CrossAttentionAligner
from blspkd.model.bases import load_encoder, load_feature_extractor, load_tokenizer
from blspkd.model.encoder import SpeechEncoder
from blspkd.model.processing import BlspKDProcessor

pytestmark = pytest.mark.real

ENCODER = os.environ.get("BLSPKD_REAL_ENCODER", "openai/whisper-base")
FRAMES_PER_SECOND = 50


def _say(text, folder):
    path = folder / "said.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", path], check=True)
    samples, rate = soundfile.read(path, dtype="float32")
    samples = soxr.resample(samples, rate, 16_000)
    loud = np.flatnonzero(np.abs(samples) > 0.02)
    return samples[loud[0] : loud[-1] + 1]  # without the voice's own silence


@pytest.mark.parametrize(
    ("first", "second"),
    [("the old teacher", "remembers the garden"), ("every morning", "the soldier writes a letter")],
)
def test_the_boundary_between_two_joined_clips_is_found(first, second, tmp_path):
    parts = [_say(first, tmp_path), np.zeros(8_000, np.float32), _say(second, tmp_path)]
    processor = BlspKDProcessor(load_feature_extractor(ENCODER), load_tokenizer(ENCODER))
    encoder = SpeechEncoder(load_encoder(ENCODER, dtype=torch.float32), full_window=False)
    features = processor.pad_features([processor.features(np.concatenate(parts))])
    with torch.no_grad():
        encoded, mask = encoder(features["input_features"], features["feature_attention_mask"])
    aligner = CrossAttentionAligner.load(ENCODER, dtype=torch.float32, device=torch.device("cpu"))
    text = f"{first} {second}"
    word_ends = np.cumsum([len(word) + 1 for word in text.split()]) - 1
    ends = aligner.token_ends(encoded[0][mask[0]], text, word_ends.tolist())
    last_of_first = ends[len(first.split()) - 1].item() / FRAMES_PER_SECOND
    pause = len(parts[0]) / 16_000, (len(parts[0]) + len(parts[1])) / 16_000
    assert pause[0] - 0.25 < last_of_first < pause[1] + 0.25
