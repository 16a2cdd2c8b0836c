"""A run from configuration to model: what it leaves, how it goes on, what stops it."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from blspkd.data.manifest import read_manifest, write_manifest
from blspkd.training.config_file import load_config
from blspkd.training.dry_run import dry_run
from blspkd.training.run import train


def _run(path, *overrides, **options):
    lines = []
    result = train(load_config(path, overrides), say=lines.append, **options)
    return result, lines


def _weights(folder):
    return load_file(folder / "model.safetensors")


def _logged(folder, name):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if "loss" in row]


def test_a_run_leaves_a_model_its_figures_and_how_it_came_about(recipe):
    result, lines = _run(recipe, "optim.max_steps=30", "optim.learning_rate=1e-2")
    assert "4 training clips" in lines[0]
    assert set(result.after) == set(result.before)
    assert {"unseen/input_kl", "unseen/token_accuracy", "unseen/same_answer"} <= set(result.after)
    log = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    steps = [row for row in log if "loss" in row]
    assert {"loss/token", "loss/input_kl", "loss/response_kl", "loss/quantity"} <= set(steps[0])
    first, last = (sum(row["loss/token"] for row in part) for part in (steps[:3], steps[-3:]))
    assert last < 0.8 * first
    resolved = yaml.safe_load((result.folder / "train.yaml").read_text())
    assert resolved["config"]["optim"]["max_steps"] == 30
    assert resolved["versions"]["torch"]
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["after"] == result.after


def test_the_losses_add_up_to_the_loss(recipe):
    result, _ = _run(recipe, "losses.token=2", "losses.quantity=0.5", "answer_limit=0")
    for line in (result.folder / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" not in row:
            continue
        weighted = 2 * row["loss/token"] + row["loss/input_kl"] + row["loss/response_kl"]
        assert row["loss"] == pytest.approx(weighted + 0.5 * row["loss/quantity"], rel=1e-4)


AUGMENTED = ["data.augment={speed: [0.9, 1.1], noise: {probability: 0.5}, masks: {time: 1}}"]


@pytest.mark.parametrize("augmented", [[], AUGMENTED], ids=["plain", "augmented"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(recipe, cached, augmented):
    # 3 steps of 2 clips an epoch and a half: the checkpoint lies in the middle of an epoch
    common = ["save_steps=3", "answer_limit=0", f"data.cache_features={str(cached).lower()}"]
    common += augmented
    whole, _ = _run(recipe, *common, f"output={recipe.parent / 'whole'}")
    checkpoint = whole.folder / "checkpoint-3"
    part = recipe.parent / "part"
    part.mkdir()
    os.rename(checkpoint, part / "checkpoint-3")
    resumed, _ = _run(recipe, *common, f"output={part}", resume=True)
    expected, found = _weights(whole.folder), _weights(resumed.folder)
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_accumulated_steps_are_steps_over_the_larger_batch(recipe):
    common = [
        "answer_limit=0",
        "optim.max_steps=2",
        "model.adapter.dropout=0.0",
        "model.plora.lora_dropout=0.0",
    ]
    large, _ = _run(recipe, *common, "optim.batch_size=4", f"output={recipe.parent / 'large'}")
    small, _ = _run(
        recipe,
        *common,
        "optim.batch_size=1",
        "optim.gradient_accumulation=4",
        f"output={recipe.parent / 'small'}",
    )
    # AdamW forgives a gradient its scale, and so does clipping; the logged norm does not
    expected_norms = _logged(large.folder, "grad_norm")
    assert _logged(small.folder, "grad_norm") == pytest.approx(expected_norms, rel=1e-3)
    expected, found = _weights(large.folder), _weights(small.folder)
    for name, tensor in expected.items():
        # by norm: Adam makes a whole step of a gradient that is nothing but rounding
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name


def test_cached_features_change_nothing_but_their_rounding(recipe):
    common = ["answer_limit=0", "optim.max_steps=1"]
    fresh, _ = _run(recipe, *common, f"output={recipe.parent / 'fresh'}")
    cached, _ = _run(
        recipe, *common, "data.cache_features=true", f"output={recipe.parent / 'cached'}"
    )
    for name, value in fresh.before.items():
        assert cached.before[name] == pytest.approx(value, rel=2e-2, abs=2e-3), name


def test_overfitting_measures_on_the_clips_it_trains_on(recipe):
    result, _ = _run(recipe, "answer_limit=0", overfit=2)
    assert result.after["training clips/clips"] == 2


def test_a_checkpoint_holds_only_what_is_trained(recipe):
    result, _ = _run(recipe, "save_steps=6", "answer_limit=0")
    stored = _weights(result.folder / "checkpoint-6")
    assert all(name.startswith("adapter.") or ".lora_" in name for name in stored)


def test_a_trained_encoder_belongs_to_the_checkpoint(recipe):
    result, _ = _run(recipe, "model.train_encoder=true", "answer_limit=0", "optim.max_steps=2")
    assert any(name.startswith("speech_encoder.") for name in _weights(result.folder))
    from blspkd.model.loading import load_model

    model, _ = load_model(result.folder)
    stored = _weights(result.folder)
    assert all(torch.equal(model.get_parameter(name), stored[name]) for name in stored)


def test_gradient_checkpointing_gives_the_same_weights(recipe):
    common = ["answer_limit=0", "optim.max_steps=2", "optim.share_prompt=false"]
    plain, _ = _run(recipe, *common, f"output={recipe.parent / 'plain'}")
    checkpointed, _ = _run(
        recipe, *common, "optim.gradient_checkpointing=true", f"output={recipe.parent / 'ck'}"
    )
    expected, found = _weights(plain.folder), _weights(checkpointed.folder)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_held_out_clips_must_not_be_trained_on(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"4 of its clips are also in data\.train"):
        _run(recipe, f"data.eval.unseen={tmp_path / 'train.jsonl'}")


def test_response_losses_need_responses(recipe, tmp_path):
    records = read_manifest(tmp_path / "train.jsonl")
    bare = [dataclasses.replace(r, response=None, response_finished=None) for r in records]
    write_manifest(tmp_path / "bare.jsonl", bare)
    with pytest.raises(ValueError, match="blspkd respond"):
        _run(recipe, f"data.train={tmp_path / 'bare.jsonl'}")
    _, lines = _run(
        recipe,
        f"data.train={tmp_path / 'bare.jsonl'}",
        f"data.responses={tmp_path / 'train.jsonl'}",
        "optim.max_steps=1",
        "answer_limit=0",
    )
    assert "4 with a response" in lines[0]


def test_joined_responses_count_towards_the_length(recipe, tmp_path):
    records = read_manifest(tmp_path / "train.jsonl")
    bare = [dataclasses.replace(r, response=None, response_finished=None) for r in records]
    long = [dataclasses.replace(r, response="the sea " * 300) for r in records[:1]]
    write_manifest(tmp_path / "bare.jsonl", bare)
    write_manifest(tmp_path / "long.jsonl", [*long, *records[1:]])
    _, lines = _run(
        recipe,
        f"data.train={tmp_path / 'bare.jsonl'}",
        f"data.responses={tmp_path / 'long.jsonl'}",
        "optim.max_steps=1",
        "answer_limit=0",
    )
    assert "3 training clips" in lines[0]
    assert "dropped 1: more than 384 tokens" in lines[0]


def test_clips_that_are_too_long_are_counted(recipe):
    _, lines = _run(
        recipe, "data.max_duration=0.8", "optim.max_steps=1", "answer_limit=0", "data.eval={}"
    )
    assert "dropped 2: longer than 0.8 s" in lines[0]
    with pytest.raises(ValueError, match="no usable clip is left"):
        _run(recipe, "data.max_text_tokens=5", f"output={recipe.parent / 'other'}")


def test_clips_of_unknown_length_are_looked_at(recipe, tmp_path):
    records = read_manifest(tmp_path / "train.jsonl")
    unknown = [dataclasses.replace(record, duration=None) for record in records]
    write_manifest(tmp_path / "unknown.jsonl", unknown)
    found = f"data.train={tmp_path / 'unknown.jsonl'}"
    few = ("optim.max_steps=1", "answer_limit=0", "data.eval={}")
    _, lines = _run(recipe, found, "data.max_duration=0.8", *few)
    assert "dropped 2: longer than 0.8 s" in lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder=''", "model.encoder is not set"),
        ("data.train=''", "data.train is not set"),
        ("data.train=/nowhere.jsonl", "nowhere.jsonl"),
        ("trainer.seed=1", "trainer.seed is set by a field of its own"),
        ("trainer.optim=sgd", "AdamW with betas 0.9 and 0.98.*leave it out"),
        ("trainer.dataloader_drop_last=true", "got True: batches are made by length"),
        ("trainer.gradient_checkpointing=true", r"give optim\.gradient_checkpointing"),
        ("trainer.deepsped=x", "no field of transformers.TrainingArguments"),
    ],
)
def test_bad_values_are_named(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        _run(recipe, override)


def test_a_dry_run_describes_and_trains_nothing(recipe):
    text = dry_run(load_config(recipe), say=lambda _: None)
    assert "adapter 0.0" in text
    assert "input_ids (2, " in text
    assert not (recipe.parent / "run").exists()


def test_two_processes_take_the_steps_of_one(recipe):
    common = ["answer_limit=0", "optim.max_steps=2", "optim.learning_rate=1e-3"]
    still = ["model.adapter.dropout=0.0", "model.plora.lora_dropout=0.0"]
    alone, _ = _run(
        recipe, *common, *still, "optim.batch_size=2", f"output={recipe.parent / 'one'}"
    )
    two = recipe.parent / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "blspkd", "train", str(recipe), *common, *still]
    result = subprocess.run(
        [*command, "optim.batch_size=1", f"output={two}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # AdamW forgives a gradient its scale, the logged norm and losses do not
    for name in ("grad_norm", "loss/token", "loss/input_kl", "loss/response_kl", "loss/quantity"):
        assert _logged(two, name) == pytest.approx(_logged(alone.folder, name), rel=1e-3), name
    expected, found = _weights(alone.folder), _weights(two)
    for name, tensor in expected.items():
        # by norm: Adam makes a whole step of a gradient that is nothing but rounding
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name


def test_a_run_starts_from_another_ones_weights(recipe, tmp_path):
    first, _ = _run(recipe, "optim.max_steps=3", "model.plora=null", "answer_limit=0")
    second, lines = _run(
        recipe,
        "optim.max_steps=1",
        "optim.learning_rate=1e-30",
        "answer_limit=0",
        f"model.start_from={first.folder}",
        f"output={tmp_path / 'second'}",
    )
    assert any("starting from" in line and "fresh: plora" in line for line in lines)
    before, after = _weights(first.folder), _weights(second.folder)
    assert set(before) < set(after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-8)


def test_weights_that_do_not_fit_are_named(recipe, tmp_path):
    first, _ = _run(recipe, "optim.max_steps=1", "answer_limit=0")
    elsewhere = (f"model.start_from={first.folder}", f"output={tmp_path / 'second'}")
    with pytest.raises(ValueError, match=r"adapter\.\S+ is \(.*give model\.adapter"):
        _run(recipe, "model.adapter.hidden_size=24", *elsewhere)
    with pytest.raises(ValueError, match="no trained BLSP-KD model"):
        _run(recipe, f"model.start_from={tmp_path}", f"output={tmp_path / 'second'}")
