"""Every example runs, and so does every Python block of docs/interfaces.md."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAYS = {
    "stickbreaking_op.py": "give the numbers of the packed row",
    "swap_parallel_experts.py": "JetMoE, 8 pools of experts swapped: logits and 24 gradients agree",
}


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name, capsys):
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_documentation_of_the_interfaces(capsys):
    text = (ROOT / "docs" / "interfaces.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    assert "attn_implementation='stickbreaking' on a 'mixtral' model" in capsys.readouterr().out
    named = set(re.findall(r"(?:examples|tests)/[\w/]+(?:\.py)?", text))
    assert len(named) > 3
    assert not [path for path in named if not (ROOT / path).exists()]
