"""An interrupted run: the checkpoint it leaves, the command it names, what it goes on with."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from blspkd.training.config_file import load_config
from blspkd.training.run import train


def _run(path, *overrides, **options):
    config = load_config(path, ("answer_limit=0", *overrides))
    return train(config, say=lambda _: None, **options)


def test_interrupted_it_leaves_a_checkpoint_and_goes_on(recipe):
    # no output in it: two runs of one name, of which the second is interrupted
    values = yaml.safe_load(recipe.read_text())
    del values["output"]
    recipe.write_text(yaml.safe_dump(values))
    first = recipe.parent / "runs" / "recipe"
    first.mkdir(parents=True)
    (first / "taken").touch()
    options = ["answer_limit=0", "data.eval={}", "optim.max_steps=5000", "--overfit", "4"]
    command = [sys.executable, "-m", "blspkd", "train", recipe.name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=recipe.parent
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    [checkpoint] = (recipe.parent / "runs" / "recipe-2").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    named = shlex.split(rest.partition("go on with: ")[2])
    assert named[:3] == ["blspkd", "train", recipe.name]
    assert {"output=runs/recipe-2", "--overfit", "--resume", "data.eval={}"} <= set(named)
    again = [f"optim.max_steps={step + 2}" if "max_steps" in one else one for one in named[1:]]
    subprocess.run(
        [sys.executable, "-m", "blspkd", *again], check=True, env=environment, cwd=recipe.parent
    )
    assert (recipe.parent / "runs" / "recipe-2" / "model.safetensors").exists()


def test_two_processes_stop_together_when_one_is_told(recipe):
    """By SIGTERM, which batch systems send."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["answer_limit=0", "data.eval={}", "optim.max_steps=5000", "optim.batch_size=1"]
    folder = recipe.parent / "two"
    with subprocess.Popen(
        [*launch, "-m", "blspkd", "train", recipe.name, *options, f"output={folder}"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=recipe.parent,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2/"):
                os.kill(_process_of_rank(1, process.pid), signal.SIGTERM)
                break
        try:
            _, rest = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the one that waits, too
            raise
    assert rest.count("go on with: ") == 1, rest
    [checkpoint] = folder.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert f"checkpoint-{state['global_step']}" == checkpoint.name
    assert not (folder / "model.safetensors").exists()


def _process_of_rank(rank, launcher):
    """Of torchrun's children, the one that has this rank."""
    children = subprocess.run(
        ["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=True
    ).stdout.split()
    for child in children:
        with open(f"/proc/{child}/environ", "rb") as file:
            if f"RANK={rank}".encode() in file.read().split(b"\0"):
                return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


def test_a_run_interrupted_in_its_last_step_is_finished(recipe):
    # two steps an epoch: from within one, Trainer would go on to its end
    options = ["save_steps=5", "optim.max_steps=5"]
    whole = _run(recipe, *options, f"output={recipe.parent / 'whole'}")
    part = recipe.parent / "part"
    part.mkdir()
    os.rename(whole.folder / "checkpoint-5", part / "checkpoint-5")
    resumed = _run(recipe, *options, f"output={part}", resume=True)
    assert resumed.after == pytest.approx(whole.after, rel=1e-5)
    assert json.loads((part / "trainer_state.json").read_text())["global_step"] == 5
    expected, found = (load_file(one / "model.safetensors") for one in (whole.folder, part))
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resumed_run_has_the_settings_it_began_with(recipe):
    folder = _run(recipe, "save_steps=3").folder
    written = (folder / "train.yaml").read_text()
    (folder / "model.safetensors").unlink()
    changes = ("optim.learning_rate=1e-5", "losses.token=0.5", "model.plora.r=2")
    expected = r"losses.token.weight was 1.0, got 0.5; optim.learning_rate was 0.003, got 1e-05"
    with pytest.raises(ValueError, match=rf"model.plora.r was 4, got 2; {expected}"):
        _run(recipe, "save_steps=3", *changes, resume=True)
    with pytest.raises(ValueError, match="--overfit was 0, got 2"):
        _run(recipe, overfit=2, resume=True)
    with pytest.raises(ValueError, match=r"optim.max_steps was 6, got None"):
        _run(recipe, "optim.max_steps=null", resume=True)
    assert (folder / "train.yaml").read_text() == written
    _run(recipe, "save_steps=2", "log_steps=2", "optim.max_steps=7", resume=True)
    assert yaml.safe_load((folder / "train.yaml").read_text())["config"]["optim"]["max_steps"] == 7
    assert (folder / "model.safetensors").exists()
