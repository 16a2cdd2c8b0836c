"""optim.average_with_start: the mean of the weights before and after a run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from blspkd.training.config_file import load_config
from blspkd.training.run import train


def _run(path, *overrides, **options):
    overrides = ("answer_limit=0", "optim.learning_rate=1e-2", "optim.max_steps=3", *overrides)
    return train(load_config(path, overrides), say=lambda _: None, **options)


def _weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def first(recipe):
    return _run(recipe, f"output={recipe.parent / 'first'}").folder


@pytest.fixture
def go_on(recipe, first):
    def run(name, *overrides, **options):
        places = (f"model.start_from={first}", f"output={recipe.parent / name}", "save_steps=1")
        return _run(recipe, *places, "seed=1", *overrides, **options)

    return run


def test_a_run_leaves_the_mean_and_its_checkpoints_do_not(first, go_on):
    late = "optim.trained.plora={start: 0.5}"  # a part that is not trained from the first step on
    folder = go_on("second", "optim.average_with_start=0.25", late).folder
    start, found = _weights(first), _weights(folder)
    trained = _weights(folder / "checkpoint-3")
    assert set(found) == set(start)
    moved = [name for name in found if not torch.equal(start[name], trained[name])]
    assert any(".lora_" in name for name in moved)
    for name in found:
        expected = 0.75 * trained[name].double() + 0.25 * start[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)
    plain = go_on("plain", late)
    for name, tensor in _weights(plain.folder).items():
        assert torch.equal(tensor, trained[name]), name


def test_the_figures_after_are_those_of_the_mean(first, go_on, recipe):
    averaged = go_on("averaged", "optim.average_with_start=0.5")
    still = (f"model.start_from={averaged.folder}", "optim.learning_rate=1e-30")
    again = _run(recipe, *still, "optim.max_steps=1", f"output={recipe.parent / 'again'}")
    assert averaged.after
    for name, value in averaged.after.items():
        assert again.before[name] == pytest.approx(value, rel=1e-5), name
    assert averaged.after != go_on("plain").after


def test_a_resumed_run_averages_with_what_it_began_with(first, go_on, recipe):
    whole = go_on("whole", "optim.average_with_start=0.5").folder
    part = recipe.parent / "part"
    part.mkdir()
    os.rename(whole / "checkpoint-2", part / "checkpoint-2")
    resumed = go_on("part", "optim.average_with_start=0.5", resume=True).folder
    assert json.loads((resumed / "trainer_state.json").read_text())["global_step"] == 3
    expected, found = _weights(whole), _weights(resumed)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_two_processes_leave_the_mean(first, recipe):
    two = recipe.parent / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    places = [f"model.start_from={first}", f"output={two}", "save_steps=1", "answer_limit=0"]
    options = ["optim.max_steps=2", "optim.batch_size=1", "optim.average_with_start=0.5"]
    result = subprocess.run(
        [*launch, "-m", "blspkd", "train", str(recipe), *places, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    start, found, trained = _weights(first), _weights(two), _weights(two / "checkpoint-2")
    assert any(not torch.equal(start[name], trained[name]) for name in found)
    for name, tensor in found.items():
        mean = 0.5 * (trained[name].double() + start[name].double())
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("override", "variable", "named"),
    [
        ("trainer.fsdp=full_shard", None, "FSDP"),
        ("trainer.deepspeed=zero3.json", None, "DeepSpeed"),
        ("optim.max_steps=1", "ACCELERATE_USE_FSDP", "FSDP"),
        ("optim.max_steps=1", "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ],
)
def test_shards_are_not_averaged(recipe, monkeypatch, override, variable, named):
    if variable is not None:
        monkeypatch.setenv(variable, "true")
    share, nowhere = "optim.average_with_start=0.5", recipe.parent / "nowhere"
    with pytest.raises(ValueError, match=f"with {named} they are in shards: set it to 0"):
        _run(recipe, share, "model.start_from=somewhere", override, f"output={nowhere}")
    assert not nowhere.exists()


@pytest.mark.parametrize("share", [-0.1, 1, "nan"])
def test_a_share_is_a_share(recipe, share):
    elsewhere = "model.start_from=somewhere"
    with pytest.raises(ValueError, match="average_with_start must be at least 0 and below 1"):
        load_config(recipe, [f"optim.average_with_start={share}", elsewhere])


def test_without_a_start_there_is_nothing_to_average_with(recipe):
    with pytest.raises(ValueError, match=r"model\.start_from, which is null"):
        load_config(recipe, ["optim.average_with_start=0.5"])
