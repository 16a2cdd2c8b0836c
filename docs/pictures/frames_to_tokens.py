"""Draw how CIF turns frames into tokens, from a real call of `cif.align`.

    python docs/pictures/frames_to_tokens.py            # writes docs/cif-frames-to-tokens.svg
    python docs/pictures/frames_to_tokens.py OUT.svg

Shapes: T frames, N tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from cif import align

PICTURE = Path(__file__).parents[1] / "cif-frames-to-tokens.svg"
ALPHAS = [0.2, 0.5, 0.7, 0.1, 0.35, 0.8, 0.05, 0.45, 0.3, 0.15, 0.6, 0.2]
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
REST = "#bbbbbb"
# Text stays text, and nothing in the file depends on when or where it was written.
STYLE = {
    "svg.hashsalt": "cif",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(path: Path) -> None:
    """Draw the picture.

    Args:
        path: the svg file to write.
    """
    alphas = torch.tensor(ALPHAS)
    aligned = align(alphas[None], tail="drop")
    weights, times = aligned.weights()[0], aligned.fire_times[0].tolist()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            3, 1, figsize=(8, 7.6), sharex=True, height_ratios=[3, 4, 2.4], layout="constrained"
        )
        _draw_alphas(axes[0], alphas, weights, times)
        _draw_level(axes[1], alphas, times)
        _draw_weights(axes[2], weights)
        axes[2].set_xticks(range(len(ALPHAS) + 1))
        axes[2].set_xlim(0, len(ALPHAS))
        axes[2].set_xlabel("time in frames: frame f lasts from f to f + 1")
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _draw_alphas(ax: Axes, alphas: torch.Tensor, weights: torch.Tensor, times: list[float]) -> None:
    """Draw each frame's alpha, (T,), divided from left to right by the weights, (N, T)."""
    for frame, alpha in enumerate(alphas.tolist()):
        parts = [(float(w[frame]), colour) for w, colour in zip(weights, COLOURS, strict=True)]
        rest = alpha - sum(part for part, _ in parts)
        left = float(frame)
        for part, colour in [*parts, (rest, REST)]:
            if part > 1e-6:
                # within a frame weight comes evenly, so a part of it is a part of the time
                width = part / alpha
                ax.bar(left, alpha, width, align="edge", color=colour, edgecolor="white")
                left += width
        ax.text(frame + 0.5, alpha + 0.02, f"{alpha:g}", ha="center", va="bottom")
    for time in times:
        ax.axvline(time, color="black", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1)
    ax.set_ylabel("alpha")
    ax.set_title(
        "Each frame brings a weight; a frame in which a token fires is divided", loc="left"
    )


def _draw_level(ax: Axes, alphas: torch.Tensor, times: list[float]) -> None:
    """Draw the accumulated weight and where it crosses the thresholds."""
    level = torch.cat([torch.zeros(1), alphas.cumsum(0)]).tolist()
    ax.plot(range(len(level)), level, color="black", marker="o", markersize=3)
    for token, (time, colour) in enumerate(zip(times, COLOURS, strict=True)):
        ax.axhline(token + 1, color=colour, linewidth=0.8, linestyle="--")
        ax.axvline(time, 0, (token + 1) / 5, color="black", linewidth=0.8, linestyle=":")
        ax.plot([time], [token + 1], marker="D", markersize=6, color=colour)
        ax.annotate(
            f"token {token} fires at {time:.2f}",
            (time, token + 1),
            xytext=(-6, 4),
            textcoords="offset points",
            ha="right",
        )
    ax.annotate(
        f"rest {level[-1] - len(times):.1f}: the tail rule decides",
        (len(alphas), level[-1]),
        xytext=(-4, 6),
        textcoords="offset points",
        ha="right",
    )
    ax.set_ylim(0, 5)
    ax.set_yticks(range(6))
    ax.set_ylabel("accumulated alpha")
    ax.set_title(
        "A token fires whenever the sum passes the next multiple of the threshold", loc="left"
    )


def _draw_weights(ax: Axes, weights: torch.Tensor) -> None:
    """Write the matrix of weights, (N, T), one row per token."""
    for token, (row, colour) in enumerate(zip(weights.tolist(), COLOURS, strict=True)):
        for frame, weight in enumerate(row):
            if weight > 1e-6:
                ax.bar(
                    frame, 1, 1, token - 0.5, align="edge", color=colour, alpha=0.15 + 0.7 * weight
                )
                ax.text(frame + 0.5, token, f"{weight:.2f}", ha="center", va="center")
    ax.set_ylim(len(weights) - 0.5, -0.5)
    ax.set_yticks(range(len(weights)), [f"token {n}" for n in range(len(weights))])
    ax.set_title("The weights w[n, t]: each row sums to the threshold", loc="left")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
