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
    shown = ""
    for key in after:
        name, _, figure = key.partition("/")
        if name != shown:
            lines += ["", f"{'held out: ' + name:<34}{'before':>10}{'after':>10}"]
            shown = name
        old = _format(figure, before[key]) if key in before else ""
        lines.append(f"  {figure.replace('_', ' '):<32}{old:>10}{_format(figure, after[key]):>10}")
    return "\n".join(lines).strip("\n")


def _format(figure: str, value: float) -> str:
    if any(figure.endswith(word) for word in PERCENT):
        return f"{value:.1%}"
    return f"{value:.3f}"
