"""The READMEs' figures are those of the result files."""

import json
import re

import pytest
from benchmarks import readme
from benchmarks.readme import DOCUMENTS, RESULTS, ROOT, filled, run_table


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_are_what_the_results_say(document):
    assert filled(document) == document.read_text("utf-8"), (
        "run `python -m benchmarks.readme write`"
    )


def test_every_part_has_its_results():
    written = (ROOT / "README.md").read_text("utf-8")
    for name in ("tiny", "real"):
        assert f"<!-- results: {name} -->" in written
        assert json.loads((RESULTS / f"{name}.json").read_text())["after"]


def test_the_best_recipe_is_shown_as_the_matrix_has_it():
    readme_text = (ROOT / "README.md").read_text("utf-8")
    part = readme_text.partition("<!-- results: best -->")[2].partition("<!--")[0]
    columns = list(zip(*(line.split(" | ")[1:] for line in part.strip().splitlines()), strict=True))
    shown = [[re.sub(r" \(cascade.*| \|", "", cell) for cell in column] for column in columns]
    rows = [
        line.strip("| ").split(" | ")[2:]
        for line in (ROOT / "docs" / "results.md").read_text("utf-8").splitlines()
        if line.startswith("| this recipe | 1 | ")
    ]
    assert [column[2:] for column in shown] == rows[: len(shown)]


def test_every_row_of_a_benchmark_is_shown_somewhere():
    """A result file that no README shows is a figure that nobody checks."""
    marks = "".join(document.read_text("utf-8") for document in DOCUMENTS)
    shown = set(re.findall(r"<!-- results: ([\w-]+) -->", marks))
    assert {path.stem for path in RESULTS.glob("*.json*")} <= shown


def test_a_part_is_filled_from_the_rows_of_its_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    row = {
        "case": "8x1500x1280 N60-400",
        "dtype": "float32",
        "device": "an abacus",
        "threads": 1,
        "torch": "2.13",
        "implementation": "cif (torch)",
        "fresh_ms": 4.56,
        "peak_mib": 7.4,
        "over_floor": 1.5,
        "note": "",
        **{f"error_{name}": 1e-8 for name in ("out", "dh", "dalpha")},
    }
    times = {"forward": 1.23, "backward": 2.3, "forward+backward": 3.45}
    lines = [json.dumps({**row, "pass": which, "median_ms": ms}) for which, ms in times.items()]
    (tmp_path / "results" / "cif-cpu.jsonl").write_text("\n".join(lines) + "\n")
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- results: cif-cpu -->\nold\n<!-- end of results -->\nb\n")
    text = filled(document)
    assert "old" not in text
    assert "| cif (torch) | 1.2 | 3.5 | 4.6 | 7 | 1.5 x | 1e-08, 1e-08, 1e-08 |" in text
    assert "an abacus" in text
    assert "(results/cif-cpu.jsonl)" in text
    assert (text.startswith("a\n"), text.endswith("b\n")) == (True, True)


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
