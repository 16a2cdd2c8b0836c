"""Stages of a run: which losses count and which parts are trained, when."""

import json

import pytest
from safetensors.torch import load_file

from blspkd.training.config_file import load_config
from blspkd.training.run import train


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
