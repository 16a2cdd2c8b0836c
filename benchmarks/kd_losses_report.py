"""What benchmarks.kd_losses found, as lines, a table, a chart, and the goals it is held to."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chart import bars
from benchmarks.measure import Row, select

PEER = "F.kl_div"
OURS = "linear_kl_div"
MAIN = {"cpu": "512x576x49152", "cuda": "4096x3584x152064"}
# dtype -> share of F.kl_div's time, of its peak of memory
GOALS = {"float32": (0.8, 0.2), "bfloat16": (0.7, 0.2)}
# over the products' own time, MiB
CUDA_GOALS = (1.15, 1024)


def line(row: Row) -> str:
    """One row, for a reader who waits."""
    start = f"{row['case']:16} {row['dtype']:9} {row['threads']} thr  {row['implementation']:26} "
    if "skipped" in row:
        return f"{start}skipped: {row['skipped']}"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:6.0f} MiB, "
    loop = f"loop {row['loop_ms']:7.1f} ms, " if "loop_ms" in row else ""
    return (
        f"{start}{row['median_ms']:8.1f} ms  x {row['over_first']:<5.2f} {loop}{peak}"
        f"products x {row['over_products']:.2f}, error {row['error_gradient']:.1e}"
    )


def groups(rows: list[Row]) -> list[list[Row]]:
    """The measured rows by device and number of threads."""
    keys = dict.fromkeys((row["device"], row["threads"]) for row in select(rows))
    return [select(rows, device=device, threads=threads) for device, threads in keys]


def kind(rows: list[Row]) -> str:
    """Where rows of one device come from."""
    return "cuda" if "kernel_ms" in rows[0] else "cpu"


def goals(rows: list[Row]) -> list[str]:
    """How the goals are met: a line per device, thread count and dtype."""
    lines = []
    for here in groups(rows):
        case = MAIN[kind(here)]
        for dtype in dict.fromkeys(row["dtype"] for row in select(here, case=case)):
            found = {row["implementation"]: row for row in select(here, case=case, dtype=dtype)}
            start = f"{case} {dtype}, {here[0]['device']}"
            if kind(here) == "cuda":
                best = found.get(f"{OURS}, Triton", found[OURS])
                time_goal, peak_goal = CUDA_GOALS
                lines.append(
                    f"{start}: {best['implementation']} takes {best['over_products']:.2f} x its "
                    f"three products (goal {time_goal}), {best['peak_mib']:.0f} MiB "
                    f"(goal {peak_goal})"
                )
                continue
            mine, peer = found[OURS], found[PEER]
            time_goal, peak_goal = GOALS[dtype]
            parts = [
                f"{mine['loop_ms'] / peer['loop_ms']:.0%} of its time in a loop "
                f"(goal {time_goal:.0%})",
                f"{mine['median_ms'] / peer['median_ms']:.0%} in recycled memory",
            ]
            if mine["peak_mib"] is not None:
                peak = mine["peak_mib"] / peer["peak_mib"]
                parts.append(f"{peak:.0%} of its peak (goal {peak_goal:.0%})")
            products = mine["products_ms"] / peer["loop_ms"]
            parts.append(f"the three products alone take {products:.0%} of its time in a loop")
            thread = f"{here[0]['threads']} thread{'s' if here[0]['threads'] > 1 else ''}"
            lines.append(f"{start}, {thread}: {OURS} against {PEER}: {', '.join(parts)}")
    return lines


def table(rows: list[Row]) -> str:
    """Markdown: the main case in full, then all cases in brief, for each device."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = select(rows, device=device, threads=min(r["threads"] for r in rows))
        threads = "" if kind(here) == "cuda" else f", {here[0]['threads']} thread"
        versions = ", ".join(dict.fromkeys(f"torch {row['torch']}" for row in here))
        case = MAIN[kind(here)]
        for dtype in dict.fromkeys(row["dtype"] for row in select(here, case=case)):
            parts += [
                f"{case} (tokens x width x vocabulary), {dtype}, forward + backward, {device}"
                f"{threads}, {versions}:",
                _in_full(select(here, case=case, dtype=dtype)),
            ]
        parts += [
            "All shapes, forward + backward, ms in a loop, and the peak of memory, MiB, on the "
            "same:",
            _in_brief(here),
        ]
        more = select(rows, device=device)
        for threads_more in sorted({row["threads"] for row in more} - {here[0]["threads"]}):
            parts += [
                f"The same on {threads_more} threads:",
                _in_brief(select(more, threads=threads_more)),
            ]
        notes = {row["implementation"]: row["note"] for row in here if row["note"]}
        parts.append("; ".join(f"{name}: {note}" for name, note in notes.items()) + ".")
    parts.append(
        "In a loop: calls one after another in a process that leaves malloc alone, as training "
        "does. glibc then maps every block above 32 MiB, as all logits together are, anew in each "
        "call. Recycled memory is what the same call has just freed, as allocators keep it that "
        "hold on to all they have had; over the products: there. The error is that of the "
        "gradient, against float64."
    )
    return "\n\n".join(parts)


def _in_full(rows: list[Row]) -> str:
    lines = [
        "| | in a loop, ms | pages mapped | in recycled memory, ms | over the three products alone "
        "| peak, MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['implementation']} | {_number(row.get('loop_ms'))} "
        f"| {_number(row.get('loop_faults'))} | {_number(row['median_ms'])} "
        f"| {row['over_products']:.2f} x | {_number(row['peak_mib'])} "
        f"| {row['error_gradient']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def _in_brief(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        found = {row["implementation"]: row for row in select(rows, case=case, dtype=dtype)}
        cells = [_cell(found.get(name)) for name in names]
        lines.append(f"| {case} {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.get('loop_ms', row['median_ms']):.0f}, {_number(row['peak_mib'])}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def chart(rows: list[Row], path: Path) -> None:
    """Bars of time and of memory over the shapes, for the first device."""
    device = select(rows)[0]["device"]
    here = select(rows, device=device, threads=min(row["threads"] for row in rows))
    panels: dict[str, dict[str, dict[str, float]]] = {}
    time = "time in a loop, ms" if all("loop_ms" in row for row in here) else "time, ms"
    for row in here:
        group = f"{row['case']}\n{row['dtype']}"
        figures = {time: row.get("loop_ms", row["median_ms"])}
        if row["peak_mib"]:
            figures["peak of memory, MiB"] = row["peak_mib"]
        for panel, value in figures.items():
            panels.setdefault(panel, {}).setdefault(row["implementation"], {})[group] = value
    threads = "" if kind(here) == "cuda" else f", {here[0]['threads']} thread"
    title = f"KL from hidden states, forward + backward, on {device}{threads}"
    bars(panels, path, title=title, unit="log scale")
