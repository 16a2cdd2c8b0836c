"""The README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "src/cif/README.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert capsys.readouterr().out == "torch.Size([2, 12, 16]) tensor([12,  7])\n"
    assert names["layer"].projection.out_features == names["out"].hidden_states.shape[-1] == 24
    assert all(p.grad is None for p in names["layer"].parameters())
