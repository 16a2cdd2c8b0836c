"""Tables of cells, as lines of text and as markdown."""

from __future__ import annotations

from collections.abc import Sequence


def lined_up(cells: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of cells, the first of them the header, as lines of text with straight columns.

    Args:
        cells: All rows of the same length; none give an empty text.
        left: How many columns are flush left; the others are flush right.
    """
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the header, as a markdown table; none give an empty text."""
    if not cells:
        return ""
    header, *body = cells
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one_line(text: str) -> str:
    """A text that fits into a cell."""
    return " ".join(text.replace("|", "\\|").split())
