"""The README of a model that is given away."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blspkd.model.configuration import BlspKDConfig

from .report import TITLES, show_score
from .tables import markdown

USE = """\
```sh
pip install blspkd
blspkd generate {folder} recording.wav{where}
```

```python
from blspkd.model.loading import load_model

model, processor = load_model("{folder}", encoder="{encoder}", language_model="{language_model}")
```
"""

METERS = {
    "token_accuracy": "token accuracy",
    "length_exact": "exact length",
    "length_within_one": "length within one",
    "input_top1": "input top-1",
    "response_kl": "response KL",
}


def model_card(
    config: BlspKDConfig, name: str, *, evaluations: Sequence[Path] = (), licence: str | None = None
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        config: the model's, with the names of its two parts as users have them.
        name: of the folder.
        evaluations: folders that `blspkd eval` wrote, whose figures it quotes.
        licence: an SPDX identifier in lower case, for the front matter.

    Raises:
        ValueError: if a folder holds no evaluation.
    """
    parts = [config.encoder, config.language_model]
    front = ["---", "library_name: blspkd", "base_model:", *(f"- {part}" for part in parts)]
    if licence is not None:
        front.append(f"license: {licence}")
    front += ["tags:", "- speech", "- blsp-kd", "---"]
    where = f" --encoder {config.encoder} --language-model {config.language_model}"
    trained = "adapter" if config.plora is None else "adapter and Partial LoRA"
    text = [
        *front,
        "",
        f"# {name}",
        "",
        f"The {trained} that let `{config.language_model}` answer speech heard by "
        f"`{config.encoder}`, trained by BLSP-KD (arXiv 2405.19041). Neither of these two is in "
        "this folder: both are loaded from where they are, and checked to be the ones this was "
        "trained on.",
        "",
        USE.format(
            folder=name, where=where, encoder=config.encoder, language_model=config.language_model
        ),
        f"Prompt: `{config.prompt}`",
    ]
    if evaluations:
        text += ["", "## Held-out clips", "", _figures([_metrics(path) for path in evaluations])]
    return "\n".join(text) + "\n"


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no metrics.json; expected a folder that `blspkd eval` wrote")
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def _figures(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One column an evaluation: what the adapter hears, then speech and cascade side by side."""
    heads = [
        f"{Path(found['manifest']).stem}, {found['task']} ({found['clips']} clips)"
        for found in evaluations
    ]
    cells = [["", *heads]]
    for key, label in METERS.items():
        values = [found["meters"].get(key) for found in evaluations]
        if any(value is not None for value in values):
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            cells.append([label, *shown])
    for key, title in TITLES.items():
        for row in ("speech", "cascade"):
            values = [found["rows"].get(row, {}).get(key) for found in evaluations]
            if any(value is not None for value in values):
                cells.append([f"{row}: {title}", *(show_score(key, value) for value in values)])
    return markdown(cells)
