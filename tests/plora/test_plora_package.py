"""The package as a whole: its README runs, and it needs torch and safetensors only."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import plora

README = Path(__file__).parents[2] / "src" / "plora" / "README.md"


@pytest.mark.parametrize("language", ["python", "py"])
def test_the_readme_runs_as_it_stands(language, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], str(README), "exec"), {})


def test_it_imports_and_works_without_transformers_and_peft(tmp_path):
    block = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[0]
    hidden = "import sys; sys.modules.update(transformers=None, peft=None, einops=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented():
    assert plora.__all__ == sorted(plora.__all__)
    assert all(getattr(plora, name).__doc__ for name in plora.__all__)
