"""Who may import whom inside the package, and what `import modmoe` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "modmoe"

# Each subpackage may import itself and the subpackages named here (docs/design.md).
ALLOWED = {
    "ops": set(),
    "losses": set(),
    "layers": {"ops"},
    "models": {"ops", "layers", "losses"},
    "data": set(),
    # "" is the package itself, whose import registers the model types.
    "parallel": {"ops", "layers", "models"},
    "surgery": {"ops", "layers", "losses", "models", "data", ""},
    "distill": {"ops", "layers", "losses", "models", "surgery", ""},
    "training": {"ops", "layers", "losses", "models", "data", "parallel", "surgery", "distill", ""},
}
# Third-party packages that a subpackage is limited to; subpackages that are not named are free.
ONLY = {"ops": {"torch"}, "losses": {"torch"}, "layers": {"torch", "transformers"}}
# Optional stacks, each imported only by the files that are named after it.
OPTIONAL = {"triton": "_triton"}
OUTSIDERS = {"train", "tools", "examples", "experiments", "tests"}


def imports(path: Path) -> list[str]:
    """Absolute dotted names of everything a file imports, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            names.append(".".join([*base, node.module] if node.module else base))
    return names


def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction(path):
    own = path.relative_to(PACKAGE).parts[0]
    assert own in ALLOWED, f"{own} is a new subpackage: say in ALLOWED what it may import"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "modmoe":
            target = parts[1] if len(parts) > 1 else ""
            assert target == own or target in ALLOWED[own], f"{path} imports {name}"
        elif own in ONLY and parts[0] not in sys.stdlib_module_names:
            optional = parts[0] in OPTIONAL and OPTIONAL[parts[0]] in path.stem
            assert optional or parts[0] in ONLY[own], f"{path} imports {name}"
        assert parts[0] not in OUTSIDERS, f"{path} imports {name}"


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_needs_torch_and_transformers_alone():
    optional = "deepspeed datasets accelerate matplotlib pydantic yaml tensorboard triton peft tqdm.auto pandas"
    code = f"""
import sys, torch, transformers.modeling_utils
before = set(sys.modules)
import modmoe
new = set(sys.modules) - before
print([m for m in '{optional}'.split() if m in new])
"""
    assert run(code).strip() == "[]"


def test_importing_is_quick():
    code = """
import time, torch, transformers.modeling_utils, transformers.generation
start = time.process_time()
import modmoe
print(time.process_time() - start)
"""
    assert min(float(run(code)) for _ in range(2)) < 1.0
