"""README names only what exists, and CI runs the command that README prints."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_paths_exist():
    paths = set(re.findall(r"\b(?:configs|tools|train|docs|tests|modmoe)/[\w./-]*\w", README))
    paths = {p for p in paths if not p.startswith("modmoe.")} - {"configs/train/my.yaml"}  # the reader's own
    assert paths
    assert not [p for p in sorted(paths) if not (ROOT / p).exists()]


def test_file_tree_is_complete():
    tree = README.split("## Files")[1].split("```")[1]
    named = {line.split("/")[0] for line in tree.splitlines() if line and not line.startswith(" ")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {f.split("/")[0] for f in tracked if "/" in f and not f.startswith(".")}
    assert folders <= named
    subpackages = {p.parent.name for p in (ROOT / "modmoe").glob("*/__init__.py")}
    assert subpackages == {line.strip().split("/")[0] for line in tree.splitlines() if re.match(r"  \w", line)}


def test_ci_finds_the_test_command():
    script = """sed -n '/^<!-- tests -->$/,/^```$/p' README.md | sed -n '/^```bash$/,$p' | grep '^python3 '"""
    assert script in (ROOT / ".ci" / "run").read_text()
    found = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert found.startswith("python3 -m venv .venv && ")
    assert "pytest" in found
    assert "\n" not in found
