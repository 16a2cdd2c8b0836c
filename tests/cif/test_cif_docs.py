"""docs/cif.md and its picture say what the package does."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from cif import align

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS / "pictures/frames_to_tokens.py"
PICTURE = DOCS / "cif-frames-to-tokens.svg"


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def version(svg):
    return re.search(r"Matplotlib v[\d.]+", svg)[0]


def test_the_picture_is_what_its_script_draws(tmp_path):
    drawn = tmp_path / "drawn.svg"
    subprocess.run([sys.executable, SCRIPT, drawn], check=True)
    ours, committed = drawn.read_text("utf-8"), PICTURE.read_text("utf-8")
    redraw = "run `python docs/pictures/frames_to_tokens.py`"
    assert texts(ours) == texts(committed), redraw
    assert {"token 3 fires at 10.67", "0.65", "rest 0.4: the tail rule decides"} <= set(texts(ours))
    # how paths are written is Matplotlib's affair
    if version(ours) == version(committed):
        assert ours == committed, redraw


def test_the_examples_run():
    text = (DOCS / "cif.md").read_text("utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 6
    names = {}
    for example in examples:
        exec(compile(example, "docs/cif.md", "exec"), names)
    assert len(texts(PICTURE.read_text("utf-8"))) > 30
    assert f"{float(names['alphas'][0, 5]):g}" in texts(PICTURE.read_text("utf-8"))


def test_the_table_of_tails_is_right():
    text = (DOCS / "cif.md").read_text("utf-8")
    table = re.search(r"<!-- tails -->\n(.*?)<!-- end of tails -->", text, re.DOTALL)[1]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()
    ]
    rules = [name.strip('`"') for name in head[1:]]
    assert rules == ["round", "threshold", "drop", "keep"]
    for total, *cells in rows:
        alphas = torch.full((1, 10), float(total) / 10)
        for rule, cell in zip(rules, cells, strict=True):
            weights = align(alphas, tail=rule).weights()[0].sum(1)
            want = [] if cell == "none" else [float(number) for number in cell.split(",")]
            torch.testing.assert_close(weights, torch.tensor(want), rtol=0, atol=1e-5)


def test_links_lead_somewhere():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)
