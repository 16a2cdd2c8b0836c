"""Charts of results, as SVG files that change only when the figures do."""

from __future__ import annotations

from pathlib import Path


def bars(
    panels: dict[str, dict[str, dict[str, float]]], path: Path, *, title: str, unit: str
) -> None:
    """Draw panels of grouped bars, one below the other, on a logarithmic axis.

    Args:
        panels: title -> series -> group -> value, above 0; a missing value leaves a gap.
        path: where the SVG goes.
        title: above all.
        unit: of the values.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # the ids within the file come from a hash with this salt, random by default
    with matplotlib.rc_context({"svg.hashsalt": path.name, "font.size": 8}):
        figure = Figure(figsize=(9, 2.6 * len(panels) + 0.8), layout="constrained")
        figure.suptitle(title)
        for axes, (name, series) in zip(
            figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
        ):
            groups = list(dict.fromkeys(group for values in series.values() for group in values))
            width = 0.8 / len(series)
            for number, (label, values) in enumerate(series.items()):
                at = [groups.index(group) + (number + 0.5) * width - 0.4 for group in values]
                axes.bar(at, list(values.values()), width, label=label)
            axes.set_yscale("log")
            smallest = min(value for values in series.values() for value in values.values())
            axes.set_ylim(bottom=smallest / 2)
            axes.set_xticks(range(len(groups)), groups)
            axes.set_title(name)
            axes.set_ylabel(unit)
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
