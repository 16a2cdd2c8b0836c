"""`blspkd info`: what it says, against what there is."""

import json
import shutil

import pytest
import yaml
from transformers import AutoModelForCausalLM, WhisperModel

from blspkd.__main__ import main
from blspkd.model.loading import load_model


@pytest.fixture
def info(capsys):
    def call(*arguments):
        code = main(["info", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_loaded_model(info, tiny_model, tiny_parts):
    code, out, err = info(tiny_model, "--json")
    assert code == 0, err
    parts = json.loads(out)["parts"]
    model, _ = load_model(tiny_model)
    assert parts["adapter"]["trained"] == size(model.adapter)
    encoder = WhisperModel.from_pretrained(tiny_parts.encoder).encoder
    assert parts["encoder"]["frozen"] == size(encoder)
    assert parts["encoder"]["trained"] == 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_parts.language_model)
    assert parts["language model"]["frozen"] == size(plain)  # the tied head counts once
    assert parts["PLoRA"]["trained"] == size(model.language_model) - size(plain)
    assert sum(part["trained"] for part in parts.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )


def test_a_run_tells_its_losses_and_steps(info, tiny_model, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoint-3"
    shutil.copytree(tiny_model, checkpoint)
    (run / "train.yaml").write_text(
        "config:\n"
        "  losses:\n"
        "    token: {weight: 0.0, start: 0.0, stop: 1.0}\n"
        "    input_kl: {weight: 2.0, start: 0.5, stop: 1.0}\n"
        "    temperature: 2.0\n"
    )
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    code, out, err = info(checkpoint)
    assert code == 0, err
    assert "losses: input_kl 2 from 50% to 100%, temperature 2.0" in out
    assert "steps: 3" in out
    assert "adapter" in out
    assert "trained in" not in out  # a checkpoint has no log
    code, _, err = info(run)
    assert (code, "checkpoint-3 can be used" in err) == (1, True)


def test_a_run_tells_what_it_and_the_runs_before_took(info, tiny_model, tmp_path):
    def log_of(folder, steps, clips_per_second, start_from=None):
        losses = {"predicted_length": {"fraction": 0.25}, "token": {"weight": 1.0}}
        config = {
            "optim": {"batch_size": 4, "gradient_accumulation": 1},
            "model": {"start_from": start_from},
            "log_steps": 10,
            "losses": losses,
        }
        (folder / "train.yaml").write_text(yaml.safe_dump({"config": config, "processes": 2}))
        line = {"step": steps, "clips_per_second": clips_per_second}
        (folder / "log.jsonl").write_text(json.dumps(line))

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(tiny_model, folder)
    log_of(first, 3000, 40.0)
    log_of(second, 150, 10.0, str(first))
    code, out, err = info(second)
    assert code == 0, err
    assert f"trained in {first}: 3,000 steps, 24,000 clips seen, 10.0 minutes\n" in out
    assert f"trained in {second}: 150 steps, 1,200 clips seen, 2.0 minutes\n" in out
    assert out.index(str(first)) < out.index(f"in {second}")
    assert "losses: predicted_length 0.25, token 1\n" in out
    _, out, _ = info(second, "--json")
    assert json.loads(out)["training"][str(first)]["train_seconds"] == 600


def test_parts_that_moved_away_are_not_at_hand(info, tiny_model):
    code, out, err = info(tiny_model, "--encoder", "/nowhere/encoder")
    assert code == 0, err
    assert "not at hand" in out


def test_a_manifest_is_counted(info, tiny_corpus):
    code, out, err = info(tiny_corpus.manifest, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["clips"] == found["with_response"] == 6
    durations = [0.6 + 0.15 * i for i in range(6)]
    assert found["hours"] == pytest.approx(sum(durations) / 3600, rel=1e-3)
    assert found["other_columns"] == ["translation"]
    code, out, _ = info(tiny_corpus.manifest)
    assert out.startswith("6 clips, 0.00 h\nwith a response: 6, without: 0\n")


def test_neither_model_nor_manifest(info, tmp_path):
    code, _, err = info(tmp_path / "nothing")
    assert (code, "no such" in err) == (1, True)
    (tmp_path / "broken.jsonl").write_text('{"audio": ')
    code, _, err = info(tmp_path / "broken.jsonl")
    assert (code, "broken.jsonl:1" in err) == (1, True)
