"""Run every benchmark of this folder in turn, or list them.

    python -m benchmarks [--out RESULTS_DIR] [--quick]
    python -m benchmarks --list

A benchmark is a module of this folder with a function `main(arguments)`; each runs alone as
`python -m benchmarks.NAME`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import benchmarks


def names() -> list[str]:
    found = [info.name for info in pkgutil.iter_modules(benchmarks.__path__)]
    return [
        name
        for name in found
        if name != "__main__" and hasattr(importlib.import_module(f"benchmarks.{name}"), "main")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--list", action="store_true", help="name the benchmarks, run none")
    options, passed_on = parser.parse_known_args(arguments)
    for name in names():
        module = importlib.import_module(f"benchmarks.{name}")
        if options.list:
            print(f"{name}\t{(module.__doc__ or '').splitlines()[0]}")
        else:
            print(f"== {name}", flush=True)
            module.main(passed_on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
