"""A run's figures as a table."""

from __future__ import annotations

from collections.abc import Mapping

PERCENT = ("accuracy", "top1", "exact", "within_one", "same_answer", "wer")


def table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Held-out figures before and after, a block per set.

    Args:
        before: by ``SET/FIGURE``.
        after: the same names.
    """
    lines = []
    for name in dict.fromkeys(key.partition("/")[0] for key in after):
        clips = int(after.get(f"{name}/clips", 0))
        lines += ["", f"{f'held out: {name}, {clips} clips':<36}{'before':>10}{'after':>10}"]
        for key, value in after.items():
            of, _, figure = key.partition("/")
            if of == name and figure != "clips":
                old = _format(figure, before[key]) if key in before else ""
                label = figure.replace("_", " ")
                lines.append(f"  {label:<34}{old:>10}{_format(figure, value):>10}")
    return "\n".join(lines).strip("\n")


def _format(figure: str, value: float) -> str:
    if any(figure.endswith(word) for word in PERCENT):
        return f"{value:.1%}"
    return f"{value:.3f}"
