"""What benchmarks.cif found, as lines, a table, a chart, and the goals it is held to."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chart import bars
from benchmarks.measure import Row, select

BOTH = "forward+backward"
MAIN = "8x1500x1280 N60-400"
# times faster, forward + backward, on a CPU and a GPU
GOALS = {
    "cpu": (MAIN, "float32", {"torch-cif 0.2.0": 5, "dense + bmm": 8}),
    "cuda": ("32x1500x1280 N400-400", "bfloat16", {"torch-cif 0.2.0": 8}),
}
# share of the copy bandwidth, on a GPU
BANDWIDTH_GOALS = {"forward": 0.8, "backward": 0.7}


def line(row: Row) -> str:
    """One row, for a reader who waits."""
    start = f"{row['case']:22} {row['dtype']:9} {row['threads']} thr  {row['implementation']:17} "
    if "skipped" in row:
        return f"{start}skipped: {row['skipped']}"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:6.0f} MiB"
    peak += "" if row["fresh_ms"] is None else f", fresh {row['fresh_ms']:.3f} ms"
    return (
        f"{start}{row['pass']:17}{row['median_ms']:10.3f} ms  x {row['over_first']:<6.2f} "
        f"{row['gb_s']:7.1f} GB/s, floor x {row['over_floor']:<6.2f}{peak}"
    )


def ours(rows: list[Row]) -> str:
    """The fastest of cif's own backends among rows of one case and pass."""
    own = [row for row in rows if row["implementation"].startswith("cif (")]
    return str(min(own, key=lambda row: row["median_ms"])["implementation"])


def goals(rows: list[Row]) -> list[str]:
    """How the goals are met: a line per device, thread count, and peer or pass."""
    lines = []
    for kind, (case, dtype, peers) in GOALS.items():
        found = select(rows, case=case, dtype=dtype)
        for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in found):
            here = select(found, device=device, threads=threads)
            start = f"{case} {dtype}, {device}" + (f", {threads} thread" if kind == "cpu" else "")
            both = {row["implementation"]: row for row in select(here, **{"pass": BOTH})}
            best = ours([*both.values()])
            for peer, goal in peers.items():
                if peer in both:
                    times = both[peer]["median_ms"] / both[best]["median_ms"]
                    fresh = _fresh_ratio(both[peer], both[best])
                    lines.append(
                        f"{start}: {best} is {times:.1f} x as fast as {peer}{fresh} (goal {goal})"
                    )
            for which, goal in BANDWIDTH_GOALS.items():
                for row in select(here, implementation=best, **{"pass": which}):
                    if "kernel_gb_s" in row:
                        part = row["kernel_gb_s"] / row["copy_gb_s"]
                        lines.append(
                            f"{start}: {best}'s {which} kernels reach {part:.0%} of the copy "
                            f"bandwidth (goal {goal:.0%})"
                        )
    return lines


def _fresh_ratio(peer: Row, best: Row) -> str:
    if peer["fresh_ms"] is None or best["fresh_ms"] is None:
        return ""
    return f", {peer['fresh_ms'] / best['fresh_ms']:.1f} x in fresh memory"


def table(rows: list[Row]) -> str:
    """Markdown: the main case in full, then all cases in brief, for each device."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = select(rows, device=device, threads=min(r["threads"] for r in rows))
        cuda = "kernel_ms" in here[0]
        case, dtype, _ = GOALS["cuda" if cuda else "cpu"]
        versions = ", ".join(dict.fromkeys(f"torch {row['torch']}" for row in here))
        threads = "" if cuda else f", {here[0]['threads']} thread"
        parts += [
            f"{case.replace(' N', ', N ')}, {dtype}, {device}{threads}, {versions}:",
            _in_full(select(here, case=case, dtype=dtype)),
            "All shapes, forward + backward in ms (B x T x D, tokens per row), on the same:",
            _in_brief(select(here, **{"pass": BOTH})),
        ]
    return "\n\n".join(parts)


def _in_full(rows: list[Row]) -> str:
    lines = [
        "| | forward, ms | forward + backward, ms | in fresh memory, ms | peak, MiB "
        "| over the floor of bytes | error of out, dh, dalpha |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = {row["pass"]: row for row in rows if row["implementation"] == name}
        forward, both = own["forward"], own[BOTH]
        fresh = "" if both["fresh_ms"] is None else f"{both['fresh_ms']:.1f}"
        peak = "" if both["peak_mib"] is None else f"{both['peak_mib']:.0f}"
        errors = ", ".join(f"{both[f'error_{x}']:.0e}" for x in ("out", "dh", "dalpha"))
        lines.append(
            f"| {name} | {forward['median_ms']:.1f} | {both['median_ms']:.1f} | {fresh} | {peak} "
            f"| {both['over_floor']:.1f} x | {errors} |"
        )
    return "\n".join(lines)


def _in_brief(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        found = {r["implementation"]: r for r in select(rows, case=case, dtype=dtype)}
        cells = [_milliseconds(found.get(name)) for name in names]
        lines.append(f"| {case.replace(' N', ', N ')} {dtype} | {' | '.join(cells)} |")
    notes = {r["implementation"]: r["note"] for r in rows if r["note"] and "WRONG" not in r["note"]}
    lines += ["", "; ".join(f"{name}: {note}" for name, note in notes.items())] if notes else []
    if any(row["note"].startswith("WRONG") for row in rows):
        lines += ["", "(*) what was timed is a wrong result; the rows say by how much."]
    return "\n".join(lines)


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return "does not run"
    return f"{row['median_ms']:.2f}{' (*)' if row['note'].startswith('WRONG') else ''}"


def chart(rows: list[Row], path: Path) -> None:
    """Bars of every pass over the shapes, for the first device."""
    device = rows[0]["device"]
    here = select(rows, device=device, threads=min(row["threads"] for row in rows))
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in here:
        group = f"{row['case'].replace(' ', chr(10))}\n{row['dtype']}"
        series = panels.setdefault(row["pass"].replace("+", " + "), {})
        series.setdefault(row["implementation"], {})[group] = row["median_ms"]
    threads = "" if "kernel_ms" in here[0] else f", {here[0]['threads']} thread"
    bars(panels, path, title=f"CIF on {device}{threads}", unit="ms (log scale)")
