"""The benchmarks run, check themselves, and write rows that say where they come from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FIELDS = {"commit", "device", "torch", "dtype", "shape", "warm_up", "repeats", "over_first"}


def test_the_pieces_benchmark_runs_and_its_implementations_agree(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "pieces.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"cif", "plora", "linear_kl_div"}
    for row in rows:
        assert row.keys() >= FIELDS
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_a_wrong_implementation_is_not_timed(monkeypatch):

    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.pieces import check_agreement

    right, wrong = (lambda: [torch.ones(3)]), (lambda: [torch.tensor([1.0, 1.0, 1.1])])
    check_agreement("case", {"first": right, "second": right}, tol=1e-3)
    with pytest.raises(AssertionError, match="second is off"):
        check_agreement("case", {"first": right, "second": wrong}, tol=1e-3)


def test_the_gpu_script_is_valid_and_asks_for_its_folder():
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "RESULTS_DIR" in done.stderr
