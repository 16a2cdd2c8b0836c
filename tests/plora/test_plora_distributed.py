"""Two processes of gloo take the steps of one: data parallel, and fully sharded (FSDP2)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plora import plora_state_dict

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcome(script, tmp_path_factory):
    """What both processes found, and the folder that they saved into."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(script.PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(script.PROCESSES)], folder


@pytest.mark.parametrize("case", ["all", "one empty"])
@pytest.mark.parametrize(
    "how", ["ddp, {}", "fsdp, {}, checkpointing False", "fsdp, {}, checkpointing True"]
)
def test_two_processes_take_the_steps_of_one(script, outcome, how, case):
    one = script.build()
    before = {name: value.clone() for name, value in plora_state_dict(one).items()}
    script.train(one, *script.batch(script.CASES[case]))
    for found in outcome[0]:
        found = found[how.format(case)]
        for name, value in plora_state_dict(one).items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)
            assert not torch.equal(value, before[name])


def test_a_sharded_model_is_saved_whole(outcome):
    found, folder = outcome
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = found[0]["fsdp, one empty, checkpointing True"]
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
