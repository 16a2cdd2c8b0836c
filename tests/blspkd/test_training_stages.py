"""Stages of a run: which losses count and which parts are trained, when."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import read_manifest
from blspkd.model.loading import load_config as load_model_config
from blspkd.model.loading import load_processor
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.objective import LossWeights, Objective
from blspkd.model.parts import part_of
from blspkd.training.config import LossesSection
from blspkd.training.config_file import load_config
from blspkd.training.run import train
from blspkd.training.schedule import check_schedule, weights_at
from blspkd.training.windows import LossSection, PartSection
from plora import PLoRALinear

PARTS = ("adapter", "encoder", "plora")


def _run(path, *overrides, **options):
    overrides = ("answer_limit=0", "data.eval={}", *overrides)
    return train(load_config(path, overrides), say=lambda _: None, **options)


def _log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def _weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_goes_from_the_token_loss_through_an_early_layer_to_the_response(recipe):
    result = _run(
        recipe,
        "losses.token={weight: 1, stop: 0.34}",
        "losses.layer_hidden={weight: 1, start: 0.33, stop: 0.67}",
        "losses.layer_kl={weight: 1, start: 0.5, stop: 0.67}",
        "losses.input_kl={weight: 1, start: 0.66}",
        "losses.response_kl={weight: 1, start: 0.66}",
        "losses.quantity=0",
    )
    active = [
        {k.partition("/")[2] for k in row if k.startswith("loss/")} for row in _log(result.folder)
    ]
    assert active == [
        {"token"},
        {"token"},
        {"token", "layer_hidden"},
        {"layer_hidden", "layer_kl"},
        {"input_kl", "response_kl", "layer_hidden", "layer_kl"},
        {"input_kl", "response_kl"},
    ]


def test_a_layer_that_the_language_model_lacks_is_named_before_anything_is_trained(recipe):
    with pytest.raises(ValueError, match="layers 1 to 2, got layer 3"):
        _run(recipe, "losses.layer_kl={weight: 1, start: 0.9}", "losses.layer=3")
    with pytest.raises(ValueError, match="losses: layer must be 1 for the first layer"):
        _run(recipe, "losses.layer=0")


def test_a_loss_rises_on_its_ramp():
    losses = LossesSection(input_kl=LossSection(2.0, start=0.5, stop=0.9, ramp=0.2))
    found = [weights_at(losses, at).input_kl for at in (0.49, 0.5, 0.55, 0.6, 0.7, 0.89, 0.9)]
    assert found == pytest.approx([0.0, 0.02, 0.5, 1.0, 2.0, 2.0, 0.0])
    with pytest.raises(ValueError, match=r"ramp must be a fraction of the run"):
        PartSection(ramp=2)


def _changed(before, after):
    assert set(before) == set(after)
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


STAGES = (
    "model.train_encoder=true",
    "optim.trained={adapter: {stop: 0.7}, plora: {start: 0.33, stop: 0.9}, encoder: {start: 0.5}}",
    "optim.encoder_learning_rate=1e-3",
    "losses.token={weight: 1, stop: 0.3}",
    "losses.input_kl={weight: 1, start: 0.16, ramp: 0.4}",
    "losses.response_kl={weight: 1, start: 0.5}",
    "save_steps=1",
    "keep_checkpoints=9",
)


def test_each_part_moves_in_its_window_alone_and_is_in_every_checkpoint(recipe):
    folder = _run(recipe, *STAGES).folder
    weights = [_weights(folder / f"checkpoint-{step}") for step in range(1, 7)]
    moved = [_changed(*pair) for pair in itertools.pairwise(weights)]
    assert moved == [
        {"adapter"},  # step 2 begins at 1/6 of the run
        {"adapter", "plora"},
        {"adapter", "plora", "encoder"},
        {"adapter", "plora", "encoder"},
        {"plora", "encoder"},
    ]
    assert {part_of(name) for name in weights[0]} == set(PARTS)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_resumed_between_the_stages_ends_where_an_uninterrupted_one_does(recipe, step):
    whole = _run(recipe, *STAGES, f"output={recipe.parent / 'whole'}").folder
    part = recipe.parent / "part"
    part.mkdir()
    os.rename(whole / f"checkpoint-{step}", part / f"checkpoint-{step}")
    resumed = _run(recipe, *STAGES, f"output={part}", resume=True).folder
    expected, found = _weights(whole), _weights(resumed)
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_learning_rates_are_each_parts_own_and_rise_on_its_ramp(recipe, tiny_parts):
    folder = _run(
        recipe,
        "model.train_encoder=true",
        "optim.weight_decay=0",
        "optim.learning_rate=1e-3",
        "optim.plora_learning_rate=1e-2",
        "optim.encoder_learning_rate=1e-4",
        "optim.trained.plora={start: 0.5, ramp: 0.5}",
        "optim.max_steps=4",
        "save_steps=1",
        "keep_checkpoints=9",
    ).folder
    weights = [_weights(folder / f"checkpoint-{step}") for step in range(1, 5)]

    def largest(part, before, after):
        moves = [(after[n] - before[n]).abs().max() for n in after if part_of(n) == part]
        return float(torch.stack(moves).max())

    # AdamW's first step is as long as the learning rate
    zero = {name: torch.zeros_like(tensor) for name, tensor in weights[0].items()}
    ramped = {n: t for n, t in weights[2].items() if n.endswith("lora_B")}
    assert largest("plora", zero, ramped) == pytest.approx(1e-2 * 0.01, rel=1e-2)
    later = {n: t for n, t in weights[3].items() if n.endswith("lora_B")}
    assert 1e-3 < largest("plora", ramped, later) < 1e-2
    stored = load_file(tiny_parts.encoder / "model.safetensors")
    prefix = "speech_encoder."
    first = {n: t for n, t in weights[0].items() if n.startswith(prefix)}
    untrained = {n: stored["model." + n.removeprefix(prefix)] for n in first}
    assert largest("encoder", untrained, first) == pytest.approx(1e-4, rel=1e-2)
    assert 2e-4 < largest("adapter", weights[0], weights[1]) < 2e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.trained.adapter.stop=0.5", "model.plora=null"], "no part is trained from 50%"),
        (
            [
                "optim.trained.adapter.start=0.2",
                "losses.input_kl.start=0.1",
                "losses.response_kl.start=0.1",
            ],
            r"from 0% of the run on only PLoRA.*token, quantity",
        ),
        (["optim.trained.encoder.start=1"], "expected 0 <= start < stop <= 1"),
    ],
)
def test_a_stage_in_which_nothing_can_be_learnt_is_refused(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(
            load_config(
                recipe, ["losses.input_kl.weight=1", "losses.response_kl.weight=1", *overrides]
            )
        )


@pytest.fixture
def model_and_batch(tiny_model, tiny_corpus):
    config = load_model_config(tiny_model)
    config.train_encoder = True
    model = BlspKDForConditionalGeneration.from_parts(config)
    processor = load_processor(config)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="Say: {speech}")
    return model, Collator(processor)([dataset[i] for i in range(3)])


@pytest.mark.parametrize(
    "parts", [{"adapter"}, {"plora"}, {"encoder"}, {"plora", "encoder"}, set(PARTS)]
)
def test_gradients_reach_the_parts_that_learn_and_no_others(model_and_batch, parts):
    model, batch = model_and_batch
    model.train()
    model(**batch, objective=Objective(LossWeights(token=1))).loss.backward()
    model.train_parts(parts)
    model.train()
    model(**batch, objective=Objective(LossWeights(token=1))).loss.backward()
    for name, parameter in model.named_parameters():
        learns = name in model.trained_names() and part_of(name) in parts
        assert (parameter.grad is not None) == learns, name
    assert {part_of(name) for name in model.trained_names()} == set(PARTS)
    # what is frozen drops nothing out
    assert model.adapter.training == ("adapter" in parts)
    plora = [one for one in model.language_model.modules() if isinstance(one, PLoRALinear)]
    assert plora
    assert all(one.training == ("plora" in parts) for one in plora)
    assert model.speech_encoder.training == ("encoder" in parts)
    model.train_parts(PARTS)
    assert all(model.get_parameter(name).requires_grad for name in model.trained_names())


def test_two_processes_go_through_the_stages_of_one(recipe):
    """Which parameters have gradients changes on the way; activations are recomputed too."""
    common = [
        "answer_limit=0",
        "data.eval={}",
        *STAGES[:5],
        "optim.max_steps=6",
        "optim.learning_rate=1e-3",
        "model.adapter.dropout=0.0",
        "model.plora.lora_dropout=0.0",
        "optim.gradient_checkpointing=true",
        "optim.share_prompt=false",
    ]
    alone = _run(recipe, *common, "optim.batch_size=2", f"output={recipe.parent / 'one'}").folder
    two = recipe.parent / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "blspkd", "train", str(recipe), *common, "optim.batch_size=1"]
    result = subprocess.run(
        [*command, f"output={two}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = _log(alone), _log(two)
    for name in ("grad_norm", "loss"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=5e-3)


def test_clips_are_cut_at_their_predicted_length_in_their_stretch_and_again_when_resumed(recipe):
    options = (
        "losses.predicted_length={fraction: 1, start: 0.5}",
        "losses.response_kl={weight: 1, stop: 0.8}",
        "save_steps=4",
    )
    whole = _run(recipe, *options, f"output={recipe.parent / 'whole'}").folder
    paired = [row["loss/token"] > 0 for row in _log(whole)]
    # without a response loss there is no use for it
    assert paired == [True, True, True, False, False, True]
    half = ("losses.predicted_length=0.5", "save_steps=3", "seed=3")
    whole = _run(recipe, *half, f"output={recipe.parent / 'half'}").folder
    part = recipe.parent / "part"
    part.mkdir()
    os.rename(whole / "checkpoint-3", part / "checkpoint-3")
    resumed = _run(recipe, *half, f"output={part}", resume=True).folder
    expected, found = _weights(whole), _weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match=r"losses.predicted_length: fraction must lie in \[0, 1\]"):
        load_config(recipe, ["losses.predicted_length=2"])


@pytest.mark.parametrize("inside", ["", "/checkpoint-2"])
def test_a_run_never_deletes_the_weights_it_is_to_begin_with(recipe, inside):
    few = ("answer_limit=0", "optim.max_steps=2", "save_steps=2")
    folder = _run(recipe, *few, f"output={recipe.parent / 'first'}").folder
    kept = (folder / "model.safetensors").read_bytes()
    for force in (True, False):
        with pytest.raises(ValueError, match="holds the weights that the run is to begin with"):
            _run(
                recipe, *few, f"model.start_from={folder}{inside}", f"output={folder}", force=force
            )
    assert (folder / "model.safetensors").read_bytes() == kept
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
