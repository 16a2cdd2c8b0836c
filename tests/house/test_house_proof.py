"""Documents of results are what their files say, and say so where there are none."""

import json
import re

import pytest
import yaml
from benchmarks import proof
from benchmarks.proof_results import read_matrix

from blspkd.evaluation.bootstrap import Gap, bleu_statistics

CLIPS = 40
PLAN = {
    "title": "What was tried",
    "about": "an abacus\n  and a parrot",
    "rows": {
        "ce": {"title": "CNN + CE", "seeds": [0, 1]},
        "kl": {"title": "CNN + KL", "seeds": [0, 1]},
        "plain": {"title": "plain LoRA", "set": {"model.plain_lora": True}},
        "never": {"title": "a dream"},
        "half": {"title": "half", "scaling": True, "in_matrix": False},
        "whole": {"title": "whole", "scaling": True, "robustness": True},
        "ask": {"title": "asked", "tasks": True, "more_clips": True, "in_matrix": False},
    },
    "claims": [
        {"claim": "KL beats CE", "first": "kl", "second": "ce"},
        {"claim": "dreams come true", "first": "never", "second": "ce"},
    ],
    "differences": [{"first": "plain", "second": "kl"}],
}


def make(row, seed, *, rouge, aligned=True, plain=False, hours=1.0, robust=False):
    """A result file by hand: `rouge` for every clip, a third of the words wrong."""
    texts = [f"a b c d {number}" for number in range(CLIPS)]
    statistics = {
        "self_rouge_l": [[rouge, 1]] * CLIPS,
        "self_bleu": bleu_statistics(texts, texts).astype(int).tolist(),
        "same_answer": [[0, 1]] * CLIPS,
    }
    meters = {"response_kl": [[2.0, 4]] * CLIPS, "response_top1": [[3, 4]] * CLIPS}
    figures = {"response_kl": 0.5}
    if aligned:
        statistics["transcript_wer"] = [[number % 3, 3] for number in range(CLIPS)]
        meters["input_kl"] = [[float(number % 4), 2] for number in range(CLIPS)]
        figures["input_kl"] = 0.75
    cascade = {**statistics, "self_rouge_l": [[0.9, 1]] * CLIPS}
    one = {
        "ids": [f"clip{number}" for number in range(CLIPS)],
        "figures": figures,
        "meters": meters,
        "speech": statistics,
        "cascade": cascade,
        "text": {},
    }
    if plain:
        one["figures"].update(text_drift_kl=0.123, text_answers_changed=0.25)
        one["cascade"] = {**cascade, "self_rouge_l": [[0.7, 1]] * CLIPS}
        one["against_untouched"] = {
            side: {"self_rouge_l": [[value, 1]] * CLIPS}
            for side, value in (("text", 0.8), ("cascade", 0.6), ("speech", 0.4))
        }
    found = {
        "row": row,
        "seed": seed,
        "settings": {"model": {"plain_lora": plain}},
        "commit": "0123456789abcdef",
        "device": "an abacus",
        "steps": 100,
        "clips_seen": 3200,
        "train_clips": int(1000 * hours),
        "train_hours": hours,
        "train_seconds": 600,
        "earlier_stages": {"a": {"train_seconds": 4290}, "b": {"train_seconds": 2000}},
        "trained_parameters": 12_345_678,
        "sets": {"sentences": one},
    }
    if robust:
        rows = {
            side: {"transcript_wer": 0.5, "self_rouge_l": 0.25, "self_bleu": 12.5}
            for side in ("cascade", "speech")
        }
        under = {"figures": {"input_kl": 1.5}, "rows": rows}
        silence = {"clips": 4, "pretends": 0.25, "words": 0.5, "answers_differ": 1.0}
        found["robustness"] = {
            "set": "sentences",
            "clips": 8,
            "conditions": {"clean": under, "noise:0": under},
            "no_speech": {"rows": {"speech": {"silence": silence}}},
        }
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))

    def keep(*found):
        for one in found:
            path = tmp_path / f"{one['row']}-s{one['seed']}.json"
            path.write_text(json.dumps(one))
        return tmp_path

    return keep


def text(folder):
    return proof.text(folder, folder / "results.md", folder / "plan.yaml")


def row_of(document, start):
    line = next(line for line in document.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("path", proof.DOCUMENTS, ids=lambda path: path.stem)
def test_the_document_is_what_the_result_files_say(path):
    plan, results = proof.DOCUMENTS[path]
    written = path.read_text("utf-8")
    assert proof.text(results, path, plan) == written, "run `python -m benchmarks.proof`"
    for picture in re.findall(r"\((results-[\w-]+\.svg)\)", written):
        assert (path.parent / picture).is_file()


def test_without_results_it_says_so_and_nothing_else(folder):
    document = text(folder())
    assert document.count("not run") == 2  # the claims
    assert document.startswith("# What was tried\n\nan abacus and a parrot\n\n")
    assert document.count("Not run") == 8
    assert ".svg" not in document
    assert not re.search(r"\d\.\d\d", document.replace("2405.19041", ""))
    proof.write(folder(), folder() / "results.md", folder() / "plan.yaml")
    assert list(folder().glob("*.svg")) == []


def test_a_task_stands_beside_what_the_text_row_reaches(folder):
    found = make("kl", 0, rouge=0.5)
    rows = {"text": 0.5, "cascade": 0.25, "speech": 0.125}
    rows = {side: {"accuracy": value, "self_rouge_l": 2 * value} for side, value in rows.items()}
    found["tasks"] = {"qa": {"set": "questions", "ids": ["a", "b"], "rows": rows}}
    document = text(folder(found))
    table = document.partition("## Other tasks")[2]
    assert "| questions (2 clips) | qa | accuracy % | 50.0 | 25.0 | 12.5 |" in table
    assert "| questions (2 clips) | qa | Self-ROUGE-L | 1.000 | 0.500 | 0.250 |" in table


def test_more_clips_are_heard_beside_the_cascade(folder):
    found = make("kl", 0, rouge=0.5)
    figures = {"input_kl": 1.25, "input_top1": 0.5, "token_accuracy": 0.625, "length_exact": 0.75}
    heard = {"clips": 204, "figures": figures, "wer": {"cascade": 0.25, "speech": 0.375}}
    found["more_clips"] = {"sentences": heard}
    table = text(folder(found)).partition("## More clips")[2]
    row = next(line for line in table.splitlines() if "sentences" in line)
    assert row.endswith("| sentences | 204 | 1.250 | 50.0 | 62.5 | 75.0 |  | 37.5 | 25.0 |")


def test_what_no_row_asks_for_is_left_out(folder):
    place = folder()
    rows = {name: {"title": name} for name in ("ce", "kl")}
    (place / "plan.yaml").write_text(yaml.safe_dump({"title": "t", "about": "a", "rows": rows}))
    headings = re.findall(r"^## (.+)", text(place), re.MULTILINE)
    assert headings == ["The matrix", "Differences", "Runs"]


def test_figures_stand_in_their_row_as_a_mean_over_seeds(folder):
    place = folder(
        make("ce", 0, rouge=0.2, aligned=False),
        make("ce", 1, rouge=0.3, aligned=False),
        make("kl", 0, rouge=0.4),
        make("plain", 0, rouge=0.45, plain=True),
    )
    document = text(place)
    cells = dict(zip(row_of(document, ""), row_of(document, "CNN + CE"), strict=True))
    assert cells["seeds"] == "2"
    assert cells["Self-ROUGE-L"] == "0.250 ± 0.050"
    assert (cells["response KL"], cells["input KL"], cells["WER %"]) == ("0.500 ± 0.000", "", "")
    cells = dict(zip(row_of(document, ""), row_of(document, "CNN + KL"), strict=True))
    # 40 clips of 3 words with 0, 1, 2, 0, ... errors: 39 in 120 words; KL of 0..3 over 2 tokens
    assert (cells["seeds"], cells["WER %"], cells["input KL"]) == ("1", "32.5", "0.750")
    assert cells["Self-BLEU"] == "100.0"
    assert row_of(document, "a dream")[1:3] == ["0", "not run"]
    run = next(line for line in document.splitlines() if line.startswith("| [CNN + KL](./kl-"))
    assert run.endswith("| 0 | 100 | 3,200 | 12.3 | 1.0 | 10 | 72 + 33 | an abacus, 0123456789 |")
    # a cascade of its own for the row whose language model changed
    assert row_of(document, r"*cascade*")[-2] == "0.900"
    assert row_of(document, r"*cascade* of plain LoRA")[-2] == "0.700"
    assert row_of(document, "plain LoRA less cascade")[2].startswith("-0.250")
    assert row_of(document, "CNN + KL less cascade")[2].startswith("-0.500")
    drift = row_of(document, "plain LoRA, seed 0")
    assert drift == ["plain LoRA, seed 0", "sentences", "0.123", "25", "0.800", "0.600", "0.400"]


def test_claims_are_judged_by_their_intervals(folder):
    place = folder(make("ce", 0, rouge=0.2, aligned=False), make("kl", 0, rouge=0.4))
    document = text(place)
    (line,) = [line for line in document.splitlines() if "KL beats CE" in line]
    assert "holds (CNN + KL less CNN + CE: sentences +0.200 [+0.200, +0.200])" in line
    assert "**dreams come true**: not run" in document
    above, below, across = Gap(1, 0.5, 2), Gap(-1, -2, -0.5), Gap(0.1, -0.5, 0.6)
    assert proof.verdict([above, above]) == "holds"
    assert proof.verdict([above, across]).startswith("holds on some")
    assert proof.verdict([across]).startswith("not shown")
    assert proof.verdict([below]) == "the opposite holds"
    assert proof.verdict([below, across]).startswith("the opposite holds on some")
    assert proof.verdict([above, below]) == "mixed"


def test_a_run_of_short_answers_counts(folder):
    """Answers of three words have no 4-grams; their BLEU is a figure all the same."""
    whole, short = (make("kl", seed, rouge=0.5) for seed in (0, 1))
    for one in short["sets"].values():
        texts = [f"a b c d {number}" for number in range(CLIPS)]
        counts = bleu_statistics(texts, ["a b c"] * CLIPS)
        assert not counts[:, -1].any()
        one["speech"]["self_bleu"] = counts.astype(int).tolist()
    matrix = read_matrix(folder(whole, short), folder() / "results.md", folder() / "plan.yaml")
    (name,) = matrix.sets
    first, second = matrix.seeds("kl", name, "self_bleu")
    assert first == pytest.approx(100)
    assert 0 < second < 100


def test_rows_of_different_clips_are_not_compared(folder):
    other = make("kl", 0, rouge=0.4)
    other["sets"]["sentences"]["ids"][0] = "another"
    with pytest.raises(ValueError, match="different clips"):
        text(folder(make("ce", 0, rouge=0.2), other))


def test_robustness_and_scaling_have_their_tables_and_charts(folder):
    place = folder(
        make("half", 0, rouge=0.3, hours=0.5),
        make("whole", 0, rouge=0.4, robust=True),
    )
    document = text(place)
    assert row_of(document, "half")[1:4] == ["500", "0.50", "sentences"]
    assert "3,200 clips" in document
    assert document.count("| noise:0 |") == 2
    assert row_of(document, "silence")[1:] == ["speech", "4", "25", "0.5", "100"]
    proof.write(place, place / "results.md", place / "plan.yaml")
    drawn = {path.name: path.read_bytes() for path in place.glob("*.svg")}
    assert set(drawn) == {f"results-{name}.svg" for name in ("matrix", "robustness", "scaling")}
    for name in drawn:
        assert f"({name})" in document
    proof.write(place, place / "results.md", place / "plan.yaml")
    assert drawn == {path.name: path.read_bytes() for path in place.glob("*.svg")}
    # the curve's points are no rows of the matrix
    assert "| half |" not in document.split("## Differences")[0]
    assert read_matrix(place, place / "r.md", place / "plan.yaml").scaling == ["half", "whole"]
