"""The documents are what the record says, and the record says enough."""

from __future__ import annotations

import pytest
import transformers
from tests.decoders.build import entries
from tests.decoders.checks import CHECKS
from tests.decoders.exceptions import SPECIAL
from tests.decoders.sweep import failures
from tests.decoders.table import READMES, TABLE, WHY, counts, filled, read, sentence, table


def test_the_documents_are_made_from_the_record():
    record = read()
    assert TABLE.read_text("utf-8") == table(record), "run `python -m tests.decoders.table write`"
    for path, folder in READMES.items():
        readme = path.read_text("utf-8")
        assert sentence(record, folder) in readme
        assert filled(readme, sentence(record, folder)) == readme


def test_nine_in_ten_classes_pass():
    found = counts(read()["rows"])
    assert found["built"] >= 0.95 * found["classes"]
    assert found["fail"] <= 0.1 * found["built"]


def test_every_class_has_its_row():
    record = read()
    if record["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the record is of another version of transformers, with other classes")
    assert set(record["rows"]) == set(entries())
    assert set(SPECIAL) <= set(entries())
    for row in record["rows"].values():
        assert row.keys() & {"missing", "checks"}
        assert row.get("checks", CHECKS).keys() == CHECKS.keys()


def test_each_failure_is_explained():
    assert {name for name, row in read()["rows"].items() if failures(row)} == set(WHY)


def test_a_class_is_as_good_as_the_worst_of_its_model_types():
    good = {"class": "A", "checks": {"x": "pass"}}
    short = {"class": "A", "checks": {"x": "pass", "y": "base: not causal"}}
    bad = {"class": "A", "checks": {"x": "fails: z", "y": "base: not causal"}}
    none = {"class": "B", "missing": "why"}

    def found(*rows):
        return tuple(counts(dict(enumerate(rows))).values())

    assert found(good, none) == (2, 1, 0, 0)
    assert found(good, short) == (1, 1, 0, 1)
    assert found(good, bad) == (1, 1, 1, 0)
