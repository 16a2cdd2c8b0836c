"""README.md's figures are those of the result files."""

import json
from pathlib import Path

from benchmarks.readme import RESULTS, filled, run_table

ROOT = Path(__file__).parents[2]


def test_the_tables_are_what_the_results_say():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert filled(readme) == readme, "run `python -m benchmarks.readme write`"


def test_every_part_has_its_results():
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in ("tiny", "real"):
        assert f"<!-- results: {name} -->" in readme
        assert json.loads((RESULTS / f"{name}.json").read_text())["after"]


def test_a_figure_stands_in_its_set_and_row():
    table = run_table(
        {
            "before": {"a/input_kl": 2.0, "b/input_kl": 3.0},
            "after": {
                "a/clips": 4,
                "a/input_kl": 1.0,
                "b/clips": 5,
                "b/input_kl": 1.5,
                "b/same_answer": 0.5,
            },
        }
    )
    assert table.splitlines() == [
        "| held-out clips | a (4) | b (5) |",
        "|---|---|---|",
        "| KL after each token of the utterance (nats) | 2.00 -> 1.00 | 3.00 -> 1.50 |",
        "| very same answer to speech as to text |  | 50.0% |",
    ]
