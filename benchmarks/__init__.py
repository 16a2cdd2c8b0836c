"""Benchmarks; `python -m benchmarks` runs them all, `python -m benchmarks --list` names them."""
