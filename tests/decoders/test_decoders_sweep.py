"""PLoRA in every class of transformers' causal-LM mapping, and in a quick dozen of them."""

from __future__ import annotations

import pytest
import transformers
from tests.decoders.build import entries
from tests.decoders.sweep import examine, failures
from tests.decoders.table import read

# Of each kind of decoder one or two: plain, with biases, Conv1D, sliding windows, parallel blocks,
# experts, compressed keys, recurrent states, layers in turn, a head under another name
QUICK = (
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "opt",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_next",
)
pytestmark = pytest.mark.timeout(120)


def kinds(row):
    """Verdicts without their wording."""
    return {name: verdict.partition(":")[0] for name, verdict in row.get("checks", {}).items()}


@pytest.mark.parametrize("model_type", QUICK)
def test_plora_in_a_decoder(model_type):
    row = examine(model_type)
    assert "checks" in row, row
    assert failures(row) == {}
    assert row["adapted"] > 0


@pytest.mark.decoders
@pytest.mark.parametrize("model_type", sorted(entries()))
def test_plora_in_every_decoder(model_type):
    record = read()
    row = examine(model_type)
    if record["versions"]["transformers"] != transformers.__version__:
        known = record["rows"].get(model_type, {})
        assert failures(row).keys() <= failures(known).keys()
        return
    recorded = record["rows"][model_type]
    again = "if this is meant: python -m tests.decoders.table sweep"
    assert ("missing" in row) == ("missing" in recorded), (row, again)
    assert kinds(row) == kinds(recorded), (row, again)
    assert row.get("left_out") == recorded.get("left_out"), again
