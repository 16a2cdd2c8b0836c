"""What benchmarks.plora found, as lines, tables, a chart, and the goals it is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.chart import bars
from benchmarks.measure import Row, select

LAYER, DECODE = "forward+backward", "decode"
OURS = ("plora, one span", "plora, scattered", "plora, triton")
# the case that the goals speak of, by device
MAIN = {"cpu": "1x2048 2048x2048 r16 25%", "cuda": "1x2048 4096x4096 r16 25%"}
SHARE_OF_PEFT = 0.25  # of its extra time, on a CPU
OVER_BASE = 1.08  # on a GPU
DECODE_OVER_BASE = 1.05


def line(row: Row) -> str:
    """One row, for a reader who waits."""
    start = f"{row['case']:32} {row['dtype']:9} {row['implementation']:22} "
    if "skipped" in row:
        return f"{start}skipped: {row['skipped']}"
    saved = "" if row["saved_mib"] is None else f"saved {row['saved_mib']:6.2f} MiB"
    peak = "" if row["peak_mib"] is None else f", peak {row['peak_mib']:6.1f} MiB"
    return (
        f"{start}{row['median_ms']:9.3f} ms  x {row['over_first']:.3f}  "
        f"adds {_added(row):8.3f} ms  {saved}{peak}"
    )


def goals(rows: list[Row]) -> list[str]:
    """How the goals are met: a line per device, thread count, and goal."""
    lines = []
    for device, threads in dict.fromkeys((r["device"], r["threads"]) for r in select(rows)):
        here = select(rows, device=device, threads=threads)
        start = f"{device}, {threads} thread" if "kernel_ms" not in here[0] else device
        for kind, case in MAIN.items():
            found = {r["implementation"]: r for r in select(here, case=case, dtype="bfloat16")}
            for name in OURS:
                if name in found and kind == "cpu":
                    lines += [
                        f"{case}, {start}: {name} adds {_added(found[name]):.2f} ms, "
                        f"{_added(found[name]) / _added(found[peer]):.0%} of what {peer} adds "
                        f"(goal {SHARE_OF_PEFT:.0%})"
                        for peer in ("PEFT", "PEFT, float32 adapter")
                        if peer in found and _added(found[peer]) > 0
                    ]
                elif name in found:
                    ratio = found[name]["kernel_ms"] / found["base layer"]["kernel_ms"]
                    lines.append(
                        f"{case}, {start}: {name} takes {found[name]['over_first']:.3f} x the base "
                        f"layer's time, {ratio:.3f} x in kernels (goal {OVER_BASE})"
                    )
        lines += [
            f"{row['case']}, {start}: decoding takes {_over_base(row):.3f} x the base model's "
            f"time (goal {DECODE_OVER_BASE})"
            for row in select(here, implementation="plora, mask off")
        ]
    return lines


def table(rows: list[Row]) -> str:
    """Markdown, for each device: extra time, memory saved for backward, decoding."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in select(rows)):
        here = select(rows, device=device)
        here = select(here, threads=min(row["threads"] for row in here))
        cuda = "kernel_ms" in here[0]
        threads = "" if cuda else f", {here[0]['threads']} thread"
        versions = ", ".join(dict.fromkeys(f"torch {row['torch']}" for row in here))
        parts += [
            f"On {device}{threads}, {versions}; forward + backward of one frozen layer (B x T, "
            "K x N, rank, share of positions masked). Milliseconds in all for the base layer (20th "
            "percentile), and milliseconds added to it:",
            _cells(select(here, **{"pass": LAYER}), _extra, with_base=True),
            "MiB that autograd keeps for the backward pass, and peak of memory over what was held "
            "before:",
            _cells(select(here, **{"pass": LAYER}), _memory, with_base=False),
        ]
        decoding = select(here, **{"pass": DECODE})
        if decoding:
            what = f"8 tokens, one at a time, {decoding[0]['case']}, bfloat16:"
            parts += [what, _decoding(decoding)]
    return "\n\n".join(parts)


def _cells(rows: list[Row], cell: Any, *, with_base: bool) -> str:
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    shown = [name for name in names if name != "base layer"]
    first = "base layer, ms | " if with_base else ""
    lines = [f"| | {first}{' | '.join(shown)} |", "|---|" + "---|" * (len(shown) + with_base)]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        found = {r["implementation"]: r for r in select(rows, case=case, dtype=dtype)}
        start = [f"{found['base layer']['p20_ms']:.1f}"] if with_base else []
        cells = start + [cell(found[name]) if name in found else "" for name in shown]
        lines.append(f"| {case.replace('x', ' x ')}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _extra(row: Row) -> str:
    return f"{_added(row):.1f}"


def _added(row: Row) -> float:
    """What a call takes over the base layer's; without the noise of its products where known."""
    return float(row.get("added_ms", row["extra_ms"]))


def _memory(row: Row) -> str:
    peak = "" if row["peak_mib"] is None else f", {row['peak_mib']:.0f}"
    return f"{row['saved_mib']:.1f}{peak}"


def _decoding(rows: list[Row]) -> str:
    lines = ["| | ms | over the base model |", "|---|---|---|"]
    lines += [
        f"| {row['implementation']} | {row['p20_ms']:.2f} | {_over_base(row):.3f} x |"
        for row in rows
    ]
    return "\n".join(lines)


def _over_base(row: Row) -> float:
    """By the 20th percentiles, like extra_ms."""
    return float(row["p20_ms"] / (row["p20_ms"] - row["extra_ms"]))


def chart(rows: list[Row], path: Path) -> None:
    """Bars of extra time and saved memory over the cases, for the first device."""
    measured = select(rows, **{"pass": LAYER})
    if not measured:
        return
    device = measured[0]["device"]
    here = select(measured, device=device, threads=min(row["threads"] for row in measured))
    panels: dict[str, dict[str, dict[str, float]]] = {}
    figures = {
        "ms added to the base layer": _added,
        "MiB saved for backward": lambda row: row["saved_mib"],
    }
    for title, figure in figures.items():
        for row in here:
            if row["implementation"] != "base layer" and figure(row) > 0:
                group = f"{row['case'].replace(' ', chr(10), 2)}\n{row['dtype']}"
                series = panels.setdefault(title, {})
                series.setdefault(row["implementation"], {})[group] = figure(row)
    threads = "" if "kernel_ms" in here[0] else f", {here[0]['threads']} thread"
    bars(panels, path, title=f"Partial LoRA on {device}{threads}", unit="log scale")
