"""The README's example runs as it stands, and without any library it does not name."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "src" / "adapters" / "README.md"


def test_the_readme_runs_without_transformers(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    hidden = "import sys; sys.modules.update(transformers=None, plora=None, kd_losses=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 9, 96]) tensor([9, 5])" in done.stdout
