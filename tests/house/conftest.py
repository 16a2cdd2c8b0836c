"""What the tests of the repository itself share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def projects() -> dict[str, dict[str, Any]]:
    """Import name -> the parsed pyproject.toml of its distribution."""
    files = {
        "cif": ROOT / "src/cif/pyproject.toml",
        "plora": ROOT / "src/plora/pyproject.toml",
        "kd_losses": ROOT / "src/kd_losses/pyproject.toml",
        "speech_adapters": ROOT / "src/adapters/pyproject.toml",
        "blspkd": ROOT / "pyproject.toml",
    }
    return {name: tomllib.loads(path.read_text("utf-8")) for name, path in files.items()}
