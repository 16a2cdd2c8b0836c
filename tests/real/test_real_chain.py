"""The commands, in the order of use, on real pretrained weights and spoken sentences.

`make test-real` runs this; it takes a few minutes. The models are BLSPKD_REAL_ENCODER and
BLSPKD_REAL_LANGUAGE_MODEL, each a folder or a hub id. Speech comes from flite and espeak-ng.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blspkd.model.precision import slow_type_warning

pytestmark = pytest.mark.real

ENCODER = os.environ.get("BLSPKD_REAL_ENCODER", "openai/whisper-base")
LANGUAGE_MODEL = os.environ.get("BLSPKD_REAL_LANGUAGE_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
# what the recipe computes in, but on a processor that is slow in it
TYPE = (
    "float32" if slow_type_warning(torch.bfloat16, torch.device("cpu"), remedy="") else "bfloat16"
)
ROOT = Path(__file__).parents[2]
NOUNS = ("river", "teacher", "garden", "window", "letter", "morning", "soldier", "kitchen")
VERBS = ("remembers", "follows", "carries", "watches", "forgets")


def _blspkd(*arguments, code=0):
    command = [sys.executable, "-m", "blspkd", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Spoken sentences: 64 to train on, 8 held out in known voices, 8 in an unknown one."""
    folder = tmp_path_factory.mktemp("corpus")
    sentences = [
        f"the old {a} {verb} the quiet {b}"
        for verb in VERBS
        for a in NOUNS
        for b in NOUNS
        if a != b
    ]
    (folder / "sentences.txt").write_text("\n".join(sentences))
    speak = [sys.executable, ROOT / "recipes" / "speak.py", folder / "sentences.txt", folder]
    options = ["--clips", "64", "--test-clips", "8", "--voice-clips", "8"]
    options += ["--held-out-sentences", "40", "--seed", "1"]
    subprocess.run([*speak, *options], check=True)
    return folder


@pytest.fixture(scope="module")
def responded(corpus):
    prepared = corpus / "prepared.jsonl"
    _blspkd("prepare", corpus / "train.jsonl", prepared)
    out = corpus / "responded.jsonl"
    models = ["--language-model", LANGUAGE_MODEL, "--encoder", ENCODER, "--dtype", TYPE]
    common = ["respond", prepared, out, *models, "--max-new-tokens", "12"]
    _blspkd(*common, "--limit", "32")
    _blspkd(*common, "--resume")
    return out


@pytest.fixture(scope="module")
def run(corpus, responded):
    folder = corpus / "run"
    result = _blspkd(
        "train",
        ROOT / "recipes" / "smollm2-whisper-base.yaml",
        f"model.encoder={ENCODER}",
        f"model.language_model={LANGUAGE_MODEL}",
        f"data.train={responded}",
        "data.responses=null",
        f"data.eval={{sentences: {corpus / 'test-sentences.jsonl'}}}",
        f"data.cache_dir={corpus / 'features'}",
        f"output={folder}",
        f"model.dtype={TYPE}",
        f"optim.bf16={TYPE == 'bfloat16'}",
        "optim.max_steps=60",
        "optim.warmup_steps=5",
        "losses.response_kl.start=0.9",
        "eval_steps=null",
        "save_steps=null",
        "--json",
    )
    return folder, json.loads(result.stdout)


def test_every_clip_is_answered_once(responded):
    rows = [json.loads(line) for line in responded.read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == 64
    assert all(row["response"] for row in rows)


def test_training_brings_speech_nearer_to_text(run):
    _, figures = run
    before, after = figures["before"], figures["after"]
    assert after["sentences/input_kl"] < 0.8 * before["sentences/input_kl"]
    assert after["sentences/token_accuracy"] > before["sentences/token_accuracy"] + 0.1
    assert after["sentences/length_within_one"] > before["sentences/length_within_one"]


@pytest.fixture(scope="module")
def evaluated(run, corpus):
    folder, _ = run
    clips, out = corpus / "test-sentences.jsonl", corpus / "eval"
    options = ["--task", "asr", "--limit", "4", "--max-new-tokens", "16", "--output", out]
    return _blspkd("eval", folder, clips, *options), out


def test_eval_prints_its_three_rows(evaluated):
    result, out = evaluated
    for row in ("text", "cascade", "speech"):
        assert row in result.stdout
    assert json.loads((out / "metrics.json").read_text())
    assert (out / "report.md").exists()


def test_the_cascade_hears_what_is_said(evaluated):
    _, out = evaluated
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    heard = [row["cascade_transcript"].lower() for row in rows]
    assert all("the" in text.split() for text in heard), heard


def test_generate_answers_a_recording(run, corpus):
    folder, _ = run
    clip = next((corpus / "clips").rglob("*.flac"))
    assert _blspkd("generate", folder, clip, "--max-new-tokens", "12").stdout.strip()
