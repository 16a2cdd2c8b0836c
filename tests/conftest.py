"""Settings for all tests, and what the tests of all kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Before any kernel is imported: without a GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def gpu() -> str:
    """Where a kernel runs compiled; skips where that is nowhere."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel runs: on a GPU where there is one, else in Triton's interpreter."""
    if request.param == "gpu":
        return request.getfixturevalue("gpu")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the kernels are compiled for it, not interpreted")
    return "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def outside_interpreter(tmp_path: Path) -> Callable[[str], str]:
    """A function: what a program prints in a new Python, where Triton compiles every kernel."""

    def run(program: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
