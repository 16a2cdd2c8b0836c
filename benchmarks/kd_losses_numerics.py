"""The bfloat16 gradient of KL against float64, as teacher and student come closer.

    python -m benchmarks.kd_losses_numerics [--out RESULTS_DIR] [--device cpu|cuda] [--quick]

Shapes: n tokens, H width, V vocabulary. Hidden states and head are bfloat16; teacher and student
share the head; logits have a standard deviation of 4, which leaves the teacher
about 3 nats of entropy. The student is the teacher plus noise, as
much as makes the mean KL what it shall be (kl is what it is). A row of
results/kd_losses_numerics-DEVICE.jsonl:

    error_gradient  of the gradient with respect to the student's hidden states, relative to the
                    norm of the one in float64 from the same bfloat16 numbers
    error_value     of the mean KL, relative
    smallest        the smallest KL of a token, which is never below 0 in float64
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.kd_losses_peers import IMPLEMENTATIONS, truth
from kd_losses import linear_kl_div

KLS = (1e-3, 4e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
SHAPES = {False: (64, 576, 49152), True: (8, 16, 301)}
NAMES = {
    "F.kl_div": "F.kl_div",
    "F.kl_div, float32 softmax": "F.kl_div, float32 softmax",
    "linear_kl_div, two heads": "general form",
    "linear_kl_div": "delta form",
}


def student_at(kl: float, teacher: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
    """The teacher's hidden states (n, H) and as much noise as makes the mean KL ``kl``."""
    low, high = -5.0, 3.0
    for _ in range(14):
        middle = (low + high) / 2
        student = (teacher.float() + 10**middle * noise).to(teacher.dtype)
        low, high = (low, middle) if truth(student, weight, teacher)[0] > kl else (middle, high)
    return (teacher.float() + 10**high * noise).to(teacher.dtype)


def smallest_kl(name: str, student: Tensor, weight: Tensor, teacher: Tensor) -> float:
    """The smallest KL of a token."""
    if name.startswith("linear"):
        own = weight.view_as(weight) if "two" in name else None
        losses = linear_kl_div(student, weight, teacher, own, reduction="none")
    else:
        widen = torch.float32 if "float32" in name else student.dtype
        z, z_teacher = ((h @ weight.T).to(widen).log_softmax(-1) for h in (student, teacher))
        losses = (z_teacher.exp() * (z_teacher - z)).sum(-1)
    return losses.min().item()


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.options("python -m benchmarks.kd_losses_numerics", arguments)
    tokens, width, vocabulary = shape = SHAPES[options.quick]
    made = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=made)
    weight = (draw(vocabulary, width) * (4 / width**0.5)).to(options.device, torch.bfloat16)
    teacher = draw(tokens, width).to(options.device, torch.bfloat16)
    noise = draw(tokens, width).to(options.device)
    where = measure.machine(options.device)
    rows = []
    for kl in KLS:
        student = student_at(kl, teacher, weight, noise)
        value, gradient = truth(student, weight, teacher)
        for name, label in NAMES.items():
            leaf = student.clone().requires_grad_()
            loss = IMPLEMENTATIONS[name].run(leaf, weight, teacher)
            (found,) = torch.autograd.grad(loss, leaf)
            row = {
                "case": f"KL {kl}",
                "implementation": label,
                "shape": [*shape],
                "dtype": "bfloat16",
                "kl": value,
                "error_gradient": ((found.double() - gradient).norm() / gradient.norm()).item(),
                "error_value": abs(loss.item() - value) / value,
                "smallest": smallest_kl(name, student, weight, teacher),
                **where,
            }
            rows.append(row)
            print(
                f"KL {value:8.2e}  {label:28} gradient {row['error_gradient']:.1%}, "
                f"value {row['error_value']:.1e}, smallest {row['smallest']:.1e}",
                flush=True,
            )
    path = options.out / f"kd_losses_numerics-{options.device}.jsonl"
    measure.write(rows, path)
    chart(rows, path.with_suffix(".svg"))
    print(*goals(rows), sep="\n")
    return 0


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """At KL 0.004: the delta form below 4 %, F.kl_div above 40 %."""
    found = {row["implementation"]: row for row in rows if row["case"] == "KL 0.004"}
    delta, naive = (found[name]["error_gradient"] for name in ("delta form", "F.kl_div"))
    negative = [row["implementation"] for row in rows if row["smallest"] < 0]
    return [
        f"at KL 0.004 the delta form's gradient is off by {delta:.1%} (goal 4%), F.kl_div's by "
        f"{naive:.1%}",
        f"negative KLs: {', '.join(dict.fromkeys(negative)) or 'none'}",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """What benchmarks.readme puts into src/kd_losses/README.md."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    shape = "x".join(map(str, rows[0]["shape"]))
    lines = [
        f"Error of the bfloat16 gradient against float64 from the same numbers, {shape} (tokens x "
        f"width x vocabulary), {rows[0]['device']}, torch {rows[0]['torch']}:",
        "",
        f"| mean KL | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["implementation"]: row for row in rows if row["case"] == case}
        cells = [f"{found[name]['error_gradient']:.1%}" for name in names]
        lines.append(f"| {found[names[0]]['kl']:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Lines of the error over KL."""
    import matplotlib
    from matplotlib.figure import Figure

    # the ids within the file come from a hash with this salt, random by default
    with matplotlib.rc_context({"svg.hashsalt": path.name, "font.size": 8}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row["implementation"] for row in rows):
            own = [row for row in rows if row["implementation"] == name]
            axes.plot(
                [row["kl"] for row in own],
                [row["error_gradient"] for row in own],
                marker="o",
                label=name,
            )
        axes.set(xscale="log", yscale="log", xlabel="mean KL (nats)")
        axes.set_ylabel("error of the gradient, relative")
        axes.set_title("KL in bfloat16 against float64")
        lowest = min(row["error_gradient"] for row in rows)
        axes.set_ylim(bottom=10 ** math.floor(math.log10(lowest)))
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
