"""recipes/smollm2-whisper-base/sentences.py: WordNet's examples as sentences."""

import pytest
from click.testing import CliRunner


@pytest.fixture(scope="module")
def sentences(load_recipe):
    return load_recipe("smollm2-whisper-base/sentences.py")


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("The patient is respiring", "The patient is respiring"),
        ("don't go, she said; stay!", "don't go she said stay"),
        ("a fast-paced 'whodunit' story", "a fast paced whodunit story"),
        ("by the 16th century", None),
        ("the caf\u00e9 was closed", None),
        ("viral infection", None),
        (" ".join(["word"] * 15), " ".join(["word"] * 15)),
        (" ".join(["word"] * 16), None),
    ],
)
def test_cleaning(sentences, example, expected):
    assert sentences.clean(example) == expected


def test_examples_of_the_data_files_become_lines(sentences, tmp_path):
    head = "00001740 29 v 01 breathe 0 000 01 + 02 00"
    (tmp_path / "data.verb").write_text(
        '  1 This software is "provided as it is" by nobody\n'
        f'{head} | draw air; "I can breathe better"; "the patient breathes calmly"  \n'
        f'{head} | to say "no; "this one" is left open  \n'
        f'{head} | again; "i can Breathe better" - someone\n'
    )
    for part in ("adj", "adv", "noun"):
        (tmp_path / f"data.{part}").write_text("")
    out = tmp_path / "out.txt"
    result = CliRunner().invoke(sentences.main, [str(tmp_path), str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text().splitlines() == ["I can breathe better", "the patient breathes calmly"]
    assert "2 sentences of 3 examples" in result.output
    (tmp_path / "data.adv").unlink()
    result = CliRunner().invoke(sentences.main, [str(tmp_path), str(out)])
    assert "has no file data.adv" in result.output
