"""Curves and alignments."""

import json

import numpy as np
import pytest

from blspkd.data import read_manifest
from blspkd.evaluation.plots import (
    Alignment,
    align,
    curves_of,
    plot_alignment,
    plot_curves,
    read_curves,
)
from blspkd.model.loading import load_model

PNG = b"\x89PNG"


def test_curves_gather_numbers_by_step():
    lines = [
        {"step": 1, "loss": 2.0, "epoch": 0.1, "note": "x"},
        {"loss": 9.0},
        {"step": 2, "loss": 1.0, "eval_a/input_kl": 3, "done": True},
        {"step": 2, "train_runtime": 9.0, "total_flos": 0.0},
    ]
    assert curves_of(lines) == {"loss": [(1, 2.0), (2, 1.0)], "eval_a/input_kl": [(2, 3.0)]}


def test_a_checkpoint_finds_its_run_s_log_and_half_a_line_does_no_harm(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    assert read_curves(checkpoint) == {}
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 5.0}]})
    )
    assert read_curves(checkpoint) == {"loss": [(1, 5.0)]}
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_curves(tmp_path) == {"loss": [(1, 2.0)]}
    (tmp_path / "before.json").write_text('{"a/input_kl": 4.0}')
    assert read_curves(checkpoint)["eval_a/input_kl"] == [(0, 4.0)]
    other = tmp_path / "model"
    other.mkdir()
    assert read_curves(other) == {}


def test_curves_are_drawn_with_a_panel_for_each_measure(tmp_path):
    names = ("loss", "loss/token", "eval_a/kl", "eval_b/kl", "eval_a/acc", "clips_per_second")
    path = tmp_path / "new" / "curves.png"
    plot_curves({name: [(1, 1.0), (2, 0.5)] for name in names}, path)
    assert path.read_bytes()[:4] == PNG


def test_an_alignment_holds_the_clip_s_own_times(tiny_model, tiny_corpus):
    model, processor = load_model(tiny_model)
    record = read_manifest(tiny_corpus.manifest)[5]
    found = align(model, processor, record)
    # four of Whisper's 50 Hz frames make one
    assert found.alpha_rate == pytest.approx(12.5)
    assert len(found.alphas) == pytest.approx(record.duration * 12.5, abs=1)
    assert len(found.tokens) == len(found.fire_times) == max(1, round(found.alphas.sum()))
    assert (np.diff(found.fire_times) > 0).all()
    assert found.fire_times[-1] == pytest.approx(record.duration, abs=0.1)


def test_a_clip_in_which_no_speech_was_heard_has_no_tokens(tiny_model, tiny_corpus, tmp_path):
    model, processor = load_model(tiny_model)
    model.config.logprob_threshold = -1e-6
    found = align(model, processor, read_manifest(tiny_corpus.manifest)[0])
    assert found.tokens == []
    assert found.fire_times.shape == (0,)
    plot_alignment(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == PNG


def test_an_alignment_is_drawn_whatever_its_tokens_are(tmp_path):
    alignment = Alignment(
        title="id: costs $5 and $6, \ufffd\x03",
        log_mel=np.random.default_rng(0).standard_normal((80, 120)).astype(np.float32),
        alphas=np.linspace(0, 0.9, 15, dtype=np.float32),
        alpha_rate=12.5,
        fire_times=np.array([0.4, 0.8, 1.2], dtype=np.float32),
        tokens=["$x^", "\n\ufffd", "averyverylongtokenindeed"],
    )
    plot_alignment(alignment, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == PNG
