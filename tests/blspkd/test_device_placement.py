"""Every verb keeps its tensors together on a device other than the CPU, and says the same there."""

import json
import math

import pytest
import torch
from accelerate import PartialState
from tests.blspkd.pretended_device import NAME, pretended_device
from transformers import TrainingArguments

from blspkd.__main__ import main
from blspkd.training.config_file import load_config
from blspkd.training.run import train


@pytest.fixture
def elsewhere(monkeypatch):
    with pretended_device(monkeypatch) as device:
        yield device


def test_mixing_is_noticed(elsewhere):
    layer = torch.nn.Linear(4, 3).to(elsewhere)
    here, there = torch.randn(2, 4), torch.randn(2, 4, device=elsewhere)
    with pytest.raises(RuntimeError, match="two devices"):
        layer(here)
    with pytest.raises(RuntimeError, match="two devices"):
        there + here
    with pytest.raises(RuntimeError, match="two devices"):
        here[torch.tensor([0, 1], device=elsewhere)]
    with pytest.raises(RuntimeError, match="two devices"):
        there[torch.tensor([0])] = here[:1]
    layer(there).sum().backward()
    assert layer.weight.grad.device.type == NAME
    expected = there.cpu().sum(0).expand(3, 4)
    torch.testing.assert_close(layer.weight.grad.cpu(), expected)
    there[torch.tensor([True, False])] = 2.0
    assert there[0].tolist() == [2.0] * 4
    assert there.argmax(-1)[0].item() == 0


@pytest.mark.parametrize("verb", ["generate", "eval", "respond"])
def test_a_verb_says_what_it_says_on_the_cpu(
    verb, tiny_model, tiny_parts, tiny_corpus, tmp_path, monkeypatch, capsys
):
    parts = ["--language-model", tiny_parts.language_model, "--encoder", tiny_parts.encoder]

    def call(device):
        out = tmp_path / device
        arguments = {
            "generate": [tiny_model, *tiny_corpus.audio[:2], "--transcript"],
            "eval": [tiny_model, tiny_corpus.manifest, "--task", "continue", "--output", out],
            "respond": [tiny_corpus.manifest, out, *parts],
        }[verb]
        options = ["--max-new-tokens", 5, "--device", device, "--json"]
        assert main(["--debug", verb, *map(str, [*arguments, *options])]) == 0
        lines = capsys.readouterr().out.splitlines()
        if verb == "respond":
            lines += out.read_text().splitlines()
        return [json.loads(line) for line in lines]

    expected = call("cpu")
    with pretended_device(monkeypatch) as device:
        found = call(device.type)
    _assert_same(found, expected)


RUNS = {
    "soft": "model.speech_embedding=soft model.token_spelling=16 losses.layer_kl=1 losses.layer=1 "
    "model.length_search=3 model.length_search_lm_weight=0.2 answer_limit=1 data.eval_limit=1",
    "conv": "model.adapter_type=conv model.adapter={} losses.response_ce=1 losses.token=0 "
    "losses.input_kl=0 losses.quantity=0 data.eval.unseen=null",
    "encoder": "model.train_encoder=true data.cache_features=false model.plain_lora=true "
    "optim.gradient_checkpointing=true losses.predicted_length=0.5 losses.layer_hidden=1 "
    "losses.layer=1 data.eval.unseen=null",
    "alignment": "losses.alignment=1 data.cache_features=true data.augment.noise.probability=1 "
    "data.eval.unseen=null",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_its_tensors_together(name, recipe, tmp_path, monkeypatch):
    few = [f"output={tmp_path / 'run'}", "optim.max_steps=2", "log_steps=1", "save_steps=null"]
    config = load_config(recipe, [*few, *RUNS[name].split()])

    def set_up(arguments):
        arguments.distributed_state, arguments._n_gpu = PartialState(), 1
        return device

    PartialState(cpu=True)
    with pretended_device(monkeypatch) as device:
        monkeypatch.setitem(PartialState._shared_state, "device", device)
        monkeypatch.setattr(TrainingArguments, "_setup_devices", property(set_up))
        result = train(config, say=lambda text: None)
    log = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, [*losses, *result.after.values()]))


def _assert_same(found, expected):
    found, expected = dict(_values(found)), dict(_values(expected))
    assert list(found) == list(expected)
    for place, value in expected.items():
        exact = not isinstance(value, float)
        assert found[place] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-5)), place


def _values(found, path=""):
    """What was found, each figure and text by its place, but for how long it took."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if key in ("seconds", "folder"):
            continue
        if isinstance(value, dict | list):
            yield from _values(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value
