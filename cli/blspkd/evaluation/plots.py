"""Pictures: how learning went, and where in a clip each token lies.

Shapes: M mel bins, F mel frames (100 Hz), S stacked encoder frames, N tokens.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blspkd.data.manifest import Record
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .meters import nearest_tokens

MEL_RATE = 100.0
"""Mel frames per second."""
ENCODER_RATE = 50.0
"""Encoder frames per second."""
LOG_NAMES = ("log.jsonl", "trainer_state.json")
BEFORE_NAME = "before.json"
# the Trainer's closing words, and what is the step by another name
NOT_DRAWN = ("train_", "total_flos", "epoch", "step")

Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Alignment:
    """Where CIF cut one clip.

    Attributes:
        title: The clip's id and transcript.
        log_mel: (M, F) float32.
        alphas: (S,) the weight of each stacked frame, in tokens.
        alpha_rate: Stacked frames per second.
        fire_times: (N,) seconds at which each token ends; N is 0 where no speech was heard.
        tokens: (N,) the nearest token of each output, as text.
    """

    title: str
    log_mel: npt.NDArray[np.float32]
    alphas: npt.NDArray[np.float32]
    alpha_rate: float
    fire_times: npt.NDArray[np.float32]
    tokens: list[str]


@torch.no_grad()
def align(
    model: BlspKDForConditionalGeneration, processor: BlspKDProcessor, record: Record
) -> Alignment | None:
    """Look at how the adapter cuts a clip when nobody tells it the number of tokens.

    Returns:
        None for an adapter without CIF.
    """
    mel = processor.features(record.audio)
    batch = processor.pad_features([mel], full_window=model.config.full_window)
    device = model.embedding_weight().device
    adapter = model.embed_speech(
        input_features=batch["input_features"].to(device),
        feature_attention_mask=batch["feature_attention_mask"].to(device),
    )
    if adapter.fire_times is None or adapter.alphas is None:
        return None
    heard = adapter.attention_mask[0]
    ids = nearest_tokens(model, adapter.hidden_states[0, heard])
    tokens = [processor.tokenizer.decode([token]) for token in ids.tolist()]
    return Alignment(
        title=f"{record.id}: {record.text}",
        log_mel=mel,
        alphas=adapter.alphas[0].float().cpu().numpy(),
        alpha_rate=ENCODER_RATE / int(getattr(model.adapter.config, "frame_stacking", 1)),
        fire_times=(adapter.fire_times[0, heard].float() / ENCODER_RATE).cpu().numpy(),
        tokens=tokens,
    )


def plot_alignment(alignment: Alignment, path: Path) -> None:
    """Draw a clip's log-mel spectrogram with the weights, fire times and tokens under it."""
    seconds = alignment.log_mel.shape[1] / MEL_RATE
    figure = _figure(width=max(6.0, min(16.0, 2.5 * seconds)), height=4.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    top.imshow(
        alignment.log_mel,
        origin="lower",
        aspect="auto",
        extent=(0.0, seconds, 0.0, float(len(alignment.log_mel))),
        cmap="magma",
    )
    top.set_ylabel("mel bin")
    top.set_title(_clip(_drawable(alignment.title), 100), fontsize=9)
    edges = np.arange(len(alignment.alphas) + 1) / alignment.alpha_rate
    bottom.stairs(alignment.alphas, edges, fill=True, color="tab:blue", alpha=0.5)
    peak = max(1e-3, float(alignment.alphas.max(initial=0.0)))
    bottom.set_ylim(0.0, 1.9 * peak)
    bottom.set_xlim(0.0, seconds)
    bottom.set_xlabel("s")
    bottom.set_ylabel("alpha")
    start = 0.0
    for end, token in zip(alignment.fire_times, alignment.tokens, strict=True):
        for axes in (top, bottom):
            axes.axvline(end, color="tab:red", linewidth=0.8)
        bottom.text(
            (start + end) / 2,
            1.08 * peak,
            _clip(_drawable(token.strip()), 14),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7,
            clip_on=True,
        )
        start = float(end)
    _save(figure, path)


def read_curves(folder: Path) -> Curves:
    """Find a run's logged figures: `log.jsonl`, or else the Trainer's `trainer_state.json`.

    A checkpoint's are looked for in its run's folder too; `before.json` there is step 0.

    Returns:
        For each key (such as `loss/token` or `eval_tts/input_kl`) its (step, value) pairs; empty
        if nothing was logged.
    """
    homes = [folder]
    if folder.name.startswith("checkpoint-"):
        homes.append(folder.parent)
    logs = [home / name for home in homes for name in LOG_NAMES if (home / name).is_file()]
    if not logs:
        return {}
    before = [line for home in homes for line in _read_before(home / BEFORE_NAME)]
    return curves_of([*before, *_read_log(logs[0])])


def curves_of(lines: Sequence[Mapping[str, Any]]) -> Curves:
    """Gather the numbers of each key over the steps; what is no number is left out."""
    curves: Curves = defaultdict(list)
    for line in lines:
        step = line.get("step")
        if not isinstance(step, (int, float)):
            continue
        for key, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and not key.startswith(NOT_DRAWN):
                curves[key].append((float(step), float(value)))
    return dict(curves)


def plot_curves(curves: Curves, path: Path) -> None:
    """Draw learning curves, one panel for each measure.

    All training losses share a panel; `eval_SET/MEASURE` has a panel for MEASURE with a line for
    each SET.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for key, points in sorted(curves.items()):
        if key == "loss" or key.startswith("loss/"):
            panels["training loss"][key.removeprefix("loss/")] = points
        elif key.startswith("eval_") and "/" in key:
            name, measure = key.removeprefix("eval_").split("/", 1)
            if measure != "clips":
                panels[f"held out: {measure}"][name] = points
        else:
            panels[key][""] = points
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(width=4.2 * columns, height=3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 20 else ""
            axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.2, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _save(figure, path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        state: dict[str, Any] = json.loads(text)
        history: list[dict[str, Any]] = state.get("log_history", [])
        return history
    lines = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was cut off leaves half a line
        if isinstance(row, dict):
            lines.append(row)
    return lines


def _read_before(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    measured = json.loads(path.read_text(encoding="utf-8"))
    return [{"step": 0, **{f"eval_{name}": value for name, value in measured.items()}}]


def _figure(*, width: float, height: float) -> Figure:
    # without pyplot: no display is asked for and no global state is left behind
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _drawable(text: str) -> str:
    """A text without what fonts cannot draw, and without matplotlib's mathematics."""
    shown = "".join(sign if sign.isprintable() and sign != "\ufffd" else "?" for sign in text)
    return shown.replace("$", r"\$")


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
