"""Responses are the language model's own greedy words, each written once, whatever interrupts."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from blspkd.__main__ import main
from blspkd.data.manifest import read_manifest, write_manifest
from blspkd.data.respond import RespondConfig, answered, respond
from blspkd.model.bases import load_feature_extractor, load_language_model, load_tokenizer
from blspkd.model.processing import BlspKDProcessor
from blspkd.model.prompts import as_messages

CONFIG = RespondConfig(prompt="Say: {speech}", max_new_tokens=6, batch_size=2)


@pytest.fixture(scope="module")
def parts(tiny_parts):
    model = load_language_model(str(tiny_parts.language_model), dtype=torch.float32)
    processor = BlspKDProcessor(
        load_feature_extractor(str(tiny_parts.encoder)),
        load_tokenizer(str(tiny_parts.language_model)),
    )
    return model, processor


@pytest.fixture
def records(tiny_corpus):
    return read_manifest(tiny_corpus.manifest)


def _greedy(model, processor, text):
    """Token by token, without a cache or a batch."""
    ids = list(processor.tokenize_turn(as_messages(CONFIG.prompt), text).input_ids)
    new: list[int] = []
    while len(new) < CONFIG.max_new_tokens and processor.tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    finished = processor.tokenizer.eos_token_id in new
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip(), finished


def test_responses_are_the_greedy_answers_to_the_transcripts(parts, records, tmp_path):
    out = tmp_path / "out.jsonl"
    assert respond(records, out, *parts, CONFIG) == 6
    written = read_manifest(out)
    assert [record.id for record in written] == [record.id for record in records]
    for record in written:
        expected, finished = _greedy(*parts, record.text)
        assert record.response == expected
        assert record.response_finished == finished


@pytest.mark.parametrize("cut", [1, 40])
def test_a_run_cut_off_in_the_middle_of_a_line_goes_on(parts, records, tmp_path, cut):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    respond(records, whole, *parts, CONFIG)
    respond(records[:3], out, *parts, CONFIG)
    out.write_bytes(out.read_bytes()[:-cut])
    assert len(answered(out)) == 2
    assert respond(records, out, *parts, CONFIG) == 4
    assert out.read_text() == whole.read_text()


def test_a_broken_line_further_up_is_not_repaired_in_silence(parts, records, tmp_path):
    out = tmp_path / "out.jsonl"
    respond(records, out, *parts, CONFIG)
    lines = out.read_text().splitlines()
    lines[1] = lines[1][:20]
    out.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"out\.jsonl:2"):
        respond(records, out, *parts, CONFIG)


def _command(tiny_parts, *arguments):
    models = ["--language-model", tiny_parts.language_model, "--encoder", tiny_parts.encoder]
    return main(["respond", *map(str, [*arguments, *models])])


def test_shards_share_the_work(tiny_parts, tiny_corpus, records, tmp_path, capsys):
    ids = []
    for index in range(2):
        out = tmp_path / f"shard{index}.jsonl"
        options = ["--shard", f"{index}/2", "--max-new-tokens", 3, "--json"]
        assert _command(tiny_parts, tiny_corpus.manifest, out, *options) == 0
        assert json.loads(capsys.readouterr().out) == {"written": 3, "records": 3}
        ids += [record.id for record in read_manifest(out)]
    assert sorted(ids) == sorted(record.id for record in records)


def test_what_is_there_already_is_left_alone(tiny_parts, tiny_corpus, records, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    write_manifest(out, records[:1])
    before = out.read_text()
    assert _command(tiny_parts, tiny_corpus.manifest, out) == 1
    assert "--resume" in capsys.readouterr().err
    assert out.read_text() == before
    assert _command(tiny_parts, tiny_corpus.manifest, out, "--shard", "2/2") == 2


def test_the_source_is_never_overwritten(tiny_parts, tiny_corpus, tmp_path, capsys):
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, read_manifest(tiny_corpus.manifest))
    before = manifest.read_bytes()
    for option in ("--force", "--resume"):
        assert _command(tiny_parts, manifest, manifest, option) == 1
        assert "would overwrite the source" in capsys.readouterr().err
    assert manifest.read_bytes() == before


def test_what_cannot_be_asked_costs_nothing_that_is_there(
    tiny_parts, tiny_corpus, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    options = [tiny_corpus.manifest, out, "--force", "--limit", 2]
    assert _command(tiny_parts, *options, "--max-new-tokens", 3) == 0
    before = out.read_bytes()
    assert _command(tiny_parts, *options, "--max-new-tokens", 100_000) == 1
    assert "the language model reads" in capsys.readouterr().err
    assert _command(tiny_parts, *options, "--prompt", "hello") == 2
    assert "expected {speech} exactly once" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert _command(tiny_parts, *options, "--max-new-tokens", 4) == 0
    assert len(read_manifest(out)) == 2
    assert out.read_bytes() != before


def test_a_shard_without_clips_is_named(tiny_parts, tiny_corpus, tmp_path, capsys):
    assert _command(tiny_parts, tiny_corpus.manifest, tmp_path / "o", "--shard", "8/9") == 1
    assert "--shard 8/9: expected a share of the clips" in capsys.readouterr().err


def test_a_run_cut_off_in_the_middle_of_a_character_goes_on(parts, records, tmp_path):
    out = tmp_path / "out.jsonl"
    respond(records[:2], out, *parts, CONFIG)
    whole = out.read_bytes()
    out.write_bytes(whole + '{"audio": "é'.encode()[:-1])
    assert len(answered(out)) == 2
    assert out.read_bytes() == whole


def test_the_model_is_put_where_it_is_wanted(tiny_parts, tiny_corpus, tmp_path, monkeypatch):
    placed = []

    def only_look(records, out, model, *rest, **options):
        placed.append(next(model.parameters()).device.type)
        return 0

    monkeypatch.setattr("blspkd.data.respond.respond", only_look)
    out = tmp_path / "out.jsonl"
    assert _command(tiny_parts, tiny_corpus.manifest, out, "--device", "meta") == 0
    assert _command(tiny_parts, tiny_corpus.manifest, out) == 0
    assert placed == ["meta", "cuda" if torch.cuda.is_available() else "cpu"]


def test_code_of_a_language_model_runs_only_where_it_is_asked_for(
    tiny_parts, tiny_corpus, tmp_path, capfd
):
    own = tmp_path / "own"
    shutil.copytree(tiny_parts.language_model, own)
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own"
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own"\n\n'
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    parts = replace(tiny_parts, language_model=own)
    options = [tiny_corpus.manifest, tmp_path / "out.jsonl", "--limit", 1, "--max-new-tokens", 2]
    assert _command(parts, *options) == 1
    assert "trust_remote_code" in capfd.readouterr().err
    assert _command(parts, *options, "--trust-remote-code") == 0
