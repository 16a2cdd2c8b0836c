"""`blspkd export`: a small folder that is the model, and nothing half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blspkd.__main__ import main
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.loading import load_model


@pytest.fixture
def export(capsys):
    def run(*arguments):
        code = main(["export", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out if code == 0 else out.err

    return run


@pytest.fixture
def evaluation(tmp_path):
    rows = {
        "text": {"self_rouge_l": 1.0},
        "cascade": {"transcript_wer": 0.25, "self_rouge_l": 0.5},
        "speech": {"transcript_wer": 0.125, "self_rouge_l": 0.375},
    }
    metrics = {
        "manifest": "somewhere/held-out-voice.jsonl",
        "task": "continue",
        "clips": 7,
        "rows": rows,
        "meters": {"clips": 7.0, "token_accuracy": 0.75, "length_exact": None},
    }
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_folder_holds_the_model_in_half_the_bytes(export, tiny_model, tmp_path):
    where = tmp_path / "new" / "release"
    code, said = export(tiny_model, where)
    assert code == 0
    assert {path.name for path in where.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert len({path.stat().st_mode for path in where.iterdir()}) == 1
    size = sum(path.stat().st_size for path in where.iterdir())
    assert said == f"{where}: {size / 1e6:.1f} MB\n"
    assert (where / "model.safetensors").stat().st_size < 0.6 * (
        tiny_model / "model.safetensors"
    ).stat().st_size
    (before, _), (after, _) = load_model(tiny_model), load_model(where)
    assert before.config.to_dict() == after.config.to_dict()
    for name in before.trained_names():
        found = after.get_parameter(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, before.get_parameter(name).bfloat16().float()), name


def test_float32_is_exact(export, tiny_model, tmp_path):
    assert export(tiny_model, tmp_path / "out", "--dtype", "float32")[0] == 0
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_readme_names_the_parts_and_quotes_the_evaluation(
    export, tiny_model, evaluation, tmp_path
):
    names = ("--encoder", "openai/whisper-base", "--language-model", "someone/llm")
    code, _ = export(
        tiny_model, tmp_path / "out", *names, "--evaluation", evaluation, "--license", "apache-2.0"
    )
    assert code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: blspkd\nbase_model:\n- openai/whisper-base\n")
    assert "license: apache-2.0" in card
    assert "--encoder openai/whisper-base --language-model someone/llm" in card
    for line in (
        "|  | held-out-voice, continue (7 clips) |",
        "| token accuracy | 0.750 |",
        "| speech: transcript WER % | 12.5 |",
        "| cascade: transcript WER % | 25.0 |",
        "| speech: Self-ROUGE-L | 0.375 |",
    ):
        assert line in card
    assert "exact length" not in card
    config = BlspKDConfig.from_pretrained(tmp_path / "out")
    assert (config.encoder, config.language_model) == (names[1], names[3])


def test_nothing_is_overwritten_and_nothing_left_half_written(export, tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    link = tmp_path / "link"
    link.symlink_to(out)
    assert export(tiny_model, link)[0] == 0  # empty: it may be there
    assert link.is_symlink()
    link.unlink()
    code, said = export(tiny_model, out)
    assert code == 1
    assert "exists already" in said
    weights = load_file(tiny_model / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1e6 + 1e6
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((tiny_model / "config.json").read_text())
    save_file(weights, source / "model.safetensors")
    code, said = export(source, tmp_path / "half", "--dtype", "float16")
    assert code == 1
    assert f"{name} does not fit torch.float16" in said
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_what_is_no_model_or_no_evaluation_is_named(export, tiny_model, tmp_path):
    code, said = export(tmp_path / "nowhere", tmp_path / "out")
    assert (code, "no such folder" in said) == (1, True)
    code, said = export(tiny_model, tmp_path / "out", "--evaluation", tmp_path)
    assert (code, "no metrics.json" in said) == (1, True)
    assert not (tmp_path / "out").exists()
