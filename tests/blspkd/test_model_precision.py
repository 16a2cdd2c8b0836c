"""Who asks for a 16-bit type that the processor cannot multiply in is told, and by every verb."""

from types import MappingProxyType

import pytest
import torch

from blspkd.__main__ import main
from blspkd.model.precision import _INSTRUCTIONS, slow_type_warning
from blspkd.training.config_file import load_config
from blspkd.training.dry_run import dry_run
from blspkd.training.run import train

CPU = torch.device("cpu")
LAPTOP = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "amx_bf16": False}
SERVER = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_fp16": False}
ARM = {"architecture": "aarch64", "neon": True, "bf16": False}


@pytest.fixture
def on(monkeypatch):
    def machine(found):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: MappingProxyType(found), raising=False
        )

    return machine


@pytest.mark.parametrize(
    ("found", "dtype", "slow"),
    [
        (LAPTOP, torch.bfloat16, True),
        (LAPTOP, torch.float16, True),
        (LAPTOP, torch.float32, False),
        (LAPTOP | {"avx_ne_convert": True}, torch.bfloat16, False),
        (SERVER, torch.bfloat16, False),
        (SERVER, torch.float16, True),
        (SERVER | {"avx512_fp16": True}, torch.float16, False),
        (ARM, torch.bfloat16, False),
    ],
)
def test_a_type_is_slow_where_no_instruction_multiplies_it(on, found, dtype, slow):
    on(found)
    warning = slow_type_warning(dtype, CPU, remedy="give --this")
    assert (warning is not None) == slow
    if slow:
        assert str(dtype).removeprefix("torch.") in warning
        assert "give --this" in warning
    assert slow_type_warning(dtype, torch.device("cuda:0"), remedy="") is None


def test_nothing_is_claimed_where_torch_does_not_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert slow_type_warning(torch.bfloat16, CPU, remedy="") is None


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell instructions"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_names_are_those_that_torch_uses(dtype):
    found = torch.cpu.get_capabilities()
    if found["architecture"] != "x86_64":
        pytest.skip("the names are x86-64's")
    assert set(_INSTRUCTIONS[dtype]) <= set(found)


def test_a_run_names_both_fields_that_would_change_it(on, recipe):
    on(LAPTOP)
    said: list[str] = []
    dry_run(load_config(recipe, ["model.dtype=bfloat16"]), say=said.append)
    assert [line for line in said if "model.dtype=float32" in line]
    assert not [line for line in said if "optim.bf16=false" in line]
    said.clear()
    short = ["optim.max_steps=1", "data.eval.unseen=null", "answer_limit=0"]
    train(load_config(recipe, ["optim.bf16=true", *short]), say=said.append)
    assert [line for line in said if "optim.bf16=false" in line]
    assert not [line for line in said if "model.dtype=float32" in line]


@pytest.mark.parametrize("verb", ["generate", "eval", "respond"])
def test_verbs_name_their_option(on, verb, tiny_model, tiny_parts, tiny_corpus, tmp_path, capsys):
    on(LAPTOP)
    parts = ["--language-model", tiny_parts.language_model, "--encoder", tiny_parts.encoder]
    arguments = {
        "generate": [tiny_model, tiny_corpus.audio[0], "--max-new-tokens", 2],
        "eval": [tiny_model, tiny_corpus.manifest, "--task", "asr", "--output", tmp_path],
        "respond": [tiny_corpus.manifest, tmp_path / "out.jsonl", "--limit", 1, *parts],
    }[verb]
    force = [] if verb == "generate" else ["--force"]
    for dtype, warned in (("bfloat16", True), ("float32", False)):
        assert main([verb, *map(str, arguments), "--dtype", dtype, *force]) == 0
        assert ("give --dtype float32" in capsys.readouterr().err) == warned
