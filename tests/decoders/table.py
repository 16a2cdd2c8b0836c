"""The record of the sweep, and the documents made from it.

    python -m tests.decoders.table sweep    # every class; rewrites the record, then the documents
    python -m tests.decoders.table write    # the documents from the record

The record is docs/plora-decoders.json; docs/plora-decoders.md is made from it, and so are the lines
between `<!-- decoders -->` and `<!-- end of decoders -->` of README.md and src/plora/README.md.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.decoders.exceptions import SPECIAL
from tests.decoders.sweep import examine, failures

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "plora-decoders.json"
TABLE = ROOT / "docs" / "plora-decoders.md"
READMES = {ROOT / "README.md": "docs/", ROOT / "src/plora/README.md": "../../docs/"}

_HEAD = """# PLoRA in every decoder of transformers

`make test-decoders` builds a small random model of each class in transformers' causal-LM mapping
(version {transformers}, torch {torch}), applies PLoRA with `target_modules="all-linear"`, and
checks on it, in float32:

- **zero and off**: with B = 0, without a mask, with an empty one, and disabled, the logits are the
  base model's to the bit
- **prefix**: at positions before the first masked one the logits are the base model's to the bit;
  at every masked position they differ
- **gradients**: logits and gradients are those of a dense formula put behind each layer of the base
  model by hooks; A and B alone get gradients, and not zero where the formula's are not
- **generation**: greedy generation with a key-value cache (or recurrent states) is that without
- **left padding**: a prompt with padding on its left generates what it does without
- **reentrant**, **non-reentrant**: gradients under the model's own gradient checkpointing are those
  without
- **storage**: saved and loaded, it is the same model to the bit; removed, the base model is back to
  the bit, with its names, modules and trainable parameters

{counts}

"base" means that the base model without PLoRA falls short in the same way: it was asked the same
question. Where cached generation differs from uncached in the base model, PLoRA's cached generation
was compared with the cached generation of the dense formula. In models with experts, other tokens
later in the sequence may change the rounding of earlier ones, because tokens of one expert are
multiplied together; then PLoRA has to stay within that rounding.

"Left out" are linear layers inside the decoder that PLoRA does not adapt under `all-linear`
(`plora.unadapted_layers(model)` lists them): some models read a layer's weight without calling it
("not called"), or never call it in text-only passes; some call a layer, in one of its calls at
least, on something else than the positions of the sequence ("sees no positions"), or it is a router
that returns more than a linear layer does. Experts of which one parameter holds all matrices are no
linear layers, and PLoRA leaves them as they are.

| model type | class | adapted layers | result | left out |
|---|---|---|---|---|
"""

# Why PLoRA does not work there, found by hand
WHY = {
    "cpmant": "the model puts 32 positions of its own before the sequence, inside the decoder",
    "musicgen": "`input_ids` have a row per codebook, layers one per sequence, so the mask has no "
    "right number of rows; given `inputs_embeds` it has",
    "musicgen_melody": "as musicgen",
    "prophetnet": "it predicts several tokens ahead, with their positions side by side in one axis",
    "reformer": "its reversible layers compute their backward pass themselves, and its cache holds "
    "hidden states that are projected again",
    "xlnet": "its layers see (T, batch, features), which cannot be told from (batch, T, features)",
}
_WHY = """
## Where PLoRA fails

It raises there, in the first masked pass or in the first backward pass. Reformer generates, but
with its cache something else than without.

| model type | why |
|---|---|
"""

_SPECIAL = """
## Small models that the rules cannot make

The sizes of a configuration are made small by the names of its fields
(`tests/decoders/shrink.py`). These need more:

| model type | why |
|---|---|
"""


def counts(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Numbers of classes: in all, with a model to check, of those with a check that PLoRA fails,
    and of those with none, but one in which the base model itself falls short.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows.values():
        kinds.setdefault(row["class"], []).append(row)
    built = [[row for row in group if "checks" in row] for group in kinds.values()]
    return {
        "classes": len(kinds),
        "built": sum(bool(group) for group in built),
        "fail": sum(any(map(failures, group)) for group in built),
        "short": sum(any(map(_falls_short, group)) for group in built),
    }


def sentence(record: Mapping[str, Any], folder: str) -> str:
    """What the READMEs say."""
    found = counts(record["rows"])
    text = (
        f"Of the {found['classes']} classes of causal language models in transformers "
        f"{record['versions']['transformers']}, {found['built']} could be built small and run. "
        f"PLoRA on all linear layers passes every check in "
        f"{found['built'] - found['fail'] - found['short']} of them; in {found['short']} it fails "
        f"none, but something does not work in the base model either; in {found['fail']} it fails "
        f"([table]({folder}plora-decoders.md), `make test-decoders`)."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def table(record: Mapping[str, Any]) -> str:
    """docs/plora-decoders.md."""
    lines = [_HEAD.format(counts=sentence(record, ""), **record["versions"]).rstrip()]
    for model_type, row in sorted(record["rows"].items()):
        left_out = "; ".join(f"`{name}`: {why}" for name, why in row.get("left_out", {}).items())
        cells = [model_type, row["class"], row.get("adapted", ""), _result(row), left_out]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append(_WHY.rstrip())
    lines += [f"| {name} | {why} |" for name, why in sorted(WHY.items())]
    lines.append(_SPECIAL.rstrip())
    lines += [f"| {name} | {special.reason} |" for name, special in sorted(SPECIAL.items())]
    return "\n".join(lines) + "\n"


def filled(readme: str, line: str) -> str:
    """A README with `line` between its marks."""
    begin, end = "<!-- decoders -->\n", "\n<!-- end of decoders -->"
    return re.sub(f"{begin}.*?{end}", lambda _: begin + line + end, readme, flags=re.DOTALL)


def read() -> dict[str, Any]:
    """The record."""
    record: dict[str, Any] = json.loads(RECORD.read_text("utf-8"))
    return record


def _falls_short(row: Mapping[str, Any]) -> bool:
    verdicts = row["checks"].values()
    return not failures(dict(row)) and any(verdict.startswith("base") for verdict in verdicts)


def _result(row: Mapping[str, Any]) -> str:
    if "missing" in row:
        return f"not built: {row['missing']}"
    if failed := failures(dict(row)):
        return f"**fails**: {', '.join(failed)}"
    notes = [f"{name}: {verdict}" for name, verdict in row["checks"].items() if verdict != "pass"]
    return "; ".join(["pass", *notes])


def _write() -> None:
    record = read()
    TABLE.write_text(table(record), "utf-8")
    for path, folder in READMES.items():
        path.write_text(filled(path.read_text("utf-8"), sentence(record, folder)), "utf-8")


def _sweep() -> None:
    from tests.decoders.build import entries

    rows = {}
    for model_type in entries():
        rows[model_type] = examine(model_type)
        print(model_type, _result(rows[model_type]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"versions": versions, "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sweep"]:
            torch.set_num_threads(1)
            _sweep()
            _write()
        case ["write"]:
            _write()
        case _:
            sys.exit(__doc__)
